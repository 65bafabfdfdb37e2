"""`RequestCycle`: one ASGI connection, from its first message to its last, and when its unit of work is settled.

::

    server ─ Client ─ outermost Layer ─ middleware ─ inner Layer ─ app
                      opens and closes  (may run     inside the app's
                                        beside it)   exception handling

Every middleware of ours on one connection is a `Layer`; all of them share one `RequestCycle`.  For an HTTP
request, with "settle" standing for "settle if there is anything, and it was begun inside this layer":

    ============= ======================== ====================================== ==================
    response      event at a layer         what the layer does                    response then
    ============= ======================== ====================================== ==================
    not started   start                    settles by the status, and passes it   started
                                           on; skips work that an inner app
                                           goes on with
    started       body, not the last       passes it on                           started
    started       the last message         outermost: settles by the status, or   complete
                                           as interrupted if the client left;
                                           inner: notes what is unsettled
    any           settling raises          refuses: the app is unwound, and       as before
                                           the error goes on outside the layer
    not complete  the app raises           settles by the error; a response       started: broken off
                                           that had started is broken off
    broken off    any but a start with an  outermost: raises that error again,    broken off
                  error status             so that the server aborts
    not complete  the app returns          settles as interrupted                 as before
    complete      the app raises, returns  settles as background work             as before
    ============= ======================== ====================================== ==================

A middleware between two layers may run beside the app, as Starlette's `BaseHTTPMiddleware` does, and neither
may end the other's work.  So a transaction remembers how many layers it was begun inside (`current.depth`).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from weakref import WeakMethod

from ..policy import Outcome
from ..scope.current import depth
from ..scope.ending import aclose, asettle, error_received, settle_if_idle
from ..scope.late import run_late
from ..scope.runner import arun
from ..scope.unit_of_work import UnitOfWork
from .client import Client
from .types import ASGIApp, Message, Receive, Scope, Send

HANDSHAKE_STATUS = {"websocket.accept": 101, "websocket.close": 403}
"""The HTTP status that each answer to a WebSocket handshake stands for."""


class Refused(BaseException):
    """Unwinds the app whose response must not be sent; no handler for `Exception` may turn it into another one."""


class RequestCycle(ABC):
    """One connection, however many middlewares of ours it passes through.

    Attributes:
        unit: its unit of work.
        client: its client.
        innermost: the layer that was entered last, and has not returned.
        complete: True once the outermost layer has settled the whole response.
        start: the message that starts the response, once a layer has looked for its background tasks.
    """

    start: Message | None = None
    complete: bool = False

    def __init__(self, unit: UnitOfWork[Any], client: Client) -> None:
        self.unit = unit
        self.client = client
        self.innermost: Layer | None = None

    @abstractmethod
    def message_sent(self, message: Message, layer: Layer) -> Awaitable[None] | None:
        """Return the settling that must come before ``message`` is passed on, or None."""

    @abstractmethod
    def app_returned(self, layer: Layer) -> Awaitable[None] | None:
        """Return the settling of what the app inside ``layer`` has left, or None."""

    @abstractmethod
    def ended_unsent(self) -> None:
        """Note that the app has ended and no response to an HTTP request was sent."""

    async def app_raised(self, error: BaseException, layer: Layer) -> None:
        """Settle by ``error``, which has left the app inside ``layer``."""
        await self._settle_by_error(error, begun_inside=layer.has_begun_transaction())

    async def handler_called(self, error: BaseException) -> None:
        """Settle by ``error``, for which a handler of the app is about to make a response, so that it can query."""
        await self._settle_by_error(error, begun_inside=True)

    async def _settle_by_error(self, error: BaseException, *, begun_inside: bool) -> None:
        outcome = replace(Outcome.raised(error, method=self.unit.method), background=self.complete)
        if not self.complete:
            self.unit.error = outcome.error
        if begun_inside:
            await asettle(self.unit, outcome)


class HttpCycle(RequestCycle):
    """A request and its response.

    Attributes:
        status: of the response, once it has started.  A later start, of an error handler's response,
            counts only if it is higher than one that was sent already.
    """

    def __init__(self, unit: UnitOfWork[Any], client: Client) -> None:
        super().__init__(unit, client)
        self.status: int | None = None
        self._sent_status: int = 0
        self._has_trailers: bool = False
        self._broken_off_by: Exception | None = None

    def message_sent(self, message: Message, layer: Layer) -> Awaitable[None] | None:
        """Settle before the first byte, and again before the last one."""
        if message["type"] == "http.response.start":
            return self._start_sent(message, layer)
        if self._broken_off_by is not None and layer.outer is None:
            raise self._broken_off_by
        if self.status is not None and self._is_last(message):
            return self._last_sent(layer)
        return None

    def _start_sent(self, message: Message, layer: Layer) -> Awaitable[None] | None:
        self.status = max(message["status"], self._sent_status)  # a client that read an error reads no success later
        if layer.outer is None:
            self._sent_status = self.status
        self._has_trailers = message.get("trailers", False)
        if message["status"] >= 400:
            self._broken_off_by = None
            if layer.outer is None and self.unit.lent and not self.unit.settled:
                self.unit.doom(f"a middleware has responded with status {self.status} meanwhile")
            if layer.outer is None and not self.client.start:
                error_received(self.unit, message["status"])
        elif self._broken_off_by is not None and layer.outer is None:
            raise self._broken_off_by
        if (
            self.unit.at_work_in_thread
            or settle_if_idle(self.unit)
            or not layer.has_begun_transaction()
            or layer.inner_app_goes_on()
        ):
            return None
        return asettle(self.unit, self._outcome())

    def _last_sent(self, layer: Layer) -> Awaitable[None] | None:
        unit = self.unit
        layer.complete = True
        runs_beside = unit.at_work_in_thread or unit.late_calls > 0  # another thread or task, which settles itself
        layer.left_unsettled = unit.active and not runs_beside
        if layer.outer is not None:
            return None
        if not runs_beside and not settle_if_idle(unit):
            return self._settle_last()
        self.complete = True
        return None

    async def _settle_last(self) -> None:
        interrupted = self.unit.active and await self.client.has_left()
        await asettle(self.unit, self._outcome(interrupted=interrupted))
        self.complete: bool = True

    async def app_raised(self, error: BaseException, layer: Layer) -> None:
        """Settle by ``error``, and break off a response that has started.

        `BaseHTTPMiddleware` completes the body of a stream that failed, and raises only then.
        """
        self._break_off(error, complete=layer.complete and not layer.left_unsettled)
        await super().app_raised(error, layer)

    async def handler_called(self, error: BaseException) -> None:
        """Settle by ``error``, and break off a response that has started."""
        self._break_off(error, complete=False)
        await super().handler_called(error)

    def _break_off(self, error: BaseException, *, complete: bool) -> None:
        has_started = self.status is not None and not (self.complete or complete)
        if has_started and (self.unit.active or self.unit.cut_short) and isinstance(error, Exception):
            self._broken_off_by = error

    def app_returned(self, layer: Layer) -> Awaitable[None] | None:
        """Settle background work, or roll back if the response was not completed.

        The outermost layer settles with the last message, which a middleware may still be passing on.
        """
        is_passed_on = layer.complete and not self.complete and layer.outer is not None
        if is_passed_on or settle_if_idle(self.unit) or not layer.has_begun_transaction():
            return None
        late = Outcome(method=self.unit.method, background=True)
        return asettle(self.unit, late if self.complete else self._outcome(not layer.complete))

    def ended_unsent(self) -> None:
        """Warn if the work of a response was committed that a middleware or an exception has kept from being sent."""
        error_received(self.unit, None)

    def _is_last(self, message: Message) -> bool:
        kind: str = message["type"]
        if kind in ("http.response.body", "http.response.zerocopysend"):
            return not (self._has_trailers or message.get("more_body", False))
        if kind == "http.response.trailers":
            return not message.get("more_trailers", False)
        return kind == "http.response.pathsend"

    def _outcome(self, interrupted: bool = False) -> Outcome:
        unit = self.unit
        if interrupted:
            return Outcome(self.status, unit.error, unit.method, interrupted=True)
        return Outcome.of_response(self.status, unit.error, unit.method)


class WebSocketCycle(RequestCycle):
    """The handshake of a WebSocket; the messages after it have units of work of their own."""

    def message_sent(self, message: Message, layer: Layer) -> Awaitable[None] | None:
        """Settle the handshake before its answer, and close its unit of work."""
        status = HANDSHAKE_STATUS.get(message["type"], message.get("status"))
        return None if status is None else self._end(status)

    async def _end(self, status: int) -> None:
        await asettle(self.unit, Outcome(status, self.unit.error))
        self.unit.closed_message = (
            "This session served the handshake of the WebSocket and ended with it. Open a unit of work for each "
            "message: `async with db.session_scope() as session:`."
        )
        await aclose(self.unit)
        self.complete: bool = True

    def app_returned(self, layer: Layer) -> Awaitable[None] | None:
        """Roll back a handshake that was not answered."""
        return asettle(self.unit, Outcome(interrupted=not self.complete))

    def ended_unsent(self) -> None:
        """Do nothing: a handshake has no response of that kind."""


class Layer:
    """One middleware's part in a request cycle.

    Attributes:
        cycle: the request cycle.
        outer: the next layer of this cycle further out.
        complete: True once the app inside has sent its whole response.
        left_unsettled: True if work of that response was unsettled then: without it, the response is no success.
    """

    def __init__(self, cycle: RequestCycle, send: Send) -> None:
        self.outer: Layer | None = cycle.innermost
        self.complete: bool = False
        self.left_unsettled: bool = False
        self._depth: int = 0 if self.outer is None else depth.get() + 1
        self._inner_depth: int | None = None
        self.cycle = cycle
        self._send = send
        self._refusal: Exception | None = None

    def has_begun_transaction(self) -> bool:
        """Return False if the transaction is that of a middleware further out, which runs beside the app."""
        unit = self.cycle.unit
        return self.outer is None or not unit.settled or unit.begun_at >= self._depth

    def inner_app_goes_on(self) -> bool:
        """Return True if the transaction is that of an app inside a further layer, which still runs."""
        unit = self.cycle.unit
        return unit.settled and self._inner_depth is not None and unit.begun_at >= self._inner_depth

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive) -> None:
        """Run ``app`` and settle what it leaves.

        A response that was refused ends in the exception that refused it, whatever the app made of it.
        """
        cycle, outer = self.cycle, self.outer
        cycle.innermost = self
        if outer is not None:
            outer._inner_depth = self._depth
            depth.set(self._depth)
        try:
            await app(scope, receive, self.send)
        except BaseException as error:
            if self._refusal is None or isinstance(error, asyncio.CancelledError):
                await cycle.app_raised(error, self)
                raise
        finally:
            cycle.innermost = outer
            if outer is not None:
                outer._inner_depth = None
                depth.set(self._depth - 1)
        if self._refusal is not None:
            raise self._refusal
        if (settling := cycle.app_returned(self)) is not None:
            await settling

    def finds_late_calls(self) -> None:
        """Let `scope.late.late_runner` find this layer's `run_late` for what the app inside it runs after the response.

        The reference is weak: a cycle would wait for the garbage collector.
        """
        unit = self.cycle.unit
        unit.late_runners = {**(unit.late_runners or {}), self._depth: WeakMethod(self.run_late)}

    async def run_late(self, call: Callable[[], Awaitable[None]]) -> None:
        """Run ``call``, which follows the response, as a unit of work of its own.

        If there is work of the response that cannot be settled yet, because a middleware still holds the
        response back, then ``call`` adds to it.
        """
        unit = self.cycle.unit
        if unit.late_calls or await self._response_ended():
            await arun(run_late(unit, call, self._settle_late))
        else:
            await call()

    async def _response_ended(self) -> bool:
        """Return True if the response has ended, complete or because the client left; settle what it has left."""
        if not self.complete and not await self.cycle.client.has_left():
            return False
        if (settling := self.cycle.app_returned(self)) is not None:
            await settling
        return not self.cycle.unit.active

    async def _settle_late(self, unit: UnitOfWork[Any], outcome: Outcome) -> None:
        if self.has_begun_transaction():
            await asettle(unit, outcome)

    async def send(self, message: Message) -> None:
        """Pass ``message`` on, once what it says is true."""
        if self._refusal is not None:
            raise Refused
        cycle = self.cycle
        if not cycle.complete:
            try:
                settling = cycle.message_sent(message, self)
                if settling is not None:
                    await settling
            except Exception as error:
                self._refusal = error
                cycle.unit.error = error
                raise Refused from error
        if self.outer is None:
            due = cycle.client.hold_back(message)
            if due is not None:
                await self._send(due)
            return
        outside = depth.set(self._depth - 1)
        try:
            await self._send(message)
        finally:
            depth.reset(outside)
