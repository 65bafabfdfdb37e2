"""Permits to take a connection, for sync sessions under an event loop; see `engines.semaphore`.

A request that asks for a session takes a place among those that are pending (`wait_for_place`), and no
permit.  The thread that uses the session first waits for the permit (`take_permit`).  An ``async def``
endpoint could only wait on the event loop itself, so it waits for the permit beforehand (`wait_for_permit`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from ..exceptions import ScopeClosedError
from .unit_of_work import UnitOfWork

LOAN_SECONDS = 0.02
"""How long a permit that was waited for beforehand may stay unused; then it is given back for those who wait."""


async def wait_for_place(unit: UnitOfWork[Any]) -> None:
    """Wait, without a thread, until ``unit`` has a place among the sessions that are pending."""
    if unit.permit is not None or unit.place is not None or unit.in_transaction or not unit.can_be_joined:
        return
    pending = unit.database.pending_sessions
    await pending.await_one()
    if unit.place is not None or not unit.can_be_joined:
        pending.release()  # two calls have waited at once, or the unit of work has ended
    else:
        unit.place = pending.release


async def wait_for_permit(unit: UnitOfWork[Any]) -> None:
    """Wait, without a thread, until ``unit`` may take a connection; it is about to be used on the event loop."""
    if unit.permit is not None or unit.in_transaction or not unit.can_be_joined:
        return
    permit = await unit.database.semaphore.acquire()
    if permit is not None and (unit.permit is not None or not unit.can_be_joined):
        permit()  # two calls have waited at once, or the unit of work has ended
        return
    unit.permit = permit
    if permit is not None:
        asyncio.get_running_loop().call_later(LOAN_SECONDS, _end_loan, unit)


def _end_loan(unit: UnitOfWork[Any]) -> None:
    if not unit.in_transaction and not unit.released:
        unit.return_permit()


def take_permit(unit: UnitOfWork[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Wait in this thread until ``unit`` may take a connection, which it is about to do without `wait_for_permit`.

    A ``session_scope(new=True)`` inside a request waits like the request would, unless that one has a
    permit already: then it takes the connection that it gets from the pool, beside the request's.
    """
    if _has_permit_around(unit):
        return
    database = unit.database
    permit = database.semaphore.acquire_in_thread(database.extra_threads(loop))
    unit.return_place()
    unit.permit = permit
    if unit.closed:  # meanwhile: this thread has outlived its request
        unit.return_permit()
        raise ScopeClosedError(unit.closed_message)


def _has_permit_around(unit: UnitOfWork[Any]) -> bool:
    """Return True if a unit of work around ``unit`` has a permit of the same database."""
    around = unit.outer
    while around is not None:
        if around.database is unit.database and around.permit is not None:
            return True
        around = around.outer
    return False
