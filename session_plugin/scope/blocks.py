"""``session_scope()``: a block that is a unit of work, or joins the one around it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any

from ..exceptions import ConcurrentUseError, ScopeClosedError
from ..policy import Outcome
from .current import Entered, find
from .ending import aclose, asettle, close, settle
from .frames import first_caller
from .opening import open_unit_of_work
from .transaction_state import has_changes
from .unit_of_work import ScopeDatabase, UnitOfWork


@contextmanager
def session_scope(database: ScopeDatabase, *, new: bool) -> Generator[Any]:
    """Open a unit of work on a sync database, or join the one around it unless ``new``.

    Yields:
        its session.
    """
    outer = find(database)
    if outer is not None and outer.can_be_joined and not new:
        with joined(outer) as session:
            yield session
        return
    frame = sys._getframe(1)
    unit = open_unit_of_work(database, origin=_origin(frame))
    with Entered(unit, frame):
        try:
            yield unit.session
        except BaseException as error:
            settle(unit, Outcome.raised(error))
            raise
        else:
            settle(unit, Outcome())
        finally:
            close(unit)
    if unit.interrupt is not None:
        raise unit.interrupt


@asynccontextmanager
async def asession_scope(database: ScopeDatabase, *, new: bool) -> AsyncGenerator[Any]:
    """As `session_scope`, on an async database."""
    outer = find(database)
    if outer is not None and outer.can_be_joined and not new:
        with _joining_task(outer), joined(outer) as session:
            yield session
        return
    frame = sys._getframe(1)
    unit = open_unit_of_work(database, origin=_origin(frame))
    with Entered(unit, frame):
        try:
            yield unit.session
            _check_joining_tasks(unit)
        except BaseException as error:
            await asettle(unit, Outcome.raised(error))
            raise
        else:
            await asettle(unit, Outcome())
        finally:
            await aclose(unit)
    if unit.interrupt is not None:
        raise unit.interrupt


@contextmanager
def joined(unit: UnitOfWork[Any]) -> Generator[Any]:
    """Work inside ``unit``; an error that leaves the block dooms it."""
    try:
        session, sync_session = unit.session, unit.sync_session
        yield session
        if unit.closed and has_changes(sync_session):
            raise ScopeClosedError(unit.closed_message)
    except BaseException as error:
        if not isinstance(error, GeneratorExit) and Outcome.raised(error).error is not None:  # or left unread
            unit.doom(f"{type(error).__name__} left a session_scope() inside it")
        raise


@contextmanager
def _joining_task(unit: UnitOfWork[Any]) -> Generator[None]:
    task = asyncio.current_task()
    unit.joining_tasks.append(task)
    try:
        yield
    finally:
        unit.joining_tasks.remove(task)


def _check_joining_tasks(unit: UnitOfWork[Any]) -> None:
    """Raise `ConcurrentUseError` if another task is inside a block that joined ``unit``: half of it would commit."""
    if any(task is not asyncio.current_task() and not task.done() for task in unit.joining_tasks):
        raise ConcurrentUseError(
            "This session_scope() has ended while another task was in a block that had joined it; nothing was "
            "committed. Await the task before the block ends, or open a session_scope(new=True) in the task."
        )


def _origin(frame: FrameType) -> str:
    """Return where the ``session_scope()`` that ``frame`` enters was opened."""
    frame = first_caller(frame)
    return f"session_scope() at {frame.f_code.co_filename}:{frame.f_lineno}"
