"""What a response does after it is finished: its body, and the functions that it calls when it is closed.

Each of these functions is a unit of work of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

from flask import request
from werkzeug.wrappers import Response

from ..policy import Outcome
from ..scope.current import is_inside
from ..scope.ending import settle
from ..scope.late import run_late
from ..scope.runner import run
from ..scope.unit_of_work import UnitOfWork
from ..wsgi.middleware import open_units

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

R = TypeVar("R", bound=Response)
_RUN_LATE = ("close", "get_app_iter", "iter_encoded")
"""The methods of a response that run while it is sent, or later."""


def finished(response: R) -> R:
    """Prepare what ``response`` does from now on, and return it.

    If it may run code of the app, each function that it calls when it is closed becomes a unit of work; if not, its
    body is a `WholeBody`.

    Werkzeug keeps them in a private list: its public ``call_on_close()`` only adds to that list, most have been
    added before the app finishes the response, and a subclass of ``app.response_class`` would miss the responses
    that a view makes itself.  A stream may add some later.
    """
    if response._on_close or not isinstance(response.response, list):
        response._on_close = LateCalls(list.__iter__(response._on_close), request.environ)
    elif not (response.direct_passthrough or _overrides(type(response))):  # type: ignore[arg-type]  # a class is hashable
        response.get_app_iter = partial(WholeBody, ref(response))  # type: ignore[method-assign]
    return response


@lru_cache(maxsize=64)
def _overrides(response_class: type[Response]) -> bool:
    return any(getattr(response_class, name) is not getattr(Response, name) for name in _RUN_LATE)


class WholeBody:
    """The body of a response that runs no code of the app any more, unless a teardown function adds some.

    A body that a middleware wraps is no `WholeBody` any more.
    """

    def __init__(self, response: ref[Response], environ: WSGIEnvironment) -> None:
        found = response()
        assert found is not None  # it is being sent
        self._response = found
        vars(found).pop("get_app_iter", None)  # an app may keep the response, and pickle it
        self._body: Any = found.get_app_iter(environ)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        """Close the response."""
        self._body.close()

    def chunks(self) -> Iterable[bytes]:
        """Close the response, if it calls no functions then, and return its chunks as a list; else return the body."""
        if self._response._on_close:
            return self
        chunks = list(self._body)
        self.close()
        return chunks


class LateCalls(list[Callable[[], Any]]):
    """Functions that follow the response to the request of ``environ``."""

    def __init__(self, functions: Iterable[Callable[[], Any]], environ: WSGIEnvironment) -> None:
        super().__init__(functions)
        self._environ = environ

    def __iter__(self) -> Iterator[Callable[[], Any]]:
        return (partial(self._call, function) for function in super().__iter__())

    def _call(self, function: Callable[[], Any]) -> None:
        """Call ``function`` as a unit of work on each database of the request."""
        for unit in open_units(self._environ):
            function = partial(_call_in, unit, function)
        function()


def _call_in(unit: UnitOfWork[Any], function: Callable[[], Any]) -> None:
    """Call ``function`` as a unit of work, once the server closes the response; one that is refused saves nothing."""
    if unit.interrupted is None or not is_inside(unit):
        function()
        return
    try:
        if unit.active and not unit.late_calls:  # closing the body comes first
            cut_short = unit.interrupted
            settle(unit, Outcome(None, None, unit.method, interrupted=cut_short, background=not cut_short))
    finally:
        run(run_late(unit, function, settle))
