"""The sessions of an isolated database: the app's, and the one of the test."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

from ...exceptions import IsolationError
from ...scope.session import ScopeSession, read_anew


class SharedConnections(Protocol):
    """What the sessions need of an `Isolation`."""

    def connection_for(self, session: IsolatedSession, engine: Engine) -> Connection:
        """Return the connection to ``engine``, once it is the turn of ``session``."""

    def check_flush(self, session: IsolatedSession) -> None:
        """Raise `IsolationError` if ``session`` must not write now."""

    def begun(self, session: IsolatedSession, connection: Connection) -> None:
        """Note that a savepoint of ``connection`` now stands for the transaction of ``session``."""

    def ended(self, session: IsolatedSession) -> None:
        """Note that the transaction of ``session`` has ended."""

    def refuse_checkout(self, *checkout: Any) -> None:
        """Refuse a connection that no session has asked for."""

    def keep_cancelled(self, context: ExceptionContext) -> None:
        """Keep a connection whose statement was cancelled."""


class IsolatedSession(ScopeSession):
    """First base of session classes while a database is isolated; its transactions are savepoints of the test's."""

    is_the_tests: ClassVar[bool] = False

    def __init__(self, *args: Any, isolation: SharedConnections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.isolation = isolation
        self.join_transaction_mode: Any = "create_savepoint"
        self.twophase = False

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """Return the test's connection to the engine that SQLAlchemy chooses, once it is this session's turn."""
        bind = super().get_bind(*args, **kwargs)
        return self.isolation.connection_for(self, bind) if isinstance(bind, Engine) else bind

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> Connection:
        """As SQLAlchemy's, which would not call `get_bind` for an engine that is named."""
        arguments = dict(bind_arguments or {})
        if isinstance(engine := arguments.get("bind"), Engine):
            arguments["bind"] = self.isolation.connection_for(self, engine)
        return super().connection(arguments, execution_options)

    def step_aside(self, *, wrote: bool) -> None:
        """End the transaction for the sake of another session; only the test's own does."""

    def invalidate(self) -> None:
        """Close: the connection belongs to the test, which goes on with it."""
        self.close()


class SessionOfTheTest(IsolatedSession):
    """Sees what the app has committed, and lets the app have the connection whenever it wants it."""

    is_the_tests: ClassVar[bool] = True

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """As SQLAlchemy's, but always from the database."""
        if not self._has_unsaved:
            kwargs.setdefault("populate_existing", True)
        return super().get(*args, **kwargs)

    @property
    def _has_unsaved(self) -> bool:
        return bool(self.new or self.deleted or any(self.is_modified(row) for row in self.dirty))

    def step_aside(self, *, wrote: bool) -> None:
        """End the transaction, which has only read.

        Raises:
            IsolationError: it has written.
        """
        if wrote or self._has_unsaved:
            raise IsolationError(
                "The test's session has uncommitted work, which the app could not see. Call commit() on it before the "
                "app goes on."
            )
        read_anew(self)
        session: Session = self
        expire_on_commit, session.expire_on_commit = session.expire_on_commit, False
        try:
            session.commit()
        finally:
            session.expire_on_commit = expire_on_commit


@event.listens_for(SessionOfTheTest, "do_orm_execute")
def _read_anew(state: ORMExecuteState) -> None:
    session: Any = state.session
    if state.is_select and not state.is_column_load and not session._has_unsaved:
        state.update_execution_options(populate_existing=True)


@event.listens_for(IsolatedSession, "before_flush")
def _check_flush(session: IsolatedSession, flush_context: Any, instances: Any) -> None:
    session.isolation.check_flush(session)  # here, what it raises ends no transaction


@event.listens_for(IsolatedSession, "after_begin", insert=True)
def _begun(session: IsolatedSession, transaction: SessionTransaction, connection: Connection) -> None:
    if transaction.parent is None:
        session.isolation.begun(session, connection)


@event.listens_for(IsolatedSession, "after_transaction_end", insert=True)
def _ended(session: IsolatedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.isolation.ended(session)


def isolated_class(session_class: type[Session], base: type[IsolatedSession]) -> type[Session]:
    """Return a subclass of ``session_class`` whose sessions belong to the ``isolation`` that they are made with."""
    return type(session_class.__name__, (base, session_class), {})
