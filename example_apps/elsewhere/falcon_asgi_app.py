"""The ledger in Falcon, on ASGI::

    uvicorn --factory example_apps.elsewhere.falcon_asgi_app:create_app

``LEDGER_DATABASE`` names its database; without it, the ledger is in memory and forgotten at the end.
"""

from typing import Any

import falcon
import falcon.asgi
from sqlalchemy.exc import IntegrityError

from session_plugin import AsyncDatabase, Outcome
from session_plugin.asgi import SessionScopeMiddleware

from ..ledger_models import EQUITY
from . import books


class SettleInside:
    """Settles inside Falcon, so that its error handlers answer a failed COMMIT: the first of its middlewares."""

    def __init__(self, db: AsyncDatabase[Any]) -> None:
        self.db = db

    async def process_response(self, req: Any, resp: Any, resource: Any, req_succeeded: bool) -> None:
        await resp.render_body()  # what cannot be sent is not committed
        scope = self.db.scope
        if not req_succeeded and not 300 <= resp.status_code < 400:
            scope.doom("an error handler has answered")  # whatever its status; a raised redirect is no error
        try:
            await scope.asettle(Outcome(resp.status_code, None, scope.method))
        except Exception as error:
            scope.error = error
            raise


class Ledger:
    def __init__(self, db: AsyncDatabase[Any]) -> None:
        self.db = db

    async def on_post_transfers(self, req: Any, resp: Any) -> None:
        order = await req.get_media()
        transfer, can_pay = await self.db.session.run_sync(books.book_and_check, order)
        if order["target"] == EQUITY:
            raise falcon.HTTPUnauthorized(title="nobody pays out")  # raised, and rolled back
        resp.status = 201 if can_pay else 400  # a 400 is rolled back
        resp.media = {"transfer": transfer} if can_pay else {"error": "insufficient funds"}

    async def on_post_deposits(self, req: Any, resp: Any) -> None:
        orders = (await req.get_media())["deposits"]

        async def receipts() -> Any:
            for account, amount in orders:
                yield (await self.db.session.run_sync(books.deposit, account, amount)).encode()

        resp.content_type = falcon.MEDIA_TEXT
        resp.stream = receipts()

    async def on_get_accounts(self, req: Any, resp: Any) -> None:
        resp.media = await self.db.session.run_sync(books.balances)

    async def process_startup(self, scope: Any, event: Any) -> None:
        await books.open_books_async(self.db)


async def refused(req: Any, resp: Any, error: IntegrityError, params: Any) -> None:
    resp.status, resp.media = 409, books.refusal(error)


async def dry_run(req: Any, resp: Any, error: books.DryRunError, params: Any) -> None:
    resp.status, resp.media = 200, {"dry_run": str(error)}


def create_app(db: AsyncDatabase[Any] | None = None, *, adapter: bool = True) -> Any:
    database = db or books.async_database()
    ledger = Ledger(database)
    app = falcon.asgi.App(middleware=[*([SettleInside(database)] if adapter else []), ledger])
    app.add_error_handler(IntegrityError, refused)
    app.add_error_handler(books.DryRunError, dry_run)
    for name in ("transfers", "deposits", "accounts"):
        app.add_route(f"/{name}", ledger, suffix=name)
    return SessionScopeMiddleware(app, database)
