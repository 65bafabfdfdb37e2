"""The adapter for any ASGI app: one middleware, which may be applied more than once.

The outermost opens the scope, settles it before the last byte, and closes it.  Every one settles
before the first byte what was done inside it, so the innermost settles first: put inside an app's
exception handling, as `session_plugin.starlette` does, it lets the app's own handlers answer a
failed commit.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._asgi import Exchange, HttpExchange, Layer, WebSocketExchange
from ._client import ASGIApp, Client, Message, Receive, Scope, Send
from .access import HasDatabase, check_middleware
from .current import innermost, leave
from .exceptions import ConfigurationError
from .policy import Policy
from .scope import SessionScope

if TYPE_CHECKING:
    from .database import BaseDatabase

__all__ = ["SessionScopeMiddleware"]

KEY = "session_plugin"
MOMENT = 0.01
LONGEST_WAIT = 5.0
"""Seconds that the shutdown waits for the ending of requests."""


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

        Raises:
            ConfigurationError: one of them is something else.
        """
        check_middleware(app, database, find_policy)
        self.app = app
        self._access = database
        self._find_policy = find_policy
        self._open_exchanges = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await (self._lifespan if scope["type"] == "lifespan" else self.app)(scope, receive, send)
            return
        database = self._access.database
        exchanges: dict[Any, Exchange] = scope.setdefault(KEY, {})
        if database in exchanges:
            await Layer(exchanges[database], send).run(self.app, scope, receive)
            return
        client = Client(receive)
        exchange = exchanges[database] = self._open(database, scope, client)
        self._open_exchanges += 1
        outside = innermost.set(exchange.scope)
        try:
            try:
                await Layer(exchange, send).run(self.app, scope, client.receive)
            finally:
                leave(outside)
        finally:
            del exchanges[database]
            try:
                if not exchange.scope.close_idle():
                    await exchange.scope.aclose()
            finally:
                client.leave()
                self._open_exchanges -= 1

    def _open(self, database: BaseDatabase[Any], scope: Scope, client: Client) -> Exchange:
        method = scope.get("method")
        find_policy = self._find_policy
        session_scope = SessionScope(
            database,
            origin=f"{method or 'WEBSOCKET'} {scope['path']}",
            method=method,
            find_policy=None if find_policy is None else lambda: find_policy(scope),
        )
        if not database.is_async:
            session_scope.loop = asyncio.get_running_loop()
        kind = HttpExchange if scope["type"] == "http" else WebSocketExchange
        return kind(session_scope, client)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell a misconfiguration at startup, and dispose before the server hears that all is shut down.

        A server ends its event loop on that message, and does not wait for the app to return.
        """
        try:
            require_asyncio()
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
            await self._last_exchanges()
            disposed = database.dispose()
            if inspect.isawaitable(disposed):
                await disposed

        try:
            await self.app(scope, receive, dispose_and_send)
        finally:
            await dispose()

    async def _last_exchanges(self) -> None:
        """A server may shut down beside the requests that it has cancelled, whose connections go back first."""
        given_up = time.monotonic() + LONGEST_WAIT
        while self._open_exchanges and time.monotonic() < given_up:  # noqa: ASYNC110  an app may serve several loops
            await asyncio.sleep(MOMENT)


def find_exchange(scope: Scope, access: HasDatabase) -> Exchange | None:
    """The exchange that a middleware further out has opened on the database of ``access``."""
    exchanges: dict[Any, Exchange] | None = scope.get(KEY)
    return exchanges.get(access.database) if exchanges else None


def require_asyncio() -> None:
    """Look whether the server runs the app on asyncio, as SQLAlchemy and the ending of a unit of work need.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise ConfigurationError(
            "session_plugin needs asyncio, and this server runs the app on another event loop, such as trio's. Start "
            "it with its asyncio worker: hypercorn --worker-class asyncio."
        ) from error


def _without_secrets(error: Exception) -> str:
    """What a server may log; the message of a foreign error can hold the password of a URL."""
    if isinstance(error, ConfigurationError):
        return str(error)
    return f"The function that names the database failed: {type(error).__name__}"
