"""The adapter for any WSGI app: one middleware, which may be applied more than once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import ref

from .access import HasDatabase, check_middleware
from .async_access import AsyncAccess
from .current import innermost
from .exceptions import ConfigurationError
from .policy import Outcome, Policy
from .scope import SessionScope

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["SessionScopeMiddleware"]

KEY = "session_plugin.scopes"


class SessionScopeMiddleware:
    """Gives every request a unit of work on ``database``; the outermost of several does."""

    def __init__(
        self,
        app: WSGIApplication,
        database: HasDatabase,
        *,
        find_policy: Callable[[], Policy | None] | None = None,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: any WSGI app.
            database: a `Database`, or what answers for one.
            find_policy: answers the policy of the endpoint, if there is one.

        Raises:
            ConfigurationError: one of them is something else.
        """
        check_middleware(app, database, find_policy)
        if isinstance(database, AsyncAccess):
            raise ConfigurationError(
                "WSGI cannot await an async database. Use Database, or session_plugin.asgi.SessionScopeMiddleware."
            )
        self.app = app
        self._access = database
        self._find_policy = find_policy

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        scopes: dict[Any, ref[SessionScope[Any]]] = environ.setdefault(KEY, {})
        database = self._access.database
        outer = scopes[database]() if database in scopes else None
        if outer is not None and not outer.closed:
            outer.find_policy = self._find_policy or outer.find_policy
            return self.app(environ, start_response)
        method = environ["REQUEST_METHOD"]
        origin = f"{method} {environ.get('PATH_INFO', '')}"
        scope = SessionScope(database, origin=origin, method=method, find_policy=self._find_policy)
        scopes[database] = ref(scope)
        return Response(scope, start_response).answer(self.app, environ)


def scopes_of(environ: WSGIEnvironment) -> list[SessionScope[Any]]:
    """The open scopes of a request, that of the innermost middleware first.

    An environ may outlive its request, with a stream that was never closed, and keeps no scope alive.
    """
    scopes: dict[Any, ref[SessionScope[Any]]] = environ.get(KEY, {})
    return [scope for found in reversed(scopes.values()) if (scope := found()) is not None and not scope.closed]


