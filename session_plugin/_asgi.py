"""One ASGI connection: when its unit of work is settled, and what the client is sent of it.

::

    server ─ Client ─ outermost Layer ─ middleware ─ inner Layer ─ app
                      opens and closes  (may run     inside the app's
                                        beside it)   exception handling

    http.response.start   each layer settles what was done inside it; if that fails, the app is
                          unwound to that layer, and what stands outside it answers
    the last message      the outermost layer settles: then the client has the whole response
    after the response    what is left is background work, a transaction of its own

The layers of one connection share an `Exchange`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any, TypeAlias

from .current import depth
from .policy import Outcome
from .scope import SessionScope

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

WEBSOCKET_ANSWERS = {"websocket.accept": 101, "websocket.close": 403}
"""The HTTP status that each answer to a handshake stands for."""


class Refused(BaseException):
    """Unwinds the app whose response must not leave; no handler for `Exception` may turn it into another."""


class Exchange(ABC):
    """One connection, whatever number of middlewares it passes through."""

    def __init__(self, scope: SessionScope[Any], client: Client) -> None:
        self.scope = scope
        self.client = client
        self.innermost: Layer | None = None
        self.complete = False

    @abstractmethod
    async def before(self, message: Message, layer: Layer) -> None:
        """Settle what ``message`` would otherwise make untrue."""

    @abstractmethod
    async def returned(self, layer: Layer) -> None:
        """Settle after the app inside ``layer`` has returned."""

    async def raised(self, error: BaseException, layer: Layer | None = None) -> None:
        """Settle after ``error`` has left the app; whatever answers it is no success."""
        outcome = replace(Outcome.raised(error, method=self.scope.method), background=self.complete)
        if not self.complete:
            self.scope.error = outcome.error
        if layer is None or layer.encloses_work():
            await self.scope.asettle(outcome)


class HttpExchange(Exchange):
    """A request and its response."""

    status: int | None = None
    trailers = False
    cut: Exception | None = None

    async def before(self, message: Message, layer: Layer) -> None:
        """Settle before the first byte, and again before the last one."""
        starts = message["type"] == "http.response.start"
        if starts:
            self._start(message)
        if self.cut is not None and layer.outer is None:
            raise self.cut
        if starts and layer.encloses_work() and not layer.works_on():
            await self.scope.asettle(self._outcome())
        elif self._is_last(message):
            layer.complete = True
            if layer.outer is None:
                interrupted = self.scope.active and await self.client.has_left()
                await self.scope.asettle(self._outcome(interrupted=interrupted))
                self.complete = True

    async def raised(self, error: BaseException, layer: Layer | None = None) -> None:
        """Settle after ``error`` has left the app; whatever answers it is no success.

        `BaseHTTPMiddleware` completes the body of a stream that failed, and raises only then.
        """
        sending = self.status is not None and not (self.complete or (layer is not None and layer.complete))
        if sending and self.scope.active and isinstance(error, Exception):
            self.cut = error
        await super().raised(error, layer)

    async def returned(self, layer: Layer) -> None:
        """Settle background work, or else give up a response that was cut short."""
        if layer.encloses_work():
            late = Outcome(method=self.scope.method, background=True)
            await self.scope.asettle(late if self.complete else self._outcome(not layer.complete))

    def _start(self, message: Message) -> None:
        self.status = status = message["status"]
        self.trailers = message.get("trailers", False)
        if status >= 400:
            self.cut = None

    def _is_last(self, message: Message) -> bool:
        if message["type"] == "http.response.trailers":
            more: bool = message.get("more_trailers", False)
        elif message["type"] in ("http.response.body", "http.response.zerocopysend"):
            more = self.trailers or message.get("more_body", False)
        else:
            more = message["type"] != "http.response.pathsend"
        return not more

    def _outcome(self, interrupted: bool = False) -> Outcome:
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

    async def returned(self, layer: Layer) -> None:
        """Give up a handshake that got no answer."""
        await self.scope.asettle(Outcome(interrupted=not self.complete))


class Layer:
    """One middleware's part in an exchange.

    A middleware between two layers may run beside the app, as Starlette's `BaseHTTPMiddleware` does.
    So what is settled is told by where the transaction began: neither may end the work of the other.

    Attributes:
        outer: the next layer of this exchange further out.
        complete: True once the app has sent its whole response.
    """

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self.outer: Layer | None = exchange.innermost
        self.complete: bool = False
        self._depth = depth.get() + 1
        self._inner_depth: int | None = None
        self._exchange = exchange
        self._send = send
        self._refusal: Exception | None = None

    def encloses_work(self) -> bool:
        """True unless the transaction is that of a middleware further out, which runs beside the app."""
        scope = self._exchange.scope
        return self.outer is None or not scope.settled or scope.begun_at >= self._depth

    def works_on(self) -> bool:
        """True if the transaction is that of an app further in, which goes on with it."""
        scope = self._exchange.scope
        return scope.settled and self._inner_depth is not None and scope.begun_at >= self._inner_depth

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive) -> None:
        """Run ``app`` and settle what it leaves.

        A refused response ends in the exception that refused it, whatever the app made of it.
        """
        self._enter()
        try:
            await app(scope, receive, self.send)
        except BaseException as error:
            if self._refusal is None or isinstance(error, asyncio.CancelledError):
                await self._exchange.raised(error, self)
                raise
        finally:
            self._leave()
        if self._refusal is not None:
            raise self._refusal
        await self._exchange.returned(self)

    def _enter(self) -> None:
        self._exchange.innermost = self
        if self.outer is not None:
            self.outer._inner_depth = self._depth
        depth.set(self._depth)

    def _leave(self) -> None:
        self._exchange.innermost = self.outer
        if self.outer is not None:
            self.outer._inner_depth = None
        depth.set(self._depth - 1)

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
        inside = depth.set(self._depth - 1)
        try:
            await self._send(message)
        finally:
            depth.reset(inside)


class Client:
    """What the server is told and tells, as far as it bears on the last byte."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._receiving = 0
        self._asked_ahead: asyncio.Future[Message] | None = None
        self._left = False
        self._missing: int | None = None
        self._held: Message | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._asked_ahead is not None:
            self._asked_ahead.cancel()

    async def send(self, message: Message) -> None:
        """Pass ``message`` on, but hold back what would complete a body of declared length until its end.

        A client that has counted its bytes takes the response for complete, whatever comes of the end.
        """
        if message["type"] == "http.response.start":
            self._missing = _content_length(message)
        if self._missing is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        body = message.get("body", b"")
        self._missing -= len(body)
        if self._held is not None:
            message = {**message, "body": self._held["body"] + body}
            self._held = None
        if self._missing <= 0 and message.get("body") and message.get("more_body", False):
            self._held = message
        else:
            await self._send(message)

    async def receive(self) -> Message:
        """Pass a message of the client on, and note that it left."""
        self._receiving += 1
        try:
            if self._asked_ahead is not None:
                asked_ahead, self._asked_ahead = self._asked_ahead, None
                message = await asked_ahead
            else:
                message = await self._receive()
        finally:
            self._receiving -= 1
        self._left = self._left or message["type"] == "http.disconnect"
        return message

    async def has_left(self) -> bool:
        """True if the server knows by now that the client is gone.

        No server says so when a chunk is sent, so one message is asked for ahead, unless the app
        is listening itself; the app's next ``receive()`` gets it.
        """
        if not self._left and not self._receiving and self._asked_ahead is None:
            self._asked_ahead = asyncio.ensure_future(self._receive())
        await asyncio.sleep(0)
        answer = self._asked_ahead
        if answer is not None and answer.done() and answer.exception() is None:
            self._left = answer.result()["type"] == "http.disconnect"
        return self._left


def _content_length(start: Message) -> int | None:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None
