"""The inner layer in Flask: settles inside the request context, so that the app's own handlers answer.

Success is never inferred from a teardown: a handled exception does not reach it, and by then the
response has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, has_request_context
from werkzeug.exceptions import HTTPException

from ..policy import Outcome, response_status
from ..scope import SessionScope, find_scope

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


@response_status.register
def _(error: HTTPException) -> int | None:
    return error.code if error.response is None else error.response.status_code


class SettlingMiddleware:
    """Wraps ``app.wsgi_app``, and sees every exception that the app handles."""

    def __init__(self, app: Flask, access: Any) -> None:
        self._app = app
        self._wsgi_app = app.wsgi_app
        self._access = access
        app.handle_user_exception = self._seen(app.handle_user_exception)  # type: ignore[method-assign, assignment]
        app.handle_exception = self._seen(app.handle_exception)  # type: ignore[method-assign, assignment]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        scope = self._scope()
        if scope is None:
            return self._wsgi_app(environ, start_response)
        answer: Iterable[bytes] | None = None

        def settle_and_start(status: str, headers: Any, exc_info: Any = None) -> Any:
            nonlocal answer
            try:
                scope.settle(Outcome(int(status.split(" ", 1)[0]), scope.error, scope.method))
            except Exception as error:
                if not has_request_context():
                    raise
                answer = self._answer(error)(environ, start_response)
                return None
            return start_response(status, headers, exc_info) if exc_info else start_response(status, headers)

        body = self._wsgi_app(environ, settle_and_start)
        if answer is None:
            return body
        if (close := getattr(body, "close", None)) is not None:
            close()
        return answer

    def _scope(self) -> SessionScope[Any] | None:
        return find_scope(self._access.database)

    def _answer(self, error: Exception) -> Response:
        """What the app itself would have answered, had the view raised ``error``."""
        app = self._app
        try:
            return app.process_response(app.make_response(app.handle_user_exception(error)))
        except Exception as unhandled:
            return app.handle_exception(unhandled)

    def _seen(self, handle: Callable[[Exception], Any]) -> Callable[[Exception], Any]:
        """``handle``, but the scope has rolled back by the time it runs, so that handlers can query."""

        @wraps(handle)
        def seen(error: Exception) -> Any:
            scope = self._scope()
            outcome = Outcome.raised(error)
            if scope is not None and outcome.error is not None:
                scope.error = error
                scope.settle(outcome)
            return handle(error)

        return seen
