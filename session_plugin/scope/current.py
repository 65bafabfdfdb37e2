"""Which units of work are open around the running code, the innermost first."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Any

from .unit_of_work import ScopeDatabase, UnitOfWork

depth: ContextVar[int] = ContextVar("session_plugin_depth", default=0)
"""How many nested middlewares the running code is inside; adapters whose middlewares run side by side count them.

Only the context distinguishes code of a middleware that passes a message on from a task of the app beside it.
"""

innermost: ContextVar[UnitOfWork[Any] | None] = ContextVar("session_plugin_scope", default=None)
"""The unit of work that was entered last, closed or not."""


def find_open() -> UnitOfWork[Any] | None:
    """Return the innermost unit of work that is not closed, or None."""
    unit = innermost.get()
    while unit is not None and unit.closed:
        unit = unit.outer
    return unit


def find(database: ScopeDatabase) -> UnitOfWork[Any] | None:
    """Return the unit of work on ``database`` that the running code is inside, or None.

    A closed one, which a generator or a task has inherited, is found only if none further out is open.
    """
    found: UnitOfWork[Any] | None = None
    unit = innermost.get()
    while unit is not None:
        if unit.database is database:
            found = found or unit
            if not unit.closed:
                return unit
        unit = unit.outer
    return found


def is_session_open() -> bool:
    """Return True if a unit of work that the running code is inside has a session."""
    unit = innermost.get()
    while unit is not None:
        if unit.has_session:
            return True
        unit = unit.outer
    return False


def entered_databases() -> Iterator[ScopeDatabase]:
    """Yield the databases whose units of work the running code is inside, the innermost first."""
    unit = innermost.get()
    while unit is not None:
        yield unit.database
        unit = unit.outer


class Entered:
    """A block in which ``unit`` is the innermost unit of work."""

    __slots__ = ("_token", "_unit")

    def __init__(self, unit: UnitOfWork[Any]) -> None:
        self._unit = unit

    def __enter__(self) -> None:
        self._token = innermost.set(self._unit)

    def __exit__(self, *exc_info: object) -> None:
        leave(self._token)


def leave(token: Token[UnitOfWork[Any] | None]) -> None:
    """Make the unit of work before ``token`` the innermost one again."""
    try:
        innermost.reset(token)
    except ValueError:
        pass  # left in another context, whose copy of the variable ends with it
