"""`ScopeSession`: the session of a unit of work, of the user's own session class, and what it reports.

Only documented extension points of SQLAlchemy are used: a subclass that overrides ``get_bind()``,
``connection()``, ``begin()``, ``flush()``, ``rollback()`` and ``close()``, and session events.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, Engine, event, inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, SessionTransaction

from ..engines.backends import backend_for
from ..engines.guard import TWO_AT_ONCE
from ..exceptions import ConcurrentUseError, ReadOnlyError, ScopeClosedError
from .begin_blocks import note_begun
from .current import depth
from .joined import note_settled
from .log import log_commit_failure, logger
from .permits import take_permit
from .release import execute_and_release
from .rows import restore_rows
from .transaction_state import has_changes
from .unit_of_work import UnitOfWork

ROLLED_BACK = "its transaction was rolled back"


class ScopeSession(Session):
    """The first base of every session class of ours; in a session that belongs to no unit of work it does nothing."""

    _unit_of_work: UnitOfWork[Any] | None = None

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """Return the bind that SQLAlchemy chooses, in the variant that begins as the policy says."""
        bind = super().get_bind(*args, **kwargs)
        unit = self._unit_of_work
        if unit is None or not isinstance(bind, Engine):
            return bind
        transaction = unit.transaction
        if not transaction.connected:
            transaction.variants.clear()  # nothing has begun with one of them, and the policy may have changed since
            if unit.database.is_async:
                transaction.check_first()
            elif unit.loop is not None and unit.permit is None:
                take_permit(unit, unit.loop)
        engine = transaction.variants.get(bind)
        if engine is None:
            engine = unit.database.engine_for(bind, unit.policy, may_write=unit.may_write)
            transaction.variants[bind] = engine
        if self.twophase:
            transaction.announce_id(engine)
        return engine

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> Connection:
        """As SQLAlchemy's, but the transaction has begun on the server: the driver's own connection may be used.

        From now on, what is written through the driver's own cursors is looked for too.
        """
        unit = self._unit_of_work
        if unit is None:
            return super().connection(bind_arguments, execution_options)
        try:
            connection = super().connection(bind_arguments, execution_options)
        except InvalidRequestError as error:
            unit.transaction.check_alone(error)
            raise
        backend_for(connection.dialect.name).begin_now(connection)
        unit.transaction.handed_out(connection, with_options=bool(execution_options))
        return connection

    def begin(self, nested: bool = False) -> SessionTransaction:
        """As SQLAlchemy's; note the transaction, in whose block nothing can be executed once it has ended.

        A block that is still open at the end of the unit of work is left with it.
        """
        unit = self._unit_of_work
        if unit is None:
            return super().begin(nested)
        try:
            transaction = super().begin(nested)
        except InvalidRequestError as error:
            unit.transaction.check_alone(error)
            raise
        note_begun(unit, transaction)
        if not nested:
            unit.transaction.begun = transaction
        return transaction

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """As SQLAlchemy's, but of two flushes at once the second raises `ConcurrentUseError`."""
        if self._unit_of_work is None:
            super().flush(objects)
            return
        transaction = self._unit_of_work.transaction
        if self._unit_of_work.database.is_async and has_changes(self):
            transaction.check_first()  # before the flush, whose failure would disturb the connecting of the other task
        outer = transaction.begin_flush()
        try:
            super().flush(objects)
        except InvalidRequestError as error:
            transaction.check_alone(error)
            raise
        finally:
            transaction.flushing = outer

    def rollback(self) -> None:
        """As SQLAlchemy's, but the blocks of other tasks and threads that have joined learn that their work is lost."""
        unit = self._unit_of_work
        if unit is not None and not unit.closed:
            if unit.was_joined and unit.wrote:
                note_settled(unit.joined_blocks, lost=ROLLED_BACK)
            if unit.released and not self.in_transaction():
                super().begin()  # what release() has ended was a part of what is rolled back: its rows and its hooks
        super().rollback()

    def close(self) -> None:
        """As SQLAlchemy's; warn in the log if the user's code discards the work of its unit of work by it."""
        unit = self._unit_of_work
        if unit is not None and not unit.closed and unit.wrote:
            logger.warning(
                "%s: its session was closed with work that was not committed, which is discarded. Remove the `with "
                "session:`, `async with session:` or `close()`: the unit of work closes its session itself.",
                str(unit),
            )
        super().close()


def scope_session_class(session_class: type[Session]) -> type[Session]:
    """Return the subclass of ``session_class`` whose sessions belong to units of work."""
    return type(session_class.__name__, (ScopeSession, session_class), {"__module__": session_class.__module__})


def read_anew(session: Session) -> None:
    """Expire what ``session`` has loaded; an object whose row is gone still knows its primary key."""
    states = [inspect(loaded) for loaded in session]
    keys = [
        (state.dict, {name: state.dict[name] for name in _names_of_key(state.mapper) if name in state.dict})
        for state in states
    ]
    session.expire_all()
    for values, key in keys:
        values.update(key)  # they are read without a query, and a refresh replaces them with the rest


def _names_of_key(mapper: Mapper[Any]) -> list[str]:
    return [mapper.get_property_by_column(column).key for column in mapper.primary_key]


@event.listens_for(ScopeSession, "after_transaction_create", insert=True)  # a listener before it may raise
def _note_begin(session: ScopeSession, transaction: SessionTransaction) -> None:
    unit = session._unit_of_work
    if unit is None:
        return
    if transaction.parent is None:
        unit.begun_at = depth.get()
        unit.in_transaction = unit.has_begun = True  # another thread that closes sees it, or is seen here
    if unit.closed:
        transaction.close()
        raise ScopeClosedError(unit.closed_message)


