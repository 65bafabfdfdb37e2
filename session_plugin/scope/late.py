"""Callables that a framework runs after the response, in the request's session: each is a unit of work of its own.

A unit of work is settled by then, so that what a callable does is late work, in a transaction of its own.
`run_late()` ends that transaction with the callable, before the framework runs the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ..policy import Outcome
from .current import depth, innermost
from .runner import Steps
from .unit_of_work import ScopeDatabase, UnitOfWork

Settle = Callable[[UnitOfWork[Any], Outcome], Any]


def run_late(unit: UnitOfWork[Any], call: Callable[[], Any], settle: Settle) -> Steps[None]:
    """Make ``call``, and settle by its own outcome what it did with the session.

    Of calls that overlap, which share the session, the last one to end settles for all.

    Raises:
        BaseException: what ``call`` raised, or its COMMIT.
    """
    with _late_call(unit):
        try:
            yield call
        except BaseException as error:
            if unit.late_calls == 1:
                outcome = replace(Outcome.raised(error, method=unit.method), background=True)
                yield partial(settle, unit, outcome)
            raise
        if unit.late_calls == 1:
            yield partial(settle, unit, Outcome(method=unit.method, background=True))


@contextmanager
def _late_call(unit: UnitOfWork[Any]) -> Iterator[None]:
    """Count the calls that run now; the policy that one chooses, and its ``doom()``, end with it."""
    unit.late_calls += 1
    doomed, policy = unit.doomed, unit._policy
    try:
        yield
    finally:
        unit.late_calls -= 1
        if not unit.late_calls:
            unit._policy = policy
            unit.doomed = doomed
            if unit.has_session:
                unit.transaction.doom(doomed)


def late_runner(database: ScopeDatabase) -> Callable[..., Any] | None:
    """Return what runs a callable after the response to the request that the running code is inside, or None.

    Middlewares may run beside each other, and each has callables of its own, so the depth decides.
    """
    unit = innermost.get()
    while unit is not None:
        if unit.database is database and unit.late_runners is not None:
            depths = [level for level in unit.late_runners if level <= depth.get()]
            return unit.late_runners[max(depths)]() if depths else None
        unit = unit.outer
    return None
