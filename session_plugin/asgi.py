"""The adapter for any ASGI app: one middleware, which may be applied more than once.

The outermost opens the scope, settles it before the last byte, and closes it.  Every one settles
before the first byte what was done inside it, so the innermost settles first: put inside an app's
exception handling, as `session_plugin.starlette` does, it lets the app's own handlers answer a
failed commit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ._asgi import ASGIApp, Client, Exchange, HttpExchange, Layer, Message, Receive, Scope, Send, WebSocketExchange
from .access import HasDatabase
from .exceptions import ConfigurationError
from .policy import Policy
from .scope import SessionScope

__all__ = ["SessionScopeMiddleware"]

KEY = "session_plugin"


class SessionScopeMiddleware:
    """Gives every request, and every WebSocket handshake, a unit of work on ``database``."""

    def __init__(
        self,
        app: ASGIApp,
        database: HasDatabase,
        *,
        find_policy: Callable[[Scope], Policy | None] | None = None,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: any ASGI app.
            database: a `Database`, an `AsyncDatabase`, or what answers for one.
            find_policy: from the ASGI scope to the policy of the endpoint, if there is one.
        """
        self.app = app
        self._access = database
        self._find_policy = find_policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif (exchange := find_exchange(scope, self._access)) is not None:
            await Layer(exchange, send).run(self.app, scope, receive)
        else:
            await self._connection(scope, receive, send)

    async def _connection(self, scope: Scope, receive: Receive, send: Send) -> None:
        database = self._access.database
        exchanges: dict[Any, Exchange] = scope.setdefault(KEY, {})
        with Client(receive, send) as client:
            exchange = exchanges[database] = self._open(scope, client)
            try:
                with exchange.scope.entered():
                    await Layer(exchange, client.send).run(self.app, scope, client.receive)
            finally:
                del exchanges[database]
                await exchange.scope.aclose()

    def _open(self, scope: Scope, client: Client) -> Exchange:
        method = scope.get("method", "WEBSOCKET")
        find_policy = self._find_policy
        session_scope = SessionScope(
            self._access.database,
            origin=f"{method} {scope['path']}",
            method=scope.get("method"),
            find_policy=None if find_policy is None else lambda: find_policy(scope),
        )
        kind = HttpExchange if scope["type"] == "http" else WebSocketExchange
        return kind(session_scope, client)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell a misconfiguration at startup, and dispose before the server hears that all is shut down.

        A server ends its event loop on that message, and does not wait for the app to return.
        """
        try:
            database = self._access.database
        except Exception as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": _without_secrets(error)})
            raise
        disposing: set[Any] = scope.setdefault(KEY, set())
        if database in disposing:
            await self.app(scope, receive, send)
            return
        disposing.add(database)

        async def dispose_and_send(message: Message) -> None:
            if message["type"] != "lifespan.startup.complete":
                await dispose()
            await send(message)

        async def dispose() -> None:
            disposed = database.dispose()
            if inspect.isawaitable(disposed):
                await disposed

        try:
            await self.app(scope, receive, dispose_and_send)
        finally:
            await dispose()


def find_exchange(scope: Scope, access: HasDatabase) -> Exchange | None:
    """The exchange that a middleware further out has opened on the database of ``access``."""
    exchanges: dict[Any, Exchange] | None = scope.get(KEY)
    return exchanges.get(access.database) if exchanges else None


def _without_secrets(error: Exception) -> str:
    """What a server may log; the message of a foreign error can hold the password of a URL."""
    if isinstance(error, ConfigurationError):
        return str(error)
    return f"The function that names the database failed: {type(error).__name__}"
