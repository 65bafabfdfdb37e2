"""The ledger in Bottle::

    gunicorn "example_apps.elsewhere.bottle_app:create_app()"

``LEDGER_DATABASE`` names its database; without it, the ledger is in memory and forgotten at the end.
"""

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

from bottle import Bottle, HTTPError, HTTPResponse, abort, request, response
from sqlalchemy.exc import IntegrityError

from session_plugin import Database, Outcome
from session_plugin.wsgi import SessionScopeMiddleware

from ..ledger_models import EQUITY
from . import books


def settle_inside(app: Bottle, db: Database[Any]) -> None:
    """Settle inside Bottle, so that its error handlers answer a failed COMMIT."""

    def settling(callback: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(callback)
        def call_and_settle(*args: Any, **kwargs: Any) -> Any:
            scope = db.scope
            try:
                try:
                    result = callback(*args, **kwargs)
                except HTTPResponse as raised:  # by abort() or redirect()
                    result = raised
                ended = result if isinstance(result, HTTPResponse) else response
                scope.settle(Outcome(ended.status_code, method=scope.method))
            except Exception as error:  # on its way to Bottle, which makes a 500 of it
                scope.error = error
                scope.settle(Outcome(error=error, method=scope.method))
                raise
            return result

        return call_and_settle

    app.plugins.insert(0, settling)  # outermost: other plugins, such as the one for JSON, may fail or write
    app.reset()


def create_app(db: Database[Any] | None = None, *, adapter: bool = True) -> Any:
    database = db or books.database()
    books.open_books(database)
    app = Bottle()
    if adapter:
        settle_inside(app, database)

    @app.error(500)  # Bottle has no handlers by class
    def failed(error: HTTPError) -> str:
        answer = {"error": "a fault"}
        if isinstance(error.exception, IntegrityError):
            response.status, answer = 409, books.refusal(error.exception)
        elif isinstance(error.exception, books.DryRunError):
            response.status, answer = 200, {"dry_run": str(error.exception)}
        response.content_type = "application/json"
        return json.dumps(answer)

    @app.post("/transfers")
    def create_transfer() -> Any:
        transfer, can_pay = books.book_and_check(database.session, request.json)
        if request.json["target"] == EQUITY:
            abort(401, "nobody pays out")  # raised, and rolled back
        response.status = 201 if can_pay else 400  # a 400 is rolled back
        return {"transfer": transfer} if can_pay else {"error": "insufficient funds"}

    @app.post("/deposits")
    def import_deposits() -> Any:
        return books.deposits(database.session, request.json["deposits"])

    @app.get("/accounts")
    def list_accounts() -> Any:
        return books.balances(database.session)

    return SessionScopeMiddleware(app, database)
