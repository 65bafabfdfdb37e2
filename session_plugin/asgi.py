"""The adapter for any ASGI app: one middleware, which may be applied more than once.

The outermost opens the scope and closes it.  Every one settles what is unsettled when a response
passes through it, so the innermost settles first: put inside an app's exception handling, as
`session_plugin.starlette` does, it lets the app's own handlers answer a failed commit.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from .access import HasDatabase
from .exceptions import ConfigurationError
from .policy import Outcome, Policy
from .scope import SessionScope

__all__ = ["SessionScopeMiddleware"]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY = "session_plugin"

WEBSOCKET_ANSWERS = {"websocket.accept": 101, "websocket.close": 403}
"""The HTTP status that each answer to a handshake stands for."""


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
        elif scope["type"] in ("http", "websocket"):
            await self._connection(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _connection(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchanges: dict[Any, Exchange] = scope.setdefault(KEY, {})
        database = self._access.database
        if (outer := exchanges.get(database)) is not None:
            await Layer(outer, receive, send).run(self.app, scope)
            return
        exchange = exchanges[database] = self._open(scope)
        try:
            with exchange.scope.entered():
                await Layer(exchange, receive, send).run(self.app, scope)
        finally:
            del exchanges[database]
            await exchange.scope.aclose()

    def _open(self, scope: Scope) -> Exchange:
        method = scope.get("method", "WEBSOCKET")
        find_policy = self._find_policy
        session_scope = SessionScope(
            self._access.database,
            origin=f"{method} {scope['path']}",
            method=scope.get("method"),
            find_policy=None if find_policy is None else lambda: find_policy(scope),
        )
        kind = HttpExchange if scope["type"] == "http" else WebSocketExchange
        return kind(session_scope)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell a misconfiguration at startup, and dispose before the server hears that all is shut down.

        A server ends its event loop on that message, and does not wait for the app to return.
        """
        outermost = KEY not in scope
        scope[KEY] = {}
        try:
            database = self._access.database
        except ConfigurationError as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return

        async def dispose_and_send(message: Message) -> None:
            if message["type"] != "lifespan.startup.complete":
                await dispose()
            await send(message)

        async def dispose() -> None:
            disposed = database.dispose() if outermost else None
            if inspect.isawaitable(disposed):
                await disposed

        try:
            await self.app(scope, receive, dispose_and_send)
        finally:
            await dispose()


class Refused(BaseException):
    """Unwinds the app whose response must not leave; no handler for `Exception` may turn it into another."""


class Exchange:
    """One connection, whatever number of middlewares it passes through."""

    def __init__(self, scope: SessionScope[Any]) -> None:
        self.scope = scope
        self.complete = False

    async def before(self, message: Message, layer: Layer) -> None:
        """Settle what ``message`` would otherwise make untrue."""
        raise NotImplementedError

    async def returned(self) -> None:
        """Settle after the app has returned."""
        raise NotImplementedError

    async def raised(self, error: BaseException) -> None:
        """Settle after ``error`` has left the app; whatever answers it is no success."""
        outcome = Outcome.raised(error, method=self.scope.method)
        if not self.complete:
            self.scope.error = outcome.error
        await self.scope.asettle(outcome)


class HttpExchange(Exchange):
    """A request and its response."""

    status: int | None = None

    async def before(self, message: Message, layer: Layer) -> None:
        """Settle before the first byte, and again before the last one."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            await self.scope.asettle(self._outcome())
        elif message["type"] == "http.response.pathsend" or (
            message["type"] == "http.response.body" and not message.get("more_body", False)
        ):
            interrupted = self.scope.active and await layer.client_left()
            await self.scope.asettle(self._outcome(interrupted=interrupted))
            self.complete = True

    async def returned(self) -> None:
        """Settle background work, or else give up a response that was cut short."""
        if self.complete:
            await self.scope.asettle(Outcome(method=self.scope.method))
        else:
            await self.scope.asettle(self._outcome(interrupted=True))

    def _outcome(self, *, interrupted: bool = False) -> Outcome:
        return Outcome(self.status, self.scope.error, self.scope.method, interrupted)


class WebSocketExchange(Exchange):
    """A WebSocket's handshake; the messages after it have units of work of their own."""

    async def before(self, message: Message, layer: Layer) -> None:
        """Settle the handshake before its answer, and close its scope."""
        status = WEBSOCKET_ANSWERS.get(message["type"], message.get("status"))
        if not self.complete and status is not None:
            await self.scope.asettle(Outcome(status, self.scope.error))
            self.scope.closed_message = (
                "This session served the handshake of the WebSocket and ended with it. Open a unit of work per "
                "message: `async with db.session_scope() as session:`."
            )
            await self.scope.aclose()
            self.complete = True

    async def returned(self) -> None:
        """Give up a handshake that got no answer."""
        await self.scope.asettle(Outcome(interrupted=not self.complete))


class Layer:
    """One middleware's part in an exchange."""

    def __init__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        self._exchange = exchange
        self._receive = receive
        self._send = send
        self._refusal: Exception | None = None
        self._receiving = 0
        self._peeked: asyncio.Future[Message] | None = None
        self._left = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run ``app`` and settle what it leaves.

        A refused response ends in the exception that refused it, whatever the app made of it.
        """
        try:
            await app(scope, self.receive, self.send)
        except BaseException as error:
            if self._refusal is None:
                await self._exchange.raised(error)
                raise
        finally:
            if self._peeked is not None:
                self._peeked.cancel()
        if self._refusal is not None:
            raise self._refusal
        await self._exchange.returned()

    async def send(self, message: Message) -> None:
        """Pass ``message`` on, once what it says is true."""
        if self._refusal is not None:
            raise Refused
        try:
            await self._exchange.before(message, self)
        except Exception as error:
            self._refusal = error
            self._exchange.scope.error = error
            raise Refused from error
        await self._send(message)

    async def receive(self) -> Message:
        """Pass a message of the client on, and note that it left."""
        self._receiving += 1
        try:
            if self._peeked is not None:
                peeked, self._peeked = self._peeked, None
                message = await peeked
            else:
                message = await self._receive()
        finally:
            self._receiving -= 1
        self._left = self._left or message["type"] == "http.disconnect"
        return message

    async def client_left(self) -> bool:
        """True if the server knows by now that the client is gone.

        No server says so when a chunk is sent, so one message is asked for ahead, unless the app
        is listening itself; the app's next ``receive()`` gets it.
        """
        if not self._left and not self._receiving and self._peeked is None:
            self._peeked = asyncio.ensure_future(self._receive())
        await asyncio.sleep(0)
        if self._peeked is not None and self._peeked.done():
            self._left = self._peeked.result()["type"] == "http.disconnect"
        return self._left
