"""The inner layer in Flask: settles inside the request context, so that the app's own handlers answer.

Success is never inferred from a teardown: a handled exception does not reach it, and by then the
response has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, current_app, has_app_context, has_request_context, request
from werkzeug.exceptions import HTTPException

from ..current import is_session_open
from ..policy import Outcome, response_status
from ..scope import SessionScope
from ..wsgi import scopes_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from ._plugin import SessionPlugin


@response_status.register
def _(error: HTTPException) -> int | None:
    return error.code if error.response is None else error.response.status_code


class SettlingMiddleware:
    """Wraps ``app.wsgi_app``, and sees every exception that the app handles.

    There is one for all plugins of an app, so that it settles all of them inside the request context.
    """

    def __init__(self, app: Flask, plugins: Iterable[SessionPlugin[Any]]) -> None:
        self._app = app
        self._wsgi_app = app.wsgi_app
        self._plugins = plugins
        app.finalize_request = self._settling(app.finalize_request)  # type: ignore[method-assign]
        app.handle_user_exception = self._seen(app.handle_user_exception)  # type: ignore[method-assign, assignment]
        app.handle_exception = self._seen(app.handle_exception)  # type: ignore[method-assign, assignment]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        if has_app_context():
            for plugin in self._plugins:
                plugin.request_begins()
        scopes = scopes_of(environ)
        for scope in scopes:
            scope.error = None  # an outer scope may have seen another app's, whose answer nobody reads
        answer: Iterable[bytes] | None = None

        def settle_and_start(status: str, headers: Any, exc_info: Any = None) -> Any:
            nonlocal answer
            try:
                for scope in scopes:
                    if not scope.settle_idle():
                        scope.settle(Outcome.answered(int(status.split(" ", 1)[0]), scope.error, scope.method))
            except Exception as error:
                if not has_request_context():
                    raise
                for scope in scopes:
                    scope.error = error
                answer = _answer(error)(environ, start_response)
                return _discard
            return start_response(status, headers, exc_info)

        body = self._wsgi_app(environ, settle_and_start)
        if answer is None:
            return body
        if (close := getattr(body, "close", None)) is not None:
            close()
        return answer

    def _settling(self, finalize: Callable[..., Response]) -> Callable[..., Response]:
        """``finalize``, and then the end of the transaction: no middleware around the app is told of an answer that a
        failed commit takes back.
        """

        @wraps(finalize)
        def settling(*args: Any, **kwargs: Any) -> Response:
            response = finalize(*args, **kwargs)
            if not is_session_open():
                return response
            scopes = self._scopes()
            try:
                for scope in scopes:
                    if not scope.settle_idle():
                        scope.settle(Outcome.answered(response.status_code, scope.error, scope.method))
            except Exception as error:
                for scope in scopes:
                    scope.error = error
                try:
                    return self._app.process_response(self._app.make_response(self._app.handle_user_exception(error)))
                finally:
                    response.close()
            return response

        return settling

    def _scopes(self) -> list[SessionScope[Any]]:
        """Those of the current request, whatever opened them."""
        return scopes_of(request._get_current_object().environ) if has_request_context() else []  # type: ignore[attr-defined]

    def _seen(self, handle: Callable[[Exception], Any]) -> Callable[[Exception], Any]:
        """``handle``, but the scopes have rolled back by the time it runs, so that handlers can query."""

        @wraps(handle)
        def seen(error: Exception) -> Any:
            if Outcome.raised(error).error is not None:
                for scope in self._scopes():
                    scope.error = error
                    scope.settle(Outcome.raised(error, method=scope.method))
            return handle(error)

        return seen


def _answer(error: Exception) -> Response:
    """What the app itself would have answered, had the view raised ``error``."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    try:
        return app.process_response(app.make_response(app.handle_user_exception(error)))
    except Exception as unhandled:
        return app.handle_exception(unhandled)


def _discard(data: bytes) -> None:
    """The ``write`` of a response that was refused."""
