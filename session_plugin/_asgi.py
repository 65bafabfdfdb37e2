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
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from ._client import ASGIApp, Client, Message, Receive, Scope, Send
from .current import depth
from .policy import Outcome
from .scope import SessionScope

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
        self.complete: bool = False

    @abstractmethod
    def before(self, message: Message, layer: Layer) -> Awaitable[None] | None:
        """Note what ``message`` says; the settling of what it would otherwise make untrue, if there is any."""

    @abstractmethod
    def returned(self, layer: Layer) -> Awaitable[None] | None:
        """The settling after the app inside ``layer`` has returned, if there is anything to settle."""

    async def raised(self, error: BaseException, layer: Layer | None = None) -> None:
        """Settle after ``error`` has left the app; whatever answers it is no success."""
        outcome = replace(Outcome.raised(error, method=self.scope.method), background=self.complete)
        if not self.complete:
            self.scope.error = outcome.error
        if layer is None or layer.encloses_work():
            await self.scope.asettle(outcome)


class HttpExchange(Exchange):
    """A request and its response."""

    def __init__(self, scope: SessionScope[Any], client: Client) -> None:
        super().__init__(scope, client)
        self.status: int | None = None
        self.told: int = 0
        self.trailers: bool = False
        self.cut: Exception | None = None

    def before(self, message: Message, layer: Layer) -> Awaitable[None] | None:
        """Settle before the first byte, and again before the last one."""
        scope = self.scope
        if message["type"] == "http.response.start":
            self._start(message, layer)
            settles = not scope.settle_idle() and layer.encloses_work() and not layer.works_on()
            return scope.asettle(self._outcome()) if settles else None
        if self.cut is not None and layer.outer is None:
            raise self.cut
        if self.status is None or not self._is_last(message):
            return None
        layer.complete = True
        layer.owes = scope.active
        if layer.outer is not None:
            return None
        if not scope.settle_idle():
            return self._settle_last()
        self.complete = True
        return None

    async def _settle_last(self) -> None:
        interrupted = self.scope.active and await self.client.has_left()
        await self.scope.asettle(self._outcome(interrupted=interrupted))
        self.complete = True

    async def raised(self, error: BaseException, layer: Layer | None = None) -> None:
        """Settle after ``error`` has left the app; whatever answers it is no success.

        `BaseHTTPMiddleware` completes the body of a stream that failed, and raises only then.
        """
        completed = self.complete or (layer is not None and layer.complete and not layer.owes)
        sending = self.status is not None and not completed
        if sending and self.scope.active and isinstance(error, Exception):
            self.cut = error
        await super().raised(error, layer)

    def returned(self, layer: Layer) -> Awaitable[None] | None:
        """Settle background work, or else give up a response that was cut short.

        The outermost layer settles with the last message, which may still be on its way through a middleware.
        """
        on_its_way = layer.complete and not self.complete and layer.outer is not None
        if on_its_way or self.scope.settle_idle() or not layer.encloses_work():
            return None
        late = Outcome(method=self.scope.method, background=True)
        return self.scope.asettle(late if self.complete else self._outcome(not layer.complete))

    def _start(self, message: Message, layer: Layer) -> None:
        self.status = max(message["status"], self.told)  # whoever was told an error reads no success any more
        if layer.outer is None:
            self.told = self.status
        self.trailers = message.get("trailers", False)
        if message["status"] >= 400:
            self.cut = None
        elif self.cut is not None and layer.outer is None:
            raise self.cut

    def _is_last(self, message: Message) -> bool:
        kind: str = message["type"]
        if kind in ("http.response.body", "http.response.zerocopysend"):
            return not (self.trailers or message.get("more_body", False))
        if kind == "http.response.trailers":
            return not message.get("more_trailers", False)
        return kind == "http.response.pathsend"

    def _outcome(self, interrupted: bool = False) -> Outcome:
        scope = self.scope
        if interrupted:
            return Outcome(self.status, scope.error, scope.method, interrupted=True)
        return Outcome.answered(self.status, scope.error, scope.method)


class WebSocketExchange(Exchange):
    """A WebSocket's handshake; the messages after it have units of work of their own."""

    def before(self, message: Message, layer: Layer) -> Awaitable[None] | None:
        """Settle the handshake before its answer, and close its scope."""
        status = WEBSOCKET_ANSWERS.get(message["type"], message.get("status"))
        return None if status is None else self._end(status)

    async def _end(self, status: int) -> None:
        await self.scope.asettle(Outcome(status, self.scope.error))
        self.scope.closed_message = (
            "This session served the handshake of the WebSocket and ended with it. Open a unit of work per "
            "message: `async with db.session_scope() as session:`."
        )
        await self.scope.aclose()
        self.complete = True

    def returned(self, layer: Layer) -> Awaitable[None] | None:
        """Give up a handshake that got no answer."""
        return self.scope.asettle(Outcome(interrupted=not self.complete))


class Layer:
    """One middleware's part in an exchange.

    A middleware between two layers may run beside the app, as Starlette's `BaseHTTPMiddleware` does.
    So what is settled is told by where the transaction began: neither may end the work of the other.

    Attributes:
        outer: the next layer of this exchange further out.
        complete: True once the app has sent its whole response.
        owes: True if work of that response was unsettled then: without it, the response is no success.
    """

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self.outer: Layer | None = exchange.innermost
        self.complete: bool = False
        self.owes: bool = False
        self._depth: int = 0 if self.outer is None else depth.get() + 1
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
        exchange, outer = self._exchange, self.outer
        exchange.innermost = self
        if outer is not None:
            outer._inner_depth = self._depth
            depth.set(self._depth)
        try:
            await app(scope, receive, self.send)
        except BaseException as error:
            if self._refusal is None or isinstance(error, asyncio.CancelledError):
                await exchange.raised(error, self)
                raise
        finally:
            exchange.innermost = outer
            if outer is not None:
                outer._inner_depth = None
                depth.set(self._depth - 1)
        if self._refusal is not None:
            raise self._refusal
        if (settling := exchange.returned(self)) is not None:
            await settling

    async def send(self, message: Message) -> None:
        """Pass ``message`` on, once what it says is true."""
        if self._refusal is not None:
            raise Refused
        exchange = self._exchange
        if not exchange.complete:
            try:
                settling = exchange.before(message, self)
                if settling is not None:
                    await settling
            except Exception as error:
                self._refusal = error
                exchange.scope.error = error
                raise Refused from error
        if self.outer is None:
            due = exchange.client.due(message)
            if due is not None:
                await self._send(due)
            return
        inside = depth.set(self._depth - 1)
        try:
            await self._send(message)
        finally:
            depth.reset(inside)
