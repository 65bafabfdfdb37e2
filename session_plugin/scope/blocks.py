"""``session_scope()``: a block that is a unit of work, or joins the one around it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, TypeGuard

from ..exceptions import ConcurrentUseError, PolicyError, ScopeClosedError, TransactionAbortedError
from ..policy import Outcome, PolicyLike, as_policy, exit_code
from .current import Entered, find
from .ending import aclose, asettle, close, settle
from .frames import first_caller
from .joined import JoinedBlock
from .opening import open_unit_of_work
from .transaction_state import current_task, has_changes
from .unit_of_work import ScopeDatabase, UnitOfWork

OPEN_ANOTHER = (
    "Await the task or thread before its unit of work ends, or open a session_scope(new=True) in what runs beside it."
)


@contextmanager
def session_scope(
    database: ScopeDatabase,
    *,
    new: bool,
    name: str | None = None,
    policy: PolicyLike | None = None,
    for_hook: bool = False,
) -> Generator[Any]:
    """Open a unit of work on a sync database, or join the one around it unless ``new``.

    No other task or thread joins that of a hook: what a hook starts goes on after its end.

    Yields:
        its session.

    Raises:
        PolicyError: it would join a unit of work under another policy.
    """
    outer = find(database)
    if not new and _joins(outer):
        _check_policy(outer, policy)
        with joined(outer) as session:
            yield session
        return
    unit = open_unit_of_work(database, origin=name or _origin(sys._getframe(1)))
    if policy is not None:
        unit.use(policy)
    if for_hook:
        unit.owner = _owner()
    with Entered(unit, sys._getframe(1)):  # in no variable: a block that is dropped would be in a cycle with it
        try:
            yield unit.session
        except BaseException as error:
            settle(unit, _outcome(unit, error))
            raise
        else:
            settle(unit, Outcome())
        finally:
            close(unit)
    if unit.interrupt is not None:
        raise unit.interrupt


@asynccontextmanager
async def asession_scope(
    database: ScopeDatabase,
    *,
    new: bool,
    name: str | None = None,
    policy: PolicyLike | None = None,
    for_hook: bool = False,
) -> AsyncGenerator[Any]:
    """As `session_scope`, on an async database."""
    outer = find(database)
    if not new and _joins(outer):
        _check_policy(outer, policy)
        with joined(outer) as session:
            yield session
        return
    unit = open_unit_of_work(database, origin=name or _origin(sys._getframe(1)))
    if policy is not None:
        unit.use(policy)
    if for_hook:
        unit.owner = _owner()
    with Entered(unit, sys._getframe(1)):  # in no variable: a block that is dropped would be in a cycle with it
        try:
            yield unit.session
            _check_joining_tasks(unit)
        except BaseException as error:
            await asettle(unit, _outcome(unit, error))
            raise
        else:
            await asettle(unit, Outcome())
        finally:
            await aclose(unit)
    if unit.interrupt is not None:
        raise unit.interrupt


@contextmanager
def joined(unit: UnitOfWork[Any]) -> Generator[Any]:
    """Work inside ``unit``; an error that leaves the block dooms it.

    Raises:
        TransactionAbortedError: ``unit`` rolled back meanwhile, from outside the block.
        ScopeClosedError: it was settled or has ended meanwhile, and what was done since is not saved.
    """
    block = JoinedBlock(current_task())
    unit.joined_blocks.append(block)
    try:
        session, sync_session = unit.session, unit.sync_session
        block.enter()
        try:
            yield session
        finally:
            is_inside = block.leave()
        if block.in_doubt and is_inside:
            raise TransactionAbortedError(
                f"The unit of work that this block had joined ({unit!r}) ended before the block did, and the outcome "
                f"of its COMMIT is unknown ({block.lost}), so what the block did may or may not be saved. "
                f"{OPEN_ANOTHER}"
            )
        if block.lost is not None and is_inside:
            raise TransactionAbortedError(
                f"The unit of work that this block had joined ({unit!r}) rolled back before the block ended "
                f"({block.lost}), so what the block did is not saved. {OPEN_ANOTHER}"
            )
        if unit.closed and has_changes(sync_session):
            raise ScopeClosedError(unit.closed_message)
        if block.outlived and is_inside and not unit.closed and unit.wrote:
            raise ScopeClosedError(
                f"The unit of work that this block had joined ({unit!r}) was settled before the block ended, and what "
                f"the block did since then is not saved. {OPEN_ANOTHER}"
            )
    except BaseException as error:
        if not isinstance(error, GeneratorExit) and _outcome(unit, error).error is not None:  # or left unread
            unit.doom(f"{type(error).__name__} left a session_scope() inside it")
        raise
    finally:
        unit.joined_blocks.remove(block)


def _outcome(unit: UnitOfWork[Any], error: BaseException) -> Outcome:
    """Return the outcome of a block that ``error`` has left: of a command that exits with code 0, a success.

    In a request nothing says that it was over: a server raises `SystemExit` in the middle of one to stop its worker.
    """
    if exit_code(error) == 0 and not unit.in_request:
        return Outcome()
    return Outcome.raised(error)


def _joins(outer: UnitOfWork[Any] | None) -> TypeGuard[UnitOfWork[Any]]:
    """Return True if a block inside ``outer`` is part of it; that of a hook is the hook's own."""
    if outer is None or not outer.can_be_joined:
        return False
    return outer.owner is None or outer.owner == _owner()


def _check_policy(outer: UnitOfWork[Any], policy: PolicyLike | None) -> None:
    """Raise `PolicyError` if a block under ``policy`` cannot be a part of ``outer``, which is under another one."""
    if policy is not None and (chosen := as_policy(policy).for_method(outer.method)) != outer.policy:
        raise PolicyError(
            f"This session_scope() under the policy {chosen.name} would join {outer!r}, which is under the policy "
            f"{outer.policy.name}. Write session_scope(new=True, policy=...), or leave the policy out."
        )


def _owner() -> object:
    return threading.get_ident(), current_task()


def _check_joining_tasks(unit: UnitOfWork[Any]) -> None:
    """Raise `ConcurrentUseError` if another task is inside a block that joined ``unit``: half of it would commit."""
    tasks = (block.task for block in unit.joined_blocks)
    if any(task is not None and task is not asyncio.current_task() and not task.done() for task in tasks):
        raise ConcurrentUseError(
            "This session_scope() has ended while another task was in a block that had joined it; nothing was "
            "committed. Await the task before the block ends, or open a session_scope(new=True) in the task."
        )


def _origin(frame: FrameType) -> str:
    """Return where the ``session_scope()`` that ``frame`` enters was opened."""
    frame = first_caller(frame)
    return f"session_scope() at {frame.f_code.co_filename}:{frame.f_lineno}"
