"""`Response`: the iterable that the server gets; it settles before the first byte and before the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..policy import Outcome
from ..scope.current import depth, innermost
from ..scope.ending import close, error_received, settle, settle_if_idle
from ..scope.unit_of_work import UnitOfWork

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class Response:
    """The response to one request, and the course of its unit of work."""

    _headers: Sequence[tuple[str, str]] = ()
    _chunks: Iterator[bytes] = iter(())

    def __init__(self, unit: UnitOfWork[Any], start_response: StartResponse) -> None:
        self._unit = unit
        self._start_response: Callable[..., Callable[[bytes], object] | None] = start_response
        self._started: tuple[Any, ...] | None = None
        self._server_write: Callable[[bytes], object] | None = None
        self._status: int | None = None
        self._sent_bytes = 0
        self._ended = False
        self._failure: BaseException | None = None
        self._body: Iterable[bytes] = ()

    def run(self, app: WSGIApplication, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the app, and settle if it has called ``start_response`` by then."""
        token = innermost.set(self._unit)
        try:
            try:
                self._body = app(environ, self.start)
                self._chunks = iter(self._body)
                if self._started is not None and self._server_write is None:
                    self._pass_on_start()
            finally:
                innermost.reset(token)
        except BaseException as error:
            try:
                self._fail(error)
            finally:
                self.close()
            raise
        file_wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(file_wrapper, type) and isinstance(self._body, file_wrapper):
            self._end()
            return self._body  # the server may send it by sendfile(2) if it gets it as it is
        if type(self._body) in (list, tuple) and self._is_settled:
            self.close()  # no code of the app can run any more, and many test clients never close a response
            return self._body
        return self

    @property
    def _is_settled(self) -> bool:
        return self._server_write is not None and self._failure is None and not self._unit.active

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """Note the status and the headers, and pass them on later, once they are true: the app's ``start_response``.

        A call with ``exc_info`` replaces an earlier one, unless its work is already durable: then the
        exception is raised, as PEP 3333 asks of a server that has sent the headers.
        """
        if exc_info is None:
            if self._started is not None:
                raise AssertionError("start_response() was called a second time without exc_info.")
            self._started = (status, headers)
            return self.write
        if self._sent_bytes or (self._server_write is not None and self._unit.saved):
            raise exc_info[1].with_traceback(exc_info[2])
        self._started = (status, headers, exc_info)
        self._unit.error = exc_info[1]
        self._failure = self._server_write = None
        vars(self).pop("_content_length", None)
        return self.write

    def write(self, data: bytes) -> None:
        """Send ``data``: the app's ``write``, which PEP 3333 keeps for old apps."""
        server_write = self._server_write or self._pass_on_start()
        self._about_to_send(data)
        server_write(data)

    def __iter__(self) -> Response:
        return self

    def __next__(self) -> bytes:
        token = innermost.set(self._unit)
        try:
            try:
                chunk = next(self._chunks, None)
                if self._server_write is None:
                    self._pass_on_start()
                self._about_to_send(chunk)
            finally:
                innermost.reset(token)
        except BaseException as error:
            self._fail(error)
            raise
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Roll back if the response was not completed, call the app's ``close``, and close the unit of work."""
        unit = self._unit
        try:
            try:
                unit.interrupted = not self._complete
                if not settle_if_idle(unit) and unit.interrupted:
                    self._settle_by(Outcome(self._status, unit.error, unit.method, interrupted=True))
            finally:
                self._close_body()
        finally:
            self._end()
            self._started = self._failure = None  # PEP 3333: no cycle through a traceback

    def _end(self) -> None:
        close(self._unit)
        self._unit.error = None

    def _close_body(self) -> None:
        """Call the app's ``close``, and settle what it does as a transaction of its own."""
        close_body = getattr(self._body, "close", None)
        try:
            if close_body is not None:
                token = innermost.set(self._unit)
                try:
                    close_body()
                finally:
                    innermost.reset(token)
        except BaseException as error:
            self._settle_late(error)
            raise
        self._settle_late()

    def _settle_late(self, error: BaseException | None = None) -> None:
        unit = self._unit
        if unit.has_session and not settle_if_idle(unit):
            complete = self._complete
            self._settle_by(Outcome(None, error, unit.method, interrupted=not complete, background=complete))

    def _pass_on_start(self) -> Callable[[bytes], object]:
        """Settle, and only then call the server's ``start_response``."""
        if self._started is None:
            raise AssertionError("The app sent its body before it called start_response().")
        status, self._headers = self._started[:2]
        self._status = int(status.split(" ", 1)[0])
        if self._status >= 400:
            error_received(self._unit, self._status)
        self._settle()
        self._server_write = self._start_response(*self._started) or no_write
        return self._server_write

    def _about_to_send(self, chunk: bytes | None) -> None:
        """Settle what the body has done if ``chunk`` completes it; None stands for its end."""
        if self._failure is not None:
            raise self._failure
        unit = self._unit
        settles = unit.has_session and unit.active and not self._complete
        if chunk:
            self._sent_bytes += len(chunk)
        if settles and (chunk is None or self._sent_bytes >= self._content_length):
            self._settle()
        self._ended = self._ended or chunk is None

    @property
    def _complete(self) -> bool:
        """True once the server has all bytes; some servers never ask for more than ``Content-Length`` announces.

        If it announces none, a server may not even have sent the status before the body ends.
        """
        return self._failure is None and (self._ended or 0 < self._content_length <= self._sent_bytes)

    @cached_property
    def _content_length(self) -> float:
        for name, value in self._headers:
            if name.lower() == "content-length" and value.isdecimal():
                return int(value)
        return math.inf

    def _settle(self) -> None:
        """Settle by the status; an earlier failure that the app has caught is raised again."""
        if self._failure is not None:
            raise self._failure
        unit = self._unit
        if settle_if_idle(unit):
            return
        try:
            self._settle_by(Outcome.of_response(self._status, unit.error, unit.method))
        except BaseException as error:
            self._failure = error
            raise

    def _settle_by(self, outcome: Outcome) -> None:
        settle(self._unit, outcome)

    def _fail(self, error: BaseException) -> None:
        """Roll back; if something is durable already, the client gets a success that is cut short, and not an error."""
        unit = self._unit
        try:
            self._settle_by(Outcome.raised(error, method=unit.method))
        finally:
            if unit.saved and self._started is not None and not self._sent_bytes:
                if (status := int(self._started[0].split(" ", 1)[0])) >= 400:
                    error_received(unit, status)
                server_write = self._server_write or self._start_response(*self._started) or no_write
                server_write(b"")
            elif unit.saved and not self._sent_bytes:
                error_received(unit, None)


