"""The functions that a response calls when it is closed: each is a unit of work of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

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


def separate_late_calls(response: R) -> R:
    """Make each function that ``response`` calls when it is closed a unit of work, and return ``response``.

    Werkzeug keeps them in a private list: its public ``call_on_close()`` only adds to that list, most have been
    added before the app finishes the response, and a subclass of ``app.response_class`` would miss the responses
    that a view makes itself.  A stream may add some later.
    """
    if response._on_close or not isinstance(response.response, list):
        response._on_close = LateCalls(list.__iter__(response._on_close), request.environ)
    return response


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
