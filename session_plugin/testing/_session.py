"""The sessions of an isolated database: the app's, and the one of the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

from .._session import ScopeSession
from ..exceptions import IsolationError

if TYPE_CHECKING:
    from ._isolation import Isolation
    from ._turns import Turn


class IsolatedSession(ScopeSession):
    """Stands in front of the database's session class: its transaction is a savepoint of the test's."""

    is_the_tests: ClassVar[bool] = False

    def __init__(self, *args: Any, isolation: Isolation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.isolation = isolation
        self.join_transaction_mode = "create_savepoint"
        self.twophase = False

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        """The connection of the test to the engine that SQLAlchemy chooses, once it is this session's turn."""
        bind = super().get_bind(*args, **kwargs)
        return self.isolation.connection_for(self, bind) if isinstance(bind, Engine) else bind

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> Connection:
        """As SQLAlchemy's, which asks nobody for the connection to an engine that is named."""
        arguments = dict(bind_arguments or {})
        if isinstance(engine := arguments.get("bind"), Engine):
            arguments["bind"] = self.isolation.connection_for(self, engine)
        return super().connection(arguments, execution_options)

    def step_aside(self, turn: Turn) -> None:
        """End the transaction for the sake of another session; only the test's own does."""

    def invalidate(self) -> None:
        """Close: the connection goes on with the test."""
        self.close()


class SessionOfTheTest(IsolatedSession):
    """Sees what the app has committed, and gives the connection away whenever the app wants it."""

    is_the_tests: ClassVar[bool] = True

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """As SQLAlchemy's, but read anew."""
        if not self._has_unsaved:
            kwargs.setdefault("populate_existing", True)
        return super().get(*args, **kwargs)

    @property
    def _has_unsaved(self) -> bool:
        return bool(self.new or self.deleted or any(self.is_modified(row) for row in self.dirty))

    def step_aside(self, turn: Turn) -> None:
        """End the transaction, which has only read.

        Raises:
            IsolationError: it has not.
        """
        if turn.wrote or self._has_unsaved:
            raise IsolationError(
                "The test's session has work that is not committed, which the app could not see. Call commit() on it "
                "before the app goes on."
            )
        self.commit()


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
    """A subclass of ``session_class`` whose sessions belong to the ``isolation`` that they are made with."""
    return type(session_class.__name__, (base, session_class), {})
