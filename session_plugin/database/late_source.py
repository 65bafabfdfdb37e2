"""`LateSource`: a function that names the database, and may name another one later, as those of test suites do."""

from __future__ import annotations

import dis
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import URL

UNCHANGED: Any = object()
"""What `LateSource.named_anew` returns if nothing has changed; None is a change, to a database that is missing."""


class LateSource:
    """What a function names, and whether that has changed.

    It is called again for each session, so this must cost nothing and change nothing.  A function that calls
    nothing itself only looks its result up.  One that returns an object, such as an engine, is called again too
    if it returns the same object each time.  Any other one may read a file or start a server, and is called again
    only after ``dispose()``, as at the shutdown of an app.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._only_looks_up = _calls_nothing(function)
        self._named: Any = None
        self._is_followed = False

    def name(self) -> Any:
        """Return what the function names now."""
        now = self._function()
        self._named = copied(now)
        self._is_followed = self._only_looks_up or not isinstance(now, str | URL | Mapping)
        return now

    def named_anew(self, may_take_its_time: bool) -> Any:
        """Return what the function names now if that is not what it named before, else `UNCHANGED`."""
        if not (self._is_followed or may_take_its_time):
            return UNCHANGED
        now = self._function()
        if _are_same(now, self._named):
            return UNCHANGED
        if not _are_same(now, self._function()):
            self._is_followed = False  # it makes what it returns at each call, so a difference tells nothing
            return UNCHANGED
        self._named = copied(now)
        return now


def copied(value: Any) -> Any:
    """Return a copy that does not change if ``value`` is a mapping that does."""
    return {key: copied(given) for key, given in value.items()} if isinstance(value, Mapping) else value


def _are_same(one: Any, other: Any) -> bool:
    return one is other or bool(one == other)


def _calls_nothing(function: Callable[[], Any]) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and not any("CALL" in step.opname for step in dis.get_instructions(code))
