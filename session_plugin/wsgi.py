"""The adapter for any WSGI app: one middleware, which may be applied more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .access import HasDatabase
from .policy import Outcome, Policy
from .scope import SessionScope

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["SessionScopeMiddleware"]

KEY = "session_plugin"


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
        """
        self.app = app
        self._access = database
        self._find_policy = find_policy

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        databases: set[Any] = environ.setdefault(KEY, set())
        database = self._access.database
        if database in databases:
            return self.app(environ, start_response)
        databases.add(database)
        method = environ["REQUEST_METHOD"]
        scope: SessionScope[Any] = SessionScope(
            database,
            origin=f"{method} {environ.get('PATH_INFO', '')}",
            method=method,
            find_policy=self._find_policy,
        )
        return Response(scope, start_response).answer(self.app, environ)


class Response:
    """The iterable that the server gets: it settles before the first byte and before the last."""

    def __init__(self, scope: SessionScope[Any], start_response: StartResponse) -> None:
        self._scope = scope
        self._start_response = start_response
        self._started: tuple[Any, ...] | None = None
        self._server_write: Callable[[bytes], object] | None = None
        self._status: int | None = None
        self._left_to_send: int | None = None
        self._complete = False
        self._failure: BaseException | None = None
        self._body: Iterable[bytes] = ()
        self._chunks: Iterator[bytes] = iter(())

    def answer(self, app: WSGIApplication, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the app and settle, if it has named a status by then."""
        try:
            with self._scope.entered():
                self._body = app(environ, self.start)
                self._chunks = iter(self._body)
                self._pass_on_start()
        except BaseException as error:
            self._settle(error)
            self.close()
            raise
        file_wrapper = environ.get("wsgi.file_wrapper")
        if isinstance(file_wrapper, type) and isinstance(self._body, file_wrapper):
            self._scope.close()
            return self._body  # the server sends it by sendfile(2), if it sees that it may
        return self

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        """The app's ``start_response``: noted, and passed on once what it says is true."""
        if self._server_write is not None:
            self._server_write = self._start_response(status, headers, exc_info)
        self._started = (status, headers, exc_info) if exc_info else (status, headers)
        return self.write

    def write(self, data: bytes) -> None:
        """The app's ``write``, which PEP 3333 keeps for old apps."""
        self._pass_on_start()
        if self._server_write is not None:
            self._server_write(data)

    def __iter__(self) -> Response:
        return self

    def __next__(self) -> bytes:
        try:
            with self._scope.entered():
                chunk = next(self._chunks)
                self._pass_on_start()
        except StopIteration:
            self._pass_on_start()
            self._last_byte_is_next()
            raise
        except BaseException as error:
            self._settle(error)
            raise
        if self._left_to_send is not None:
            self._left_to_send -= len(chunk)
            if self._left_to_send <= 0:
                self._last_byte_is_next()
        return chunk

    def close(self) -> None:
        """Give up a response that was cut short, do what the app does at the end, and close the scope."""
        scope = self._scope
        try:
            if not self._complete:
                scope.settle(Outcome(self._status, scope.error, scope.method, interrupted=True))
            with scope.entered():
                close = getattr(self._body, "close", None)
                if close is not None:
                    close()
            scope.settle(Outcome(error=self._failure, method=scope.method))
        finally:
            scope.close()

    def _pass_on_start(self) -> None:
        if self._started is None or self._server_write is not None:
            return
        status, headers = self._started[:2]
        self._status = int(status.split(" ", 1)[0])
        scope = self._scope
        scope.settle(Outcome(self._status, scope.error, scope.method))
        length = next((value for name, value in headers if name.lower() == "content-length"), None)
        self._left_to_send = None if length is None else int(length)
        self._server_write = self._start_response(*self._started)

    def _last_byte_is_next(self) -> None:
        if not self._complete:
            scope = self._scope
            scope.settle(Outcome(self._status, scope.error, scope.method))
            self._complete = True

    def _settle(self, error: BaseException) -> None:
        outcome = Outcome.raised(error, method=self._scope.method)
        self._failure = self._scope.error = outcome.error
        self._scope.settle(outcome)
