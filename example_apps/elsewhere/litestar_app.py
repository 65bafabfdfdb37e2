"""The ledger in Litestar::

    uvicorn --factory example_apps.elsewhere.litestar_app:create_app

``LEDGER_DATABASE`` names its database; without it, the ledger is in memory and forgotten at the end.
"""

from functools import partial
from typing import Any

from litestar import Litestar, Request, Response, get, post
from litestar.enums import ScopeType
from litestar.exceptions import NotAuthorizedException
from litestar.middleware import ASGIMiddleware
from litestar.response import Stream
from sqlalchemy.exc import IntegrityError

from session_plugin import AsyncDatabase, Outcome
from session_plugin.asgi import SessionScopeMiddleware

from ..ledger_models import EQUITY
from . import books


class SettleInside(ASGIMiddleware):
    """Settles inside Litestar, so that its exception handlers answer a failed COMMIT."""

    scopes = (ScopeType.HTTP,)

    def __init__(self, db: AsyncDatabase[Any]) -> None:
        self.db = db

    async def handle(self, scope: Any, receive: Any, send: Any, next_app: Any) -> None:
        left = False

        async def note_and_send(message: Any) -> None:
            nonlocal left
            left = True
            await send(message)

        try:
            await SessionScopeMiddleware(next_app, self.db)(scope, receive, note_and_send)
        except Exception as error:
            # Litestar takes a response that was refused for one that has started, and would ask no handler.
            handlers = scope["route_handler"].resolve_exception_handlers()
            handler = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), handlers.get(500))
            if left or handler is None:
                raise
            request: Request[Any, Any, Any] = Request(scope, receive)
            await handler(request, error).to_asgi_response(app=None, request=request)(scope, receive, send)

    async def raised(self, error: Exception, scope: Any) -> None:
        """Roll back before a handler answers, whatever its status; it is called by ``after_exception``."""
        unit_of_work = self.db.scope
        unit_of_work.error = error
        await unit_of_work.asettle(Outcome.raised(error, method=unit_of_work.method))


def refused(request: Request[Any, Any, Any], error: IntegrityError) -> Response[Any]:
    return Response(books.refusal(error), status_code=409)


def dry_run(request: Request[Any, Any, Any], error: books.DryRunError) -> Response[Any]:
    return Response({"dry_run": str(error)}, status_code=200)


def create_app(db: AsyncDatabase[Any] | None = None, *, adapter: bool = True) -> Any:
    database = db or books.async_database()

    @post("/transfers")
    async def create_transfer(request: Request[Any, Any, Any]) -> Response[Any]:
        order = await request.json()
        transfer, can_pay = await database.session.run_sync(books.book_and_check, order)
        if order["target"] == EQUITY:
            raise NotAuthorizedException("nobody pays out")  # raised, and rolled back
        if not can_pay:
            return Response({"error": "insufficient funds"}, status_code=400)  # returned, and rolled back
        return Response({"transfer": transfer}, status_code=201)

    @post("/deposits")
    async def import_deposits(request: Request[Any, Any, Any]) -> Stream:
        orders = await request.json()

        async def receipts() -> Any:
            for account, amount in orders["deposits"]:
                yield await database.session.run_sync(books.deposit, account, amount)

        return Stream(receipts(), status_code=200)

    @get("/accounts")
    async def list_accounts() -> dict[str, int]:
        return await database.session.run_sync(books.balances)

    inside = SettleInside(database)
    app = Litestar(
        [create_transfer, import_deposits, list_accounts],
        on_startup=[partial(books.open_books_async, database)],
        exception_handlers={IntegrityError: refused, books.DryRunError: dry_run},
        middleware=[inside] if adapter else [],
        after_exception=[inside.raised] if adapter else [],
    )
    return SessionScopeMiddleware(app, database)
