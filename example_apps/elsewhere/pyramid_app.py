"""The ledger in Pyramid::

    gunicorn "example_apps.elsewhere.pyramid_app:create_app()"

``LEDGER_DATABASE`` names its database; without it, the ledger is in memory and forgotten at the end.
"""

from collections.abc import Callable
from typing import Any

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPException, HTTPUnauthorized
from pyramid.response import Response
from pyramid.tweens import EXCVIEW
from sqlalchemy.exc import IntegrityError

from session_plugin import Database, Outcome
from session_plugin.policy import response_status
from session_plugin.wsgi import SessionScopeMiddleware

from ..ledger_models import EQUITY
from . import books


@response_status.register
def _(error: HTTPException) -> int:
    return error.status_int


def settling_tween_factory(handler: Callable[[Any], Any], registry: Any) -> Callable[[Any], Any]:
    """Settles under the tween of the exception views, so that they answer a failed COMMIT, and can query."""

    def settling_tween(request: Any) -> Any:
        scope = registry["db"].scope
        try:
            response = handler(request)
            scope.settle(Outcome(response.status_int, None, scope.method))
        except Exception as error:
            outcome = Outcome.raised(error, method=scope.method)
            scope.error = outcome.error  # None for a raised redirect, which commits
            scope.settle(outcome)
            raise
        return response

    return settling_tween


def create_transfer(request: Any) -> Any:
    order = request.json_body
    transfer, can_pay = books.book_and_check(request.db.session, order)
    if order["target"] == EQUITY:
        raise HTTPUnauthorized("nobody pays out")  # raised, and rolled back
    request.response.status_int = 201 if can_pay else 400  # a 400 is rolled back
    return {"transfer": transfer} if can_pay else {"error": "insufficient funds"}


def import_deposits(request: Any) -> Any:
    receipts = books.deposits(request.db.session, request.json_body["deposits"])
    return Response(app_iter=(line.encode() for line in receipts), content_type="text/plain")


def list_accounts(request: Any) -> Any:
    return books.balances(request.db.session)


def refused(error: IntegrityError, request: Any) -> Any:
    request.response.status_int = 409
    return books.refusal(error)


def dry_run(error: books.DryRunError, request: Any) -> Any:
    return {"dry_run": str(error)}


def create_app(db: Database[Any] | None = None, *, adapter: bool = True) -> Any:
    database = db or books.database()
    books.open_books(database)
    with Configurator() as config:
        config.registry["db"] = database
        config.add_request_method(lambda request: database, "db", property=True)
        if adapter:
            config.add_tween(f"{__name__}.settling_tween_factory", under=EXCVIEW)
        views = {"transfers": create_transfer, "deposits": import_deposits, "accounts": list_accounts}
        for path, view in views.items():
            config.add_route(path, path)
            config.add_view(view, route_name=path, renderer="json")
        config.add_exception_view(refused, context=IntegrityError, renderer="json")
        config.add_exception_view(dry_run, context=books.DryRunError, renderer="json")
        return SessionScopeMiddleware(config.make_wsgi_app(), database)
