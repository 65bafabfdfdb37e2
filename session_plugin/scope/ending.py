"""How adapters end a unit of work; `lifecycle` has the order, and here its steps are run.

Most requests leave nothing to end: ``settle_if_idle()`` and ``close_if_idle()`` see to these without an
`Outcome`, a generator or a thread.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..policy import Outcome
from . import lifecycle
from .begin_blocks import leave_blocks
from .joined import note_settled
from .log import logger
from .release import has_something_to_release, return_permit
from .release import release as release_steps
from .runner import Steps, arun, run, uncancelled
from .session import runs_listeners
from .threads import in_anyio_thread, in_thread
from .unit_of_work import UnitOfWork


def settle_if_idle(unit: UnitOfWork[Any]) -> bool:
    """Settle and return True if there is nothing to end: no transaction, no hook that waits, no claim to check."""
    if unit.in_transaction or (unit.has_session and (unit.hooks.waiting or unit.transaction.unknown)):
        return False
    unit.settled = True
    if unit.was_joined:
        note_settled(unit.joined_blocks)
    if unit.last_begun is not None:
        leave_blocks(unit, lost=True)
    if unit.permit is not None or unit.place is not None:
        unit.return_permit()
    return True


def settle(unit: UnitOfWork[Any], outcome: Outcome) -> None:
    """End the transaction of a sync session; see `lifecycle.settle`."""
    if not settle_if_idle(unit):
        run(lifecycle.settle(unit, outcome))


async def asettle(unit: UnitOfWork[Any], outcome: Outcome) -> None:
    """End the transaction; that of a sync session in a worker thread, unless it sends nothing to the database."""
    if settle_if_idle(unit):
        return
    unit.settled = True
    try:
        await _arun(unit, lifecycle.settle(unit, outcome), sends=_may_send(unit) or unit.wrote)
    finally:
        unit.return_permit()


def release(unit: UnitOfWork[Any]) -> None:
    """Give the connection of a sync session back in the middle of its unit of work; see `release.release`."""
    if has_something_to_release(unit):
        try:
            run(release_steps(unit))
        finally:
            return_permit(unit)


async def arelease(unit: UnitOfWork[Any]) -> None:
    """Give the connection of an async session back in the middle of its unit of work; see `release.release`."""
    if has_something_to_release(unit):
        await uncancelled(arun(release_steps(unit)))


def close_if_idle(unit: UnitOfWork[Any]) -> bool:
    """Close and return True if there is nothing to end: then the session, if any, sends nothing."""
    unit.closed = True  # first: no other thread begins from here on
    if unit._session is not None:
        if unit.in_transaction or unit.database.closes_itself:
            return False
        if unit.has_begun:
            unit.sync_session.close()
        _release(unit)
    elif unit.permit is not None or unit.place is not None:
        unit.return_permit()
    return True


def close(unit: UnitOfWork[Any]) -> None:
    """End the unit of work of a sync session; see `lifecycle.close`."""
    if close_if_idle(unit):
        return
    try:
        run(lifecycle.close(unit))
    finally:
        _release(unit)


async def aclose(unit: UnitOfWork[Any]) -> None:
    """End the unit of work; that of a sync session in a worker thread, unless it holds no connection."""
    if close_if_idle(unit):
        return
    try:
        await _arun(unit, lifecycle.close(unit), sends=_may_send(unit))
    finally:
        _release(unit)


def error_received(unit: UnitOfWork[Any], status: int | None) -> None:
    """Warn if a success was committed, and the client receives an error all the same.

    Args:
        unit: the unit of work of the request.
        status: what the outermost layer sends, of 400 or more; None if it sends no response.
    """
    committed, unit.saved_status = unit.saved_status, None  # one line for each request
    if committed is not None and committed < 400:
        logger.warning(
            "%s: its work was committed under status %d, and the client receives %s. A middleware or an exception "
            "replaced the response after the COMMIT. If such a response must save nothing, decide that before: move "
            "the middleware inside, or call db.doom() or choose a policy in the endpoint. If it is meant to be saved, "
            "call commit() there.",
            str(unit),
            committed,
            "status 500 of the server, or nothing" if status is None else f"status {status}",
        )


def _release(unit: UnitOfWork[Any]) -> None:
    unit.return_permit()
    unit.forget_session()


def _may_send(unit: UnitOfWork[Any]) -> bool:
    """Return True if the session holds a connection, or if another thread or task is taking one for it."""
    return unit.transaction.connected or not unit.sync_session.is_active


async def _arun(unit: UnitOfWork[Any], steps: Steps[None], *, sends: bool) -> None:
    """Run ``steps`` to their end; ``sends`` is True if they send something to the database.

    Where hooks or listeners of the user run in them, the thread is one in which ``anyio.from_thread`` works.
    """
    is_async = unit.database.is_async
    runs_code = bool(unit.hooks.waiting) or (not is_async and runs_listeners(unit.sync_session))
    if not (sends or runs_code):
        await arun(steps)
    elif is_async:
        unit.transaction.end_in_another_task()
        await uncancelled(arun(steps))
    else:
        ready = unit.transaction.connected or unit.permit is not None
        thread = in_anyio_thread if runs_code else in_thread
        await uncancelled(thread(partial(run, steps), can_wait=not ready))
