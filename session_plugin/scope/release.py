"""The connection goes back in the middle of a unit of work, while nothing would be lost by it.

That ends the transaction and not the unit of work: its hooks wait on, and what it has loaded stays readable.
It happens when the app says `release()`, and without transactions after each statement (`execute_and_release`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy.engine import CursorResult, Result
from sqlalchemy.engine.cursor import CursorFetchStrategy, FullyBufferedCursorFetchStrategy
from sqlalchemy.exc import IllegalStateChangeError, StatementError
from sqlalchemy.orm import ORMExecuteState

from ..engines.event_loop import running_loop
from ..engines.guard import TWO_AT_ONCE
from ..exceptions import ConcurrentUseError, ReleaseError, ScopeClosedError
from .lifecycle import run_sync
from .log import log_failed_rollback
from .runner import Steps
from .transaction_state import has_changes
from .unit_of_work import UnitOfWork


def has_something_to_release(unit: UnitOfWork[Any]) -> bool:
    """Return True if ``unit`` has a transaction; called by the thread or task that releases.

    Raises:
        ScopeClosedError: the unit of work has ended.
        ConcurrentUseError: another thread or task is executing a statement.
    """
    if unit.closed:
        raise ScopeClosedError(unit.closed_message)
    if unit.in_transaction:
        unit.transaction.check_alone()
    return unit.in_transaction


def release(unit: UnitOfWork[Any]) -> Steps[None]:
    """End the transaction of ``unit``, which has written nothing and holds nothing, and give its connection back.

    Raises:
        ConcurrentUseError: another thread or task is executing a statement.
        ReleaseError: something would be lost.
    """
    if unit.transaction.may_have_raw_writes:
        yield partial(run_sync, unit, unit.transaction.ask_whether_wrote)
    if reason := _what_is_held(unit):
        raise ReleaseError(
            f"The connection cannot be released: {reason}. Call commit() or rollback() first, or do this part of the "
            "work in a session_scope(new=True)."
        )
    yield partial(run_sync, unit, partial(end_transaction, unit))


def end_transaction(unit: UnitOfWork[Any]) -> None:
    """End the transaction of the session with a ROLLBACK; nothing is expired, and no hook runs or is dropped."""
    if unit.releases:
        raise ConcurrentUseError(TWO_AT_ONCE)
    root = unit.sync_session.get_transaction()
    unit.transaction.forget_read_results()
    unit.releases = unit.released = True
    try:
        if root is not None:
            root.close()
    except IllegalStateChangeError as error:
        raise ConcurrentUseError(TWO_AT_ONCE) from error
    except Exception as error:
        log_failed_rollback(unit, error)
        unit.transaction.discard()
        unit.transaction.ended(committed=False)
        unit.in_transaction = False
    finally:
        unit.releases = False


def return_permit(unit: UnitOfWork[Any]) -> None:
    """Give the permit back with the connection, unless the next statement would wait for one on the event loop.

    There it would keep those that have a permit from going on.
    """
    if unit.permit is not None and running_loop() is None:
        unit.return_permit()


def execute_and_release(unit: UnitOfWork[Any], state: ORMExecuteState) -> Result[Any]:
    """Execute a statement outside any transaction, fetch its rows, and give the connection back.

    The connection is kept if something may depend on it: a lock, a setting, a function of which nothing is known, a
    result that is streamed, or what ``session.connection()`` or ``session.begin()`` has returned.
    """
    try:
        result = state.invoke_statement()
    except StatementError:
        _release_after(unit, None)
        raise
    _release_after(unit, result)
    return result


def _release_after(unit: UnitOfWork[Any], result: Result[Any] | None) -> None:
    transaction = unit.transaction
    if transaction.wrote or transaction.holds or transaction.was_handed_out or transaction.busy:
        return
    if (result is None or _fetch_rows(result)) and not _what_is_held(unit):
        end_transaction(unit)
        return_permit(unit)


class _FetchedRows(FullyBufferedCursorFetchStrategy):
    """Rows that were fetched; ``fetchmany()`` without a number returns as many of them as it would of the cursor's."""

    __slots__ = ("_arraysize",)

    def __init__(self, rows: Any, arraysize: int) -> None:
        super().__init__(None, initial_buffer=rows)
        self._arraysize = arraysize

    def fetchmany(self, result: Any, dbapi_cursor: Any, size: int | None = None) -> Any:
        return super().fetchmany(result, dbapi_cursor, self._arraysize if size is None else size)


def _fetch_rows(result: Any) -> bool:
    """Fetch the rows of ``result`` now, as a plain result does later; return False if it is to stream them.

    `Result.freeze` would do for Core, but an ORM result that needs ``unique()`` would do without it afterwards.
    """
    raw: CursorResult[Any] | None = getattr(result, "raw", result)  # of an ORM result, that of Core
    if raw is None:
        return True  # a listener has made it from rows, for example of a cache
    strategy: Any = raw.cursor_strategy
    if type(strategy) is CursorFetchStrategy:
        cursor: Any = raw.cursor
        raw.cursor_strategy = _FetchedRows(strategy.fetchall(raw, cursor), cursor.arraysize)
        return True
    return raw.cursor is None or isinstance(strategy, FullyBufferedCursorFetchStrategy)


def _what_is_held(unit: UnitOfWork[Any]) -> str | None:
    """Return what would be lost if the transaction of ``unit`` ended now, or None."""
    session, transaction = unit.sync_session, unit.transaction
    if has_changes(session):
        return "the session has changes that were not flushed"
    if transaction.wrote:
        return "this transaction may have written something that was not committed"
    if transaction.hides_raw_writes:
        return "session.connection() was called, and on this database it cannot be seen what raw cursors have written"
    if transaction.holds:
        return "this transaction holds a lock or a setting, which would end with it"
    if transaction.open_results:
        return "a result has not been read to its end. Read it with all(), or close() it"
    if session.in_nested_transaction():
        return "a savepoint is open"
    if transaction.begun is not None and transaction.begun is session.get_transaction():
        return "session.begin() is open. Remove it: the unit of work begins by itself"
    if not session.is_active:
        return "a flush has failed, a COMMIT is under way, or another thread or task is taking the connection"
    return None
