"""The ledger in Falcon, on WSGI::

    gunicorn "example_apps.elsewhere.falcon_wsgi_app:create_app()"

``LEDGER_DATABASE`` names its database; without it, the ledger is in memory and forgotten at the end.
"""

from typing import Any

import falcon
from sqlalchemy.exc import IntegrityError

from session_plugin import Database, Outcome
from session_plugin.wsgi import SessionScopeMiddleware

from ..ledger_models import EQUITY
from . import books


class SettleInside:
    """Settles inside Falcon, so that its error handlers answer a failed COMMIT: the first of its middlewares."""

    def __init__(self, db: Database[Any]) -> None:
        self.db = db

    def process_response(self, req: Any, resp: Any, resource: Any, req_succeeded: bool) -> None:
        resp.render_body()  # what cannot be sent is not committed
        scope = self.db.scope
        if not req_succeeded and not 300 <= resp.status_code < 400:
            scope.doom("an error handler has answered")  # whatever its status; a raised redirect is no error
        try:
            scope.settle(Outcome(resp.status_code, None, scope.method))
        except Exception as error:
            scope.error = error
            raise


class Ledger:
    def __init__(self, db: Database[Any]) -> None:
        self.db = db

    def on_post_transfers(self, req: Any, resp: Any) -> None:
        order = req.get_media()
        transfer, can_pay = books.book_and_check(self.db.session, order)
        if order["target"] == EQUITY:
            raise falcon.HTTPUnauthorized(title="nobody pays out")  # raised, and rolled back
        resp.status = 201 if can_pay else 400  # a 400 is rolled back
        resp.media = {"transfer": transfer} if can_pay else {"error": "insufficient funds"}

    def on_post_deposits(self, req: Any, resp: Any) -> None:
        receipts = books.deposits(self.db.session, req.get_media()["deposits"])
        resp.content_type = falcon.MEDIA_TEXT
        resp.stream = (line.encode() for line in receipts)

    def on_get_accounts(self, req: Any, resp: Any) -> None:
        resp.media = books.balances(self.db.session)


def refused(req: Any, resp: Any, error: IntegrityError, params: Any) -> None:
    resp.status, resp.media = 409, books.refusal(error)


def dry_run(req: Any, resp: Any, error: books.DryRunError, params: Any) -> None:
    resp.status, resp.media = 200, {"dry_run": str(error)}


def create_app(db: Database[Any] | None = None, *, adapter: bool = True) -> Any:
    database = db or books.database()
    books.open_books(database)
    app = falcon.App(middleware=[SettleInside(database)] if adapter else [])
    app.add_error_handler(IntegrityError, refused)
    app.add_error_handler(books.DryRunError, dry_run)
    ledger = Ledger(database)
    for name in ("transfers", "deposits", "accounts"):
        app.add_route(f"/{name}", ledger, suffix=name)
    return SessionScopeMiddleware(app, database)
