"""How a unit of work ends: the whole order, on this page.

::

    settle   decide ─> close results ─> COMMIT or ROLLBACK ─> connection back ─> hooks
    close    roll back what is left ─> connection back, or discarded ─> session unusable

Each step is a generator that yields the calls to make (`runner` makes them), so that sync and async
sessions end by the same code.  Hooks run where the session reports that its transaction has ended
(`session`), so that those of an explicit ``commit()`` run too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError
from sqlalchemy.orm import Session

from ..engines.guard import POLL_INTERVAL, TWO_AT_ONCE
from ..exceptions import ConcurrentUseError, PolicyError
from ..policy import Decision, Outcome
from .begin_blocks import leave_blocks
from .joined import note_settled
from .log import log_exception, log_failed_rollback, logger
from .runner import Steps
from .transaction_state import LateConnection
from .unit_of_work import UnitOfWork

LONGEST_WAIT = 5.0
"""Seconds for which the end of a transaction waits for a connection that another thread or task is taking."""


def settle(unit: UnitOfWork[Any], outcome: Outcome) -> Steps[None]:
    """End the open transaction as the policy decides, and give the connection back.

    From its first moment on the unit of work counts as settled: work that starts now is late work, in a
    transaction of its own.  Raises what COMMIT raised, after rolling back.
    """
    unit.settled = True
    if unit.was_joined:
        note_settled(unit.joined_blocks)
    try:
        decision = _decide(unit, outcome)
        if unit.transaction.may_have_raw_writes and not unit.transaction.busy:
            yield partial(run_sync, unit, unit.transaction.ask_whether_wrote)
        discards = not decision.commit and unit.wrote and not unit.transaction.in_doubt
        _log(unit, decision, outcome, discards=discards)
        unit.discarded = unit.discarded or discards
        if unit.transaction.unknown:
            _check_claim(unit, outcome)
            if not unit.active:
                return
        if unit.transaction.open_results:
            yield partial(run_sync, unit, unit.transaction.close_results)
        if decision.commit:
            unit.transaction.saved = False  # from here on: a hook may use the session and write nothing
            yield from _commit(unit)
            if unit.transaction.saved:
                unit.saved = True
                unit.saved_status = unit.saved_status or outcome.status
    except BaseException as error:
        yield from _roll_back(unit, type(error).__name__)
        if outcome.background:
            what = "may not have been saved" if unit.transaction.unknown else "was not saved"
            logger.error("%s: the work after the response %s (%s)", str(unit), what, type(error).__name__)
        raise
    if not decision.commit:
        yield from _roll_back(unit, decision.reason)


def close(unit: UnitOfWork[Any]) -> Steps[None]:
    """Leave nothing open and nothing held."""
    try:
        if unit.sync_session.in_transaction():
            yield from _roll_back(unit, "it was closed before it was settled")
    finally:
        session: Any = unit.session
        try:
            yield session.close
        except IllegalStateChangeError:
            if unit.transaction.late is None:
                raise


def _decide(unit: UnitOfWork[Any], outcome: Outcome) -> Decision:
    if unit.doomed is not None:
        return Decision(False, f"doomed: {unit.doomed}")
    policy = unit.policy
    try:
        decision = policy.decide(outcome)
    except Exception as error:
        raise PolicyError(
            f"The policy {policy.name} raised {type(error).__name__}. Nothing was committed; correct the policy."
        ) from error
    if not isinstance(decision, Decision) or not isinstance(decision.commit, bool):
        raise PolicyError(
            f"The policy {policy.name} must return Decision(commit=True or False, reason=...), and returned an object "
            f"of type {type(decision).__name__}. Nothing was committed; correct the policy."
        )
    return decision


def _commit(unit: UnitOfWork[Any]) -> Steps[None]:
    """COMMIT, and leave what the request loaded readable for its stream and its background work.

    An exception that a session listener raises after the COMMIT, a `BaseException` too, cannot undo it, and is logged.
    """
    session = _begun_session(unit)
    transaction = session.get_transaction()
    expire_on_commit, session.expire_on_commit = session.expire_on_commit, False
    try:
        yield unit.session.commit
    except BaseException as error:
        if _is_being_connected(error):
            raise ConcurrentUseError(TWO_AT_ONCE) from error
        if isinstance(error, GeneratorExit) or transaction is None or not unit.transaction.is_committed(transaction):
            unit.transaction.note_commit_failure(error)
            raise
        log_exception("%s: a listener failed after the COMMIT", str(unit))
        if isinstance(error, KeyboardInterrupt):
            unit.interrupt = error
        if session.in_transaction():
            yield partial(run_sync, unit, transaction.close)
    finally:
        session.expire_on_commit = expire_on_commit
    if unit.last_begun is not None:
        leave_blocks(unit, lost=False)


def _roll_back(unit: UnitOfWork[Any], reason: str) -> Steps[None]:
    """ROLLBACK because of ``reason``.

    A connection on which that fails, or which another thread or task still uses, is discarded.
    If no work is discarded nothing is expired: what is not in the session meanwhile stays loaded.  Otherwise the rows
    that were not changed are restored before the hooks run; see `rows`.
    """
    session = _begun_session(unit)
    if unit.was_joined and unit.wrote:
        note_settled(unit.joined_blocks, lost=reason, in_doubt=unit.transaction.in_doubt)
    if unit.transaction.busy:
        yield partial(run_sync, unit, unit.transaction.wait_alone)
        if unit.transaction.busy:
            yield from _discard(unit)
            return
    wrote = unit.wrote
    loaded = [] if wrote else [*session]
    if loaded:
        session.expunge_all()
    unit.rolls_back = True
    try:
        while True:
            try:
                yield unit.session.rollback
                break
            except InvalidRequestError as error:
                if not _is_refused_for_now(unit, error):
                    raise
            if _waits_no_longer(unit):
                yield partial(run_sync, unit, unit.transaction.discard)
                return
            yield partial(_pause, unit)
    except Exception as error:
        log_failed_rollback(unit, error)
        loaded = []
        yield unit.session.invalidate
    finally:
        unit.rolls_back = False
    if unit.last_begun is not None:
        leave_blocks(unit, lost=wrote)
    if loaded and not unit.closed:
        transaction = session.begin()
        session.add_all(loaded)
        transaction.close()


def _is_refused_for_now(unit: UnitOfWork[Any], error: InvalidRequestError) -> bool:
    """Return True if SQLAlchemy refuses since another thread or task is taking a connection for the session."""
    if isinstance(error, IllegalStateChangeError):  # a listener misuses the session, or the other one ends its flush
        return unit.transaction.late is not None
    return _is_being_connected(error)


def _is_being_connected(error: BaseException) -> bool:
    """Return True if ``error`` says that a connection is being taken, and not that a listener misuses the session."""
    is_state_error = isinstance(error, InvalidRequestError) and error.code == "isce"
    return is_state_error and not isinstance(error, IllegalStateChangeError)


def _waits_no_longer(unit: UnitOfWork[Any]) -> bool:
    """Have the connection that is being taken refused when it arrives; return True once it has taken too long."""
    late = unit.transaction.late
    if late is None:
        unit.transaction.late = LateConnection(time.monotonic() + LONGEST_WAIT)
        return False
    if late.given_up or time.monotonic() < late.deadline:
        return late.given_up and not late.arrived
    logger.warning(
        "%s: another thread or task has been taking a connection for %g seconds and is not waited for any longer; the "
        "connection is discarded when it arrives",
        str(unit),
        LONGEST_WAIT,
    )
    return late.give_up()


def _pause(unit: UnitOfWork[Any]) -> Any:
    """Sleep for a moment; returns an awaitable on an async database."""
    return (asyncio if unit.database.is_async else time).sleep(POLL_INTERVAL)


def _discard(unit: UnitOfWork[Any]) -> Steps[None]:
    """Discard the connections of the session, also while it is setting a savepoint."""
    unit.transaction.leave()
    try:
        yield unit.session.invalidate
    except IllegalStateChangeError:
        yield partial(run_sync, unit, unit.transaction.discard)


def _begun_session(unit: UnitOfWork[Any]) -> Session:
    """Return the sync session with a transaction begun, which takes no connection yet."""
    session = unit.sync_session
    if not session.in_transaction():  # not `unit.in_transaction`: a close() that failed did not report the end
        if unit.last_begun is not None:
            leave_blocks(unit, lost=True)
        session.begin()
    return session


def run_sync(unit: UnitOfWork[Any], call: Callable[[], None]) -> Any:
    """Make a call that uses the driver; returns an awaitable on an async database."""
    if not unit.database.is_async:
        return call()
    session: Any = unit.session
    return session.run_sync(lambda _: call())


def _check_claim(unit: UnitOfWork[Any], outcome: Outcome) -> None:
    """Log an ERROR if the work ends as a success although the outcome of an earlier COMMIT is unknown."""
    if (
        outcome.background
        or outcome.interrupted
        or (outcome.error is not None if outcome.status is None else outcome.status >= 400)
    ):
        return
    unit.transaction.unknown = False
    how = "success" if outcome.status is None else f"status {outcome.status}"
    logger.error(
        "%s: ended as a success (%s), which is not known to be true: the outcome of an earlier COMMIT is unknown",
        str(unit),
        how,
    )


def _log(unit: UnitOfWork[Any], decision: Decision, outcome: Outcome, *, discards: bool) -> None:
    if not discards:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s (%s)", str(unit), "COMMIT" if decision.commit else "ROLLBACK", decision.reason)
    else:
        level = logging.ERROR if outcome.background else logging.INFO if outcome.failed else logging.WARNING
        logger.log(level, "%s: ROLLBACK, its work is discarded (%s)", str(unit), decision.reason)
