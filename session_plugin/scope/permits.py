"""Permits to take a connection, for sync sessions under an event loop; see `engines.semaphore`."""

from __future__ import annotations

import asyncio
from typing import Any

from ..exceptions import ScopeClosedError
from .unit_of_work import UnitOfWork


async def wait_for_permit(unit: UnitOfWork[Any]) -> None:
    """Wait, without a thread, until ``unit`` may take a connection; it is about to be used in a thread."""
    if unit.permit is not None or not unit.can_be_joined:
        return
    permit = await unit.database.semaphore.acquire()
    if permit is not None and (unit.permit is not None or not unit.can_be_joined):
        permit()  # two calls have waited at once, or the unit of work has ended
    else:
        unit.permit = permit


def take_permit(unit: UnitOfWork[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Wait in this thread until ``unit`` may take a connection, which it is about to do without `wait_for_permit`.

    A ``session_scope(new=True)`` inside a request waits like the request would, unless that one has a
    permit already: then it takes the connection that it gets from the pool, beside the request's.
    """
    if _has_permit_around(unit):
        return
    unit.permit = unit.database.semaphore.acquire_in_thread(loop)
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