@event.listens_for(ScopeSession, "after_begin")
def _guard_connection(session: ScopeSession, transaction: SessionTransaction, connection: Connection) -> None:
    unit = session._unit_of_work
    if unit is None:
        return
    late = unit.transaction.late
    if late is not None or unit.closed:  # the connection was being taken when the transaction was to end
        if late is not None:
            late.refuse(connection)
        raise ScopeClosedError(unit.closed_message)
    unit.in_transaction = unit.has_begun = True  # even if another listener raised when it was created
    unit.transaction.connection_taken(connection, unit.policy)


@event.listens_for(ScopeSession, "before_flush")
def _refuse_to_write(session: ScopeSession, flush_context: Any, instances: Any) -> None:
    unit = session._unit_of_work
    if unit is None or not unit.policy.read_only:
        return
    changed = [*session.new, *session.deleted, *(row for row in session.dirty if session.is_modified(row))]
    if changed:
        raise _read_only(unit, f"{type(changed[0]).__name__} is new, changed or deleted")


def _read_only(unit: UnitOfWork[Any], what: str) -> ReadOnlyError:
    return ReadOnlyError(
        f"The policy {unit.policy.name} is read-only, and this session was about to write: {what}. Choose another "
        "policy with db.use() or @db.policy, or do not write."
    )


@event.listens_for(ScopeSession, "do_orm_execute")
def _before_statement(state: ORMExecuteState) -> Any:
    unit: UnitOfWork[Any] | None = getattr(state.session, "_unit_of_work", None)
    if unit is None:
        return None
    if unit.closed:
        raise ScopeClosedError(unit.closed_message)
    unit.transaction.check_alone()
    if unit.releases:
        raise ConcurrentUseError(TWO_AT_ONCE)
    leases = False
    if unit.policy.read_only:
        if state.is_insert or state.is_update or state.is_delete:
            raise _read_only(unit, "the statement is an INSERT, UPDATE or DELETE")
        leases = unit.policy.reads_without_transactions
    options = state.execution_options
    streams = options.get("stream_results", unit.database.streams_results or unit.transaction.streams)
    if streams and state.is_orm_statement and not options.get("yield_per"):
        result = state.invoke_statement()
        unit.transaction.keep_result(result)
        return result
    return execute_and_release(unit, state) if leases and not streams else None


@event.listens_for(ScopeSession, "after_commit", insert=True)
def _mark_committed(session: ScopeSession) -> None:
    if session._unit_of_work is not None:
        committed = session.get_nested_transaction() or session.get_transaction()
        session._unit_of_work.transaction.committed = committed


@event.listens_for(ScopeSession, "after_rollback", insert=True)
def _keep_rows(session: ScopeSession) -> None:
    unit = session._unit_of_work
    if unit is not None and not session.in_nested_transaction():
        unit.transaction.rolled_back(session)


@event.listens_for(ScopeSession, "after_transaction_end", insert=True)
def _run_hooks(session: ScopeSession, transaction: SessionTransaction) -> None:
    unit = session._unit_of_work
    if unit is None or (transaction.parent is not None and not transaction.nested):
        return
    committed = unit.transaction.committed is transaction
    if transaction.nested:
        unit.hooks.savepoint_ended(transaction, committed=committed)
    else:
        unit.in_transaction = False
        has_joined_work = unit.was_joined and unit.transaction.wrote
        kept, unit.transaction.kept = unit.transaction.kept, None
        if kept is not None and unit.rolls_back:  # a rollback() of the user's expires all rows, as in SQLAlchemy
            restore_rows(kept)
        ended_by = unit.transaction.ended(committed=committed)
        if has_joined_work and ended_by == "rollback":  # by close(), or by an explicit commit() that failed
            note_settled(unit.joined_blocks, lost=ROLLED_BACK)
        if unit.transaction.report is not None:
            log_commit_failure(unit, unit.transaction.report, unknown=ended_by == "unknown")
            unit.transaction.report = None
        if not unit.releases:
            unit.released = False
            unit.interrupt = unit.database.run_hooks(unit.hooks.take(ended_by)) or unit.interrupt


class _Listeners:
    """The listeners for some events, of which some are ours."""

    def __init__(self, ours: dict[str, int]) -> None:
        self._collections = attrgetter(*ours)
        self._ours = tuple(ours.values())

    def has_others(self, dispatch: Any) -> bool:
        """Return True if there is one that is not ours in ``dispatch``, the listeners of an object by event."""
        return tuple(map(len, self._collections(dispatch))) != self._ours


_OF_AN_ENDING = _Listeners({
    "before_commit": 0,
    "after_commit": 1,
    "after_rollback": 1,
    "after_soft_rollback": 0,
    "after_transaction_end": 1,
    "after_transaction_create": 1,
    "after_begin": 1,
})  # fmt: skip
_OF_A_FLUSH = _Listeners({
    "before_flush": 1,
    "after_flush": 0,
    "after_flush_postexec": 0,
    "pending_to_persistent": 0,
    "persistent_to_deleted": 0,
})  # fmt: skip
_OF_A_ROW = _Listeners({
    "before_insert": 0,
    "after_insert": 0,
    "before_update": 0,
    "after_update": 0,
    "before_delete": 0,
    "after_delete": 0,
})  # fmt: skip


def runs_listeners(session: Session) -> bool:
    """Return True if listeners of the user run when the transaction of ``session`` ends, or in its last flush."""
    if _OF_AN_ENDING.has_others(session.dispatch):
        return True
    if not has_changes(session):
        return False
    mappers = {inspect(row).mapper for rows in (session.new, session.dirty, session.deleted) for row in rows}
    return _OF_A_FLUSH.has_others(session.dispatch) or any(_OF_A_ROW.has_others(mapper.dispatch) for mapper in mappers)