class Response:
    """The iterable that the server gets: it settles before the first byte and before the last."""

    _headers: Sequence[tuple[str, str]] = ()
    _chunks: Iterator[bytes] = iter(())

    def __init__(self, scope: SessionScope[Any], start_response: StartResponse) -> None:
        self._scope = scope
        self._start_response: Callable[..., Callable[[bytes], object] | None] = start_response
        self._started: tuple[Any, ...] | None = None
        self._server_write: Callable[[bytes], object] | None = None
        self._status: int | None = None
        self._sent_bytes = 0
        self._ended = False
        self._failure: BaseException | None = None
        self._body: Iterable[bytes] = ()

    def answer(self, app: WSGIApplication, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the app and settle, if it has named a status by then."""
        outside = innermost.set(self._scope)
        try:
            try:
                self._body = app(environ, self.start)
                self._chunks = iter(self._body)
                if self._started is not None and self._server_write is None:
                    self._pass_on_start()
            finally:
                innermost.reset(outside)
        except BaseException as error:
            try:
                self._fail(error)
            finally:
                self.close()
            raise
        file_wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(file_wrapper, type) and isinstance(self._body, file_wrapper):
            self._scope.close()
            return self._body  # the server sends it by sendfile(2), if it sees that it may
        return self

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """The app's ``start_response``: noted, and passed on once what it says is true.

        With ``exc_info`` it takes back what was said before, unless that is already durable: then,
        as PEP 3333 asks of a server that has sent the headers, the exception is raised.
        """
        if exc_info is None:
            if self._started is not None:
                raise AssertionError("start_response() was called a second time, and without exc_info.")
            self._started = (status, headers)
            return self.write
        if self._sent_bytes or (self._server_write is not None and self._scope.saved):
            raise exc_info[1].with_traceback(exc_info[2])
        self._started = (status, headers, exc_info)
        self._scope.error = exc_info[1]
        self._failure = self._server_write = None
        vars(self).pop("_content_length", None)
        return self.write

    def write(self, data: bytes) -> None:
        """The app's ``write``, which PEP 3333 keeps for old apps."""
        server_write = self._server_write or self._pass_on_start()
        self._about_to_send(data)
        server_write(data)

    def __iter__(self) -> Response:
        return self

    def __next__(self) -> bytes:
        outside = innermost.set(self._scope)
        try:
            try:
                chunk = next(self._chunks, None)
                if self._server_write is None:
                    self._pass_on_start()
                self._about_to_send(chunk)
            finally:
                innermost.reset(outside)
        except BaseException as error:
            self._fail(error)
            raise
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Give up a response that was cut short, do what the app does at the end, and close the scope."""
        scope = self._scope
        try:
            try:
                if not (scope.settle_idle() or self._complete):
                    scope.settle(Outcome(self._status, scope.error, scope.method, interrupted=True))
            finally:
                self._close_body()
        finally:
            scope.close()
            self._started = self._failure = scope.error = None  # PEP 3333: no cycle through a traceback

    def _close_body(self) -> None:
        """Do what the app does after the response, and settle it as a transaction of its own."""
        close = getattr(self._body, "close", None)
        try:
            if close is not None:
                outside = innermost.set(self._scope)
                try:
                    close()
                finally:
                    innermost.reset(outside)
        except BaseException as error:
            self._settle_late(error)
            raise
        self._settle_late()

    def _settle_late(self, error: BaseException | None = None) -> None:
        scope = self._scope
        if scope.has_session and not scope.settle_idle():
            complete = self._complete
            scope.settle(Outcome(None, error, scope.method, interrupted=not complete, background=complete))

    def _pass_on_start(self) -> Callable[[bytes], object]:
        """Settle, and only then tell the server what the app has told."""
        if self._started is None:
            raise AssertionError("The app sent its body before it called start_response().")
        status, self._headers = self._started[:2]
        self._status = int(status.split(" ", 1)[0])
        self._settle()
        self._server_write = self._start_response(*self._started) or no_write
        return self._server_write

    def _about_to_send(self, chunk: bytes | None) -> None:
        """Settle what the body did so far if ``chunk`` completes it; None is its end."""
        if self._failure is not None:
            raise self._failure
        scope = self._scope
        settles = scope.has_session and scope.active and not self._complete
        if chunk:
            self._sent_bytes += len(chunk)
        if settles and (chunk is None or self._sent_bytes >= self._content_length):
            self._settle()
        self._ended = self._ended or chunk is None

    @property
    def _complete(self) -> bool:
        """True once the server has all bytes; some never ask for what follows those that were announced.

        Where none were, it may not have sent even the status before it hears of the end.
        """
        return self._failure is None and (self._ended or 0 < self._content_length <= self._sent_bytes)

    @cached_property
    def _content_length(self) -> float:
        for name, value in self._headers:
            if name.lower() == "content-length" and value.isdecimal():
                return int(value)
        return math.inf

    def _settle(self) -> None:
        """Settle as the status says; a refusal that the app swallowed is told again."""
        if self._failure is not None:
            raise self._failure
        scope = self._scope
        if scope.settle_idle():
            return
        try:
            scope.settle(Outcome.answered(self._status, scope.error, scope.method))
        except BaseException as error:
            self._failure = error
            raise

    def _fail(self, error: BaseException) -> None:
        """Roll back; if something is durable already, the client gets a cut success and not an error."""
        scope = self._scope
        try:
            scope.settle(Outcome.raised(error, method=scope.method))
        finally:
            if scope.saved and self._started is not None and not self._sent_bytes:
                server_write = self._server_write or self._start_response(*self._started) or no_write
                server_write(b"")


def no_write(data: bytes) -> None:
    """Stands for the ``write`` that PEP 3333 asks of ``start_response``; Granian's returns None."""
    if data:
        raise TypeError("This server offers no write(): its start_response() returned None. Return the body instead.")