class MountedResponse(Response):
    """The response of an app that is mounted in an ASGI app, whose unit of work it settles and does not close.

    The app runs in a thread, beside the layers of the ASGI app, which must not settle its work meanwhile.  Nor does it
    settle theirs, which a middleware may begin once the response has begun.
    """

    def run(self, app: WSGIApplication, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the app, and settle if it has called ``start_response`` by then."""
        self._unit.lent = True
        self._unit.lent_at = depth.get()
        return super().run(app, environ)

    def __next__(self) -> bytes:
        try:
            return super().__next__()
        except BaseException as error:
            self._unit.cut_short = not isinstance(error, StopIteration)
            self._unit.lent = False  # Starlette's WSGIMiddleware never calls close()
            raise

    def close(self) -> None:
        """Roll back if the response was not completed, and call the app's ``close``."""
        self._unit.lent = True
        super().close()

    def _settle(self) -> None:
        super()._settle()
        self._unit.return_permit()  # a long stream must not keep it from other requests

    def _settle_by(self, outcome: Outcome) -> None:
        if self._unit.at_work_in_thread:
            super()._settle_by(outcome)

    def _end(self) -> None:
        self._unit.return_permit()
        self._unit.lent = False


def no_write(data: bytes) -> None:
    """Stands for the ``write`` that ``start_response`` should return by PEP 3333; Granian's returns None."""
    if data:
        raise TypeError("This server has no write(): its start_response() returned None. Return the body instead.")
