"""`SettlingMiddleware`: the inner layer, inside the request context: the app's own handlers see a failed commit.

Success is never inferred from a teardown: a handled exception does not reach it, and by then the
response has been sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

from click.exceptions import Exit
from flask import Flask, Response, current_app, has_app_context, has_request_context, request
from werkzeug.exceptions import HTTPException

from ..policy import Outcome, exit_code, response_status
from ..scope.current import is_session_open
from ..scope.ending import settle, settle_if_idle
from ..scope.unit_of_work import UnitOfWork
from ..wsgi.middleware import open_units
from .late_calls import WholeBody, finished

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


@response_status.register
def _(error: HTTPException) -> int | None:
    return error.code if error.response is None else error.response.status_code


@exit_code.register
def _(error: Exit) -> object:
    return error.exit_code


class SettlingMiddleware:
    """Wraps ``app.wsgi_app``, and sees every exception that the app handles.

    There is one for all plugins of an app, so that all of them are settled inside the request context.
    """

    def __init__(self, app: Flask, before_request: Callable[[], None]) -> None:
        """Wrap ``app.wsgi_app``, and those methods of ``app`` that finish responses and handle exceptions.

        Args:
            app: a Flask app.
            before_request: called at the start of each request that comes inside an app context.
        """
        self._app = app
        self._wsgi_app = app.wsgi_app
        self._before_request = before_request
        app.finalize_request = self._settle_after(app.finalize_request)  # type: ignore[method-assign]
        app.handle_user_exception = self._settle_before(app.handle_user_exception)  # type: ignore[method-assign, assignment]
        app.handle_exception = self._settle_before(app.handle_exception)  # type: ignore[method-assign, assignment]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        if has_app_context():
            self._before_request()
        units = open_units(environ)
        for unit in units:
            unit.error = None  # an outer app may have noted one, for a response that is not sent
        error_response: Iterable[bytes] | None = None

        def settle_and_start(status: str, headers: Any, exc_info: Any = None) -> Any:
            nonlocal error_response
            try:
                _settle_all(units, int(status.split(" ", 1)[0]))
            except Exception as error:
                if not has_request_context():
                    raise
                for unit in units:
                    unit.error = error
                error_response = _handle(error)(environ, start_response)
                return _discard
            return start_response(status, headers, exc_info)

        body = self._wsgi_app(environ, settle_and_start)
        if error_response is not None:
            if (close := getattr(body, "close", None)) is not None:
                close()
            body = error_response
        return body.chunks() if isinstance(body, WholeBody) else body

    def _settle_after(self, finalize: Callable[..., Response]) -> Callable[..., Response]:
        """Wrap ``finalize_request``: no middleware around the app sees a response that a failed commit replaces."""

        @wraps(finalize)
        def finalize_and_settle(*args: Any, **kwargs: Any) -> Response:
            response = finalize(*args, **kwargs)
            if not is_session_open():
                return finished(response)
            units = _current_units()
            try:
                _settle_all(units, response.status_code)
            except Exception as error:
                for unit in units:
                    unit.error = error
                try:
                    return finished(_handled(self._app, error))
                finally:
                    response.close()
            return finished(response)

        return finalize_and_settle

    def _settle_before(self, handle: Callable[[Exception], Any]) -> Callable[[Exception], Any]:
        """Wrap a function that handles exceptions: the request has rolled back when it runs, so that it can query."""

        @wraps(handle)
        def settle_and_handle(error: Exception) -> Any:
            if Outcome.raised(error).error is not None:
                for unit in _current_units():
                    unit.error = error
                    settle(unit, Outcome.raised(error, method=unit.method))
            return handle(error)

        return settle_and_handle


def _settle_all(units: Iterable[UnitOfWork[Any]], status: int) -> None:
    for unit in units:
        if not settle_if_idle(unit):
            settle(unit, Outcome.of_response(status, unit.error, unit.method))


def _current_units() -> list[UnitOfWork[Any]]:
    """Return the units of work of the current request, whatever opened them."""
    return open_units(request._get_current_object().environ) if has_request_context() else []  # type: ignore[attr-defined]


def _handle(error: Exception) -> Response:
    """Return the response that the app would have sent if the view had raised ``error``."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
    try:
        return finished(_handled(app, error))
    except Exception as unhandled:
        return app.handle_exception(unhandled)


def _handled(app: Flask, error: Exception) -> Response:
    return app.process_response(app.make_response(app.handle_user_exception(error)))


def _discard(data: bytes) -> None:
    """The ``write`` of a response that was refused."""
