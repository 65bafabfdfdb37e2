"""Which units of work are open around the running code, the innermost first.

``db.session`` and a joining ``session_scope()`` mean the innermost one whose block is really around the code
that asks.  A context variable shows those that a request or a block has opened, to tasks and threads that
copy the context too.  It would also show a consumer the block of its generator, so a block that a generator
holds (`frames`) is found by the stack instead:

    =============================================  ==============================================================
    the block of ``session_scope()`` is in         it is around
    =============================================  ==============================================================
    a function or coroutine, also by an ExitStack  the block; tasks and threads that inherit its context
    a generator or async generator: a reader, an   what runs inside the generator itself, in whatever thread or
    iterator of a response, a provider of a DI     task; never its consumer, whether it goes on, is kept or is
    container                                      abandoned; no task or thread that was started inside it
    the user's own ``@contextmanager`` or          the generator itself, and one to which it delegates by ``yield
    ``@asynccontextmanager``, or a decorator made  from``; the body of the ``with``, also by an ExitStack of that
    of one                                         function; tasks and threads that inherit its context
    the same, entered by a function that returns   the generator itself
    before it leaves: FastAPI's ``yield``
    dependencies, svcs
    a ``yield`` fixture of pytest, a context that  the fixture, and the tests that use it
    a test case of unittest enters
    a sync generator whose steps run in a copied   the generator itself
    context each: StreamingResponse, dependencies
    =============================================  ==============================================================

A task that was started inside a generator's block counts as started by the consumer: the context does not
tell one from the other, and the consumer's tasks must not use the generator's session.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any
from weakref import ref

from .frames import find_holder, stack
from .unit_of_work import ScopeDatabase, UnitOfWork

depth: ContextVar[int] = ContextVar("session_plugin_depth", default=0)
"""How many nested middlewares the running code is inside; adapters whose middlewares run side by side count them.

Only the context distinguishes code of a middleware that passes a message on from a task of the app beside it.
"""

innermost: ContextVar[UnitOfWork[Any] | None] = ContextVar("session_plugin_scope", default=None)
"""The unit of work that was entered last, closed or not, of those that the context shows."""

held: dict[int, list[ref[UnitOfWork[Any]]]] = {}
"""The units of work whose blocks a generator holds, by the `id` of its frame, the innermost last.

A generator that is never closed, or its event loop, must not keep them: they are in a cycle with its frame.
"""


def find_open() -> UnitOfWork[Any] | None:
    """Return the innermost unit of work that is not closed, or None."""
    found = find(None)
    return None if found is None or found.closed else found


def find(database: ScopeDatabase | None) -> UnitOfWork[Any] | None:
    """Return the unit of work on ``database``, or on any if it is None, that the running code is inside, or None.

    A closed one, which a generator or a task has inherited, is found only if none further out is open.
    """
    found: UnitOfWork[Any] | None = None
    unit = innermost.get()
    while unit is not None:
        if (database is None or unit.database is database) and (unit.holder is None or unit.holder.is_around()):
            found = found or unit
            if not unit.closed:
                found = unit
                break
        unit = unit.inherited
    return _nearer(found, database) if held else found


def _nearer(found: UnitOfWork[Any] | None, database: ScopeDatabase | None) -> UnitOfWork[Any] | None:
    """Return ``found``, or the unit of work that the nearest generator on the stack holds, if that is further in."""
    for frame in stack():
        for holds in reversed(held.get(id(frame), ())):
            unit = holds()
            if unit is not None and not unit.closed and (database is None or unit.database is database):
                return found if found is not None and _is_inside(found, unit) else unit
    return found


def _is_inside(unit: UnitOfWork[Any], other: UnitOfWork[Any]) -> bool:
    around: UnitOfWork[Any] | None = None if unit.closed else unit
    while around is not None and around is not other:
        around = around.outer
    return around is other


def is_inside(unit: UnitOfWork[Any]) -> bool:
    """Return True if the running code is inside ``unit``."""
    around = innermost.get()
    while around is not None and around is not unit:
        around = around.outer
    return around is not None


def units_around() -> list[UnitOfWork[Any]]:
    """Return the open units of work that the running code is inside, with those in which they were opened."""
    found = [innermost.get(), find(None)]
    around: list[UnitOfWork[Any]] = []
    while found:
        unit = found.pop()
        if unit is None or unit in around:
            continue
        if not unit.closed and (unit.holder is None or unit.holder.is_around()):
            around.append(unit)
        found += (unit.inherited, unit.outer)
    return around


def is_session_open() -> bool:
    """Return True if a unit of work that the running code is inside has a session."""
    unit = innermost.get()
    while unit is not None:
        if unit.has_session:
            return True
        unit = unit.inherited
    return False


def entered_databases() -> Iterator[ScopeDatabase]:
    """Yield the databases whose units of work the running code is inside, the innermost first."""
    unit = find(None)
    if unit is not None:
        yield unit.database
    unit = innermost.get()
    while unit is not None:
        yield unit.database
        unit = unit.inherited


def entered_units() -> list[UnitOfWork[Any]]:
    """Return all units of work that the context shows or a generator holds, with those in which they were opened."""
    found = [innermost.get(), *(holds() for several in list(held.values()) for holds in several)]
    entered: list[UnitOfWork[Any]] = []
    while found:
        unit = found.pop()
        if unit is not None and unit not in entered:
            entered.append(unit)
            found += (unit.inherited, unit.outer)
    return entered


class Entered:
    """A block in which ``unit`` is the innermost unit of work.

    Blocks may be left in another order, and in another context, than they were entered: a generator ends
    whenever its consumer likes.
    """

    __slots__ = ("_frame", "_unit")

    def __init__(self, unit: UnitOfWork[Any], frame: FrameType | None = None) -> None:
        """Prepare to enter ``unit``, whose block is entered by ``frame``."""
        self._unit = unit
        self._frame = frame

    def __enter__(self) -> None:
        unit = self._unit
        unit.holder = holder = find_holder(self._frame)
        self._frame = None
        if holder is not None:
            for frame in holder.generators:
                held.setdefault(id(frame), []).append(ref(unit, partial(_forget, id(frame))))
        if holder is None or holder.is_inherited:
            innermost.set(unit)

    def __exit__(self, *exc_info: object) -> None:
        unit = self._unit
        holder, unit.holder = unit.holder, None
        if holder is not None:
            for frame in holder.generators:
                _forget(id(frame), ref(unit))
        leave(unit)


def _forget(frame: int, left: ref[UnitOfWork[Any]]) -> None:
    """Forget that the generator of ``frame`` holds the block that was left, or whose unit of work is no more."""
    if remaining := [holds for holds in held.get(frame, ()) if holds is not left and holds != left]:
        held[frame] = remaining
    else:
        held.pop(frame, None)


def leave(unit: UnitOfWork[Any]) -> None:
    """Make the unit of work before ``unit`` the innermost one again, if no other was entered since."""
    if innermost.get() is unit:
        before = unit.inherited
        while before is not None and before.closed:
            before = before.inherited
        innermost.set(before)
