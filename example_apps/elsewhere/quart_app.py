"""The ledger in Quart::

    hypercorn "example_apps.elsewhere.quart_app:create_app()"

``LEDGER_DATABASE`` names its database; without it, the ledger is in memory and forgotten at the end.
"""

from typing import Any

from quart import Quart, abort, request
from sqlalchemy.exc import IntegrityError
from werkzeug.exceptions import HTTPException

from session_plugin import AsyncDatabase, Outcome
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.policy import response_status

from ..ledger_models import EQUITY
from . import books


@response_status.register
def _(error: HTTPException) -> int | None:
    return error.code if error.response is None else error.response.status_code


class SettlingQuart(Quart):
    """Settles inside Quart, so that its error handlers answer a failed COMMIT."""

    db: AsyncDatabase[Any]

    async def full_dispatch_request(self, request_context: Any = None) -> Any:
        response = await super().full_dispatch_request(request_context)
        scope = self.db.scope
        try:
            await scope.asettle(Outcome(response.status_code, scope.error, scope.method))
        except Exception as error:
            return await self.finalize_request(await self.handle_user_exception(error), request_context)
        return response

    async def handle_user_exception(self, error: Exception) -> Any:
        """Roll back before a handler answers, whatever its status, so that it can query; a redirect is no error."""
        scope = self.db.scope
        outcome = Outcome.raised(error, method=scope.method)
        if outcome.error is not None:
            scope.error = error
            await scope.asettle(outcome)
        return await super().handle_user_exception(error)


def create_app(db: AsyncDatabase[Any] | None = None, *, adapter: bool = True) -> Quart:
    database = db or books.async_database()
    app = SettlingQuart(__name__) if adapter else Quart(__name__)
    app.db = database
    app.asgi_app = SessionScopeMiddleware(app.asgi_app, database)

    @app.before_serving
    async def open_books() -> None:
        await books.open_books_async(database)

    @app.errorhandler(IntegrityError)
    async def refused(error: IntegrityError) -> Any:
        return books.refusal(error), 409

    @app.errorhandler(books.DryRunError)
    async def dry_run(error: books.DryRunError) -> Any:
        return {"dry_run": str(error)}

    @app.post("/transfers")
    async def create_transfer() -> Any:
        order = await request.get_json()
        transfer, can_pay = await database.session.run_sync(books.book_and_check, order)
        if order["target"] == EQUITY:
            abort(401, "nobody pays out")  # raised, and rolled back
        if not can_pay:
            return {"error": "insufficient funds"}, 400  # returned, and rolled back
        return {"transfer": transfer}, 201

    @app.post("/deposits")
    async def import_deposits() -> Any:
        orders = await request.get_json()

        async def receipts() -> Any:
            for account, amount in orders["deposits"]:
                yield await database.session.run_sync(books.deposit, account, amount)

        return receipts()

    @app.get("/accounts")
    async def list_accounts() -> Any:
        return await database.session.run_sync(books.balances)

    return app
