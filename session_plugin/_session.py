"""The session of a scope: the user's own session class, and what it tells its scope.

Only documented extension points of SQLAlchemy are used: a subclass that overrides
``get_bind()``, and session events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

from ._permits import take_permit
from .current import depth
from .exceptions import ReadOnlyError, ScopeClosedError

if TYPE_CHECKING:
    from .scope import SessionScope


class ScopeSession(Session):
    """Stands in front of the user's session class; without a scope it changes nothing."""

    _session_scope: SessionScope[Any] | None = None

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """The bind that SQLAlchemy chooses, with the options by which the policy begins."""
        bind = super().get_bind(*args, **kwargs)
        scope = self._session_scope
        if scope is None or not isinstance(bind, Engine):
            return bind
        work = scope.work
        if not work.connected:
            work.begin_engines.clear()  # nothing has begun by one of them, and the policy may be another one since
            if scope.database.is_async:
                work.check_first()
            elif scope.loop is not None and scope.permit_held is None:
                take_permit(scope, scope.loop)
        engine = work.begin_engines.get(bind)
        if engine is None:
            engine = work.begin_engines[bind] = scope.database._begin_engine(bind, scope)
        return engine

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """As SQLAlchemy's, but two at once are told what to do instead."""
        if self._session_scope is None:
            super().flush(objects)
            return
        work = self._session_scope.work
        if self._session_scope.database.is_async and has_changes(self):
            work.check_first()  # before the flush, whose failure would cut into the other task's connecting
        outer = work.begin_flush()
        try:
            super().flush(objects)
        finally:
            work.flushing = outer


def has_changes(session: Session) -> bool:
    """True if a flush may have something to write; no attribute, which would hide one of the user's session class."""
    return bool(session.new or (session.identity_map and (session.dirty or session.deleted)))


def scope_session_class(session_class: type[Session]) -> type[Session]:
    """The subclass of ``session_class`` whose sessions know their scope."""
    return type(session_class.__name__, (ScopeSession, session_class), {"__module__": session_class.__module__})


@event.listens_for(ScopeSession, "after_transaction_create", insert=True)  # a listener before it may raise
def _note_begin(session: ScopeSession, transaction: SessionTransaction) -> None:
    scope = session._session_scope
    if scope is None:
        return
    if transaction.parent is None:
        scope.in_transaction = scope.has_begun = True  # first: who closes in another thread sees it, or is seen here
        scope.begun_at = depth.get()
    if scope.closed:
        transaction.close()
        raise ScopeClosedError(scope.closed_message)


@event.listens_for(ScopeSession, "after_begin")
def _watch_connection(session: ScopeSession, transaction: SessionTransaction, connection: Connection) -> None:
    scope = session._session_scope
    if scope is not None:
        scope.in_transaction = scope.has_begun = True  # whatever a listener before ours made of its creation
        scope.work.connection_taken(connection)


@event.listens_for(ScopeSession, "before_flush")
def _refuse_to_write(session: ScopeSession, flush_context: Any, instances: Any) -> None:
    scope = session._session_scope
    if scope is None or not scope.policy.read_only:
        return
    changed = [*session.new, *session.deleted, *(row for row in session.dirty if session.is_modified(row))]
    if changed:
        raise _read_only(scope, f"{type(changed[0]).__name__} is new, changed or deleted")


def _read_only(scope: SessionScope[Any], what: str) -> ReadOnlyError:
    return ReadOnlyError(
        f"The policy {scope.policy.name} does not write, and this session would have: {what}. Choose another policy "
        "with db.use() or @db.policy, or do without."
    )


@event.listens_for(ScopeSession, "do_orm_execute")
def _before_statement(state: ORMExecuteState) -> Any:
    scope: SessionScope[Any] | None = getattr(state.session, "_session_scope", None)
    if scope is None:
        return None
    if scope.closed:
        raise ScopeClosedError(scope.closed_message)
    scope.work.check_alone()
    if scope.policy.read_only and (state.is_insert or state.is_update or state.is_delete):
        raise _read_only(scope, "the statement is an INSERT, UPDATE or DELETE")
    options, database = state.execution_options, scope.database
    streams = options.get("stream_results", database._streams_results) or options.get("yield_per")
    if streams or (database._has_lazy_cursors and not state.is_orm_statement):
        result = state.invoke_statement()
        scope.work.keep_stream(result)
        return result
    return None


@event.listens_for(ScopeSession, "after_commit", insert=True)
def _mark_committed(session: ScopeSession) -> None:
    if session._session_scope is not None:
        session._session_scope.work.committed = session.get_nested_transaction() or session.get_transaction()


@event.listens_for(ScopeSession, "after_transaction_end", insert=True)
def _run_hooks(session: ScopeSession, transaction: SessionTransaction) -> None:
    scope = session._session_scope
    if scope is None or (transaction.parent is not None and not transaction.nested):
        return
    committed = scope.work.committed is transaction
    if transaction.nested:
        scope.hooks.savepoint_ended(transaction, committed=committed)
    else:
        scope.in_transaction = False
        scope.work.ended(committed=committed)
        scope.database._run_hooks(scope.hooks.take("commit" if committed else "rollback"))
