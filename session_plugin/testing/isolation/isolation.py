"""`Isolation`: whatever a database commits during one test is undone at its end.

Each engine has one connection with a transaction that is never committed.  The app's sessions are
bound to it, and their transactions are savepoints of that one.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool

from ...database.core import DatabaseCore, HasDatabase
from ...database.interface import core_of
from ...engines import autocommit
from ...engines.backends import backend_for
from ...engines.commits import UNKNOWN
from ...engines.forks import after_fork_in_child
from ...engines.guard import KEY, guard_of
from ...engines.making import prepare
from ...exceptions import IsolationError
from . import statements
from .savepoints import Savepoints
from .session import IsolatedSession
from .switch import give_back, session_of_the_test, switched
from .turns import Turn, Turns

Failure = Callable[[Connection], None]
Check = Callable[[Connection], None]

DO_NOTHING = "DO 0"
"""What MariaDB and MySQL execute in place of a statement that must have no effect."""


class IsolationWarning(UserWarning):
    """What a test saw is not what a real database would have kept."""


class Isolation:
    """The connections of one database for the duration of one test.

    Attributes:
        session: the session of the test itself.
        next_commits: functions that make the next commits fail, one after the other.
        next_statements: functions that make the next statements fail.
        exhausted: True while the app gets no connection.
    """

    _active: Turn

    def __init__(self, core: DatabaseCore) -> None:
        self._core = core
        self._turns = Turns(is_async=core.is_async)
        self._connections: dict[Engine, Connection] = {}
        self._opened: dict[Connection, tuple[Check, Pool]] = {}
        self._warnings: list[str] = []
        self._opening = False
        self._over = False
        self._is_the_parents = False
        self._savepoints = Savepoints()
        self._custom_settings: set[str] = set()
        self.next_commits: list[Failure] = []
        self.next_statements: list[Failure] = []
        self.exhausted = False
        if core in open_isolations:
            raise IsolationError("This database is isolated already. Leave that block before you open another one.")
        self.session: Any = session_of_the_test(core, self)

    # -- begin and end ------------------------------------------------------------------------

    @contextmanager
    def entered(self) -> Generator[None]:
        """Isolate a sync database for the duration of the block."""
        try:
            with self._switched():
                yield
        finally:
            self._end(self.session)
        self._report()

    @asynccontextmanager
    async def aentered(self) -> AsyncGenerator[None]:
        """Isolate an async database for the duration of the block."""
        try:
            with self._switched():
                yield
        finally:
            await self.session.run_sync(self._end)
        self._report()

    @contextmanager
    def _switched(self) -> Generator[None]:
        with switched(self._core, self):
            open_isolations[self._core] = self
            try:
                yield
            finally:
                del open_isolations[self._core]

    def _end(self, session: Any) -> None:
        """Undo everything; ``session`` is the test's, or the sync one inside it."""
        if self._is_the_parents:
            return
        try:
            session.close()
        finally:
            self._over = True
            for engine, connection in self._connections.items():
                give_back(connection, self._opened[connection][1], engine)

    def leave_to_parent(self) -> None:
        """In a forked child, send nothing to the database."""
        self._is_the_parents = True

    def _report(self) -> None:
        """Raise or warn, at the end of a test that would pass, if it did not show what it seems to show."""
        if self.next_commits or self.next_statements:
            raise IsolationError(
                "The failure that this test asked for has not happened. Let the app commit, or execute more statements."
            )
        for message in self._warnings:
            warnings.warn(message, IsolationWarning, stacklevel=5)

    # -- connections ---------------------------------------------------------------------------

    def connection_for(self, session: IsolatedSession, engine: Engine) -> Connection:
        """Return the connection to ``engine``, once it is the turn of ``session``."""
        if self._is_the_parents:
            raise IsolationError(
                "This process was forked inside isolated(), and the connection belongs to its parent. Start the "
                "process before the block, or test what it does without a process."
            )
        if self._over:
            raise IsolationError("This session belongs to an isolated() block that has ended. Use a new session.")
        if self.exhausted and not session.is_the_tests and self._turns.find(session) is None:
            raise PoolTimeoutError("QueuePool limit reached, connection timed out: a test asked for this", code="3o7r")
        turn = self._turns.take(session)
        try:
            connection = self._connections.get(engine) or self._open(engine)
        except BaseException:
            if turn.begins:
                self._turns.end(session)
            raise
        turn.begins = False
        if turn.broken is not None:
            raise turn.broken
        if connection.invalidated or not connection.in_transaction():
            raise IsolationError(
                "The connection of this isolated() block was lost, and with it everything that the test had written. "
                "To test a lost connection, use kill_connection()."
            )
        self._active = turn
        self._savepoints.finish(connection)
        return connection

    def _open(self, engine: Engine) -> Connection:
        if engine.get_execution_options().get("isolation_level") == autocommit.LEVEL:
            raise IsolationError(
                "An engine in AUTOCOMMIT mode cannot be isolated. Create the test's engine without it."
            )
        connection = self.connect_beside(engine)
        try:
            backend = backend_for(engine.dialect.name)
            connection.execution_options(**backend.begin_options(read_only=False, may_write=True)).begin()
            backend.begin_for_good(connection)
            self._opened[connection] = backend.deferred_constraints_check(connection), engine.pool
        except BaseException:
            connection.close()
            raise
        event.listen(connection, "before_cursor_execute", self._before_cursor_execute, retval=True)
        event.listen(connection, "after_cursor_execute", self._after_cursor_execute)
        event.listen(connection, "release_savepoint", self._before_release)
        event.listen(connection, "rollback_savepoint", self._before_rollback)
        self._connections[engine] = connection
        return connection

    def connect_beside(self, engine: Engine) -> Connection:
        """Open another connection to ``engine``, on which nothing is undone."""
        prepare(engine, made_here=False)
        self._opening = True
        try:
            return engine.connect()
        finally:
            self._opening = False

    def refuse_checkout(self, *checkout: Any) -> None:
        """Refuse a connection that no session has asked for."""
        if not self._opening:
            raise IsolationError(
                "A connection was taken from the engine itself, which cannot be isolated: it does not see what the "
                "test wrote, and what it writes is not undone. Use a session, or session.connection()."
            )

    def keep_cancelled(self, context: ExceptionContext) -> None:
        """Keep a connection whose statement was cancelled, unless the driver has closed it."""
        if context.connection in self._opened and not isinstance(context.original_exception, Exception):
            context.is_disconnect = backend_for(context.dialect.name).cancellation_closes_connection

    # -- transactions --------------------------------------------------------------------------

    def begun(self, session: IsolatedSession, connection: Connection) -> None:
        """Note that a savepoint of ``connection`` now stands for the transaction of ``session``."""
        turn = self._turns.find(session)
        if turn is not None:
            turn.savepoints[connection] = self._savepoints.last
            turn.guards[connection] = connection.info.get(KEY)
            outside = self._turns.settings_outside(connection)
            if outside is not None:  # it is nested in a transaction that may have changed some
                self._remember_settings(turn, connection, self._custom_settings)
                backend_for(connection.dialect.name).restore_settings(connection.connection, outside)
            unit = session._unit_of_work
            if unit is not None and unit.policy.read_only:
                backend_for(connection.dialect.name).begin_read_only_savepoint(connection)

    def ended(self, session: IsolatedSession) -> None:
        """Note that the transaction of ``session`` has ended."""
        turn = self._turns.end(session)
        if turn is None:
            return
        unit = session._unit_of_work
        for connection, guard in turn.guards.items():
            if guard is not None:
                connection.info[KEY] = guard
            if unit is not None and unit.policy.read_only:
                backend_for(connection.dialect.name).end_read_only_savepoint(connection)

    def _before_release(self, connection: Connection, name: str, context: Any) -> None:
        """Before a RELEASE that stands for a COMMIT, fail where the COMMIT would."""
        turn = self._turns.owner(connection, name)
        if turn is None:
            return
        self._turns.wait_for_those_inside(turn)
        self._savepoints.finish(connection)
        guard = guard_of(connection)
        try:
            if turn.broken is not None:
                raise turn.broken
            if guard is not None:
                guard.check_can_commit(connection.connection)
                guard.ending = None  # the connection does not go back: the next turn, maybe another thread's, begins
            if self.next_commits and not turn.session.is_the_tests:
                self.next_commits.pop(0)(connection)
            if turn.wrote:
                self._opened[connection][0](connection)
            self._restore_settings(turn, connection)
        except BaseException:
            if guard is not None:
                guard.error = None
            self._savepoints.rolls_back(connection, name)
            self._savepoints.finish(connection)  # for SQLAlchemy it has ended
            raise
        self._turns.note_committed(turn)

    def commit_unanswered(self, connection: Connection, error: BaseException) -> None:
        """Make the outcome of the COMMIT unknown for which the current RELEASE on ``connection`` stands."""
        if (guard := guard_of(connection)) is not None:
            guard.commit_state = UNKNOWN
            guard.commit_failed(error, error, connection.dialect)

    def _before_rollback(self, connection: Connection, name: str, context: Any) -> None:
        """Before a ROLLBACK TO, see that what was committed inside stays, if this transaction itself wrote nothing."""
        turn = self._turns.owner(connection, name)
        if turn is None:
            return
        self._turns.wait_for_those_inside(turn)
        self._savepoints.rolls_back(connection, name)
        guard = guard_of(connection)
        if guard is not None:
            guard.close_results()
        if turn.kept and (turn.wrote or turn.failed or turn.executing):
            self._warnings.append(
                f"{turn!r} rolled back, which also undid what was committed inside it in a transaction of its own. A "
                "real database would have kept that; on one connection it is not possible."
            )
        elif turn.kept:
            self._restore_settings(turn, connection)
            self._savepoints.release_instead(name)

    # -- settings ------------------------------------------------------------------------------

    def _before_setting(self, turn: Turn, connection: Connection, statement: str, parameters: Any) -> None:
        names = statements.custom_settings(statement, parameters)
        turn.sets_constraints = turn.sets_constraints or "constraints" in statement.lower()
        self._remember_settings(turn, connection, names | self._custom_settings)

    def _remember_settings(self, turn: Turn, connection: Connection, names: set[str]) -> None:
        """Note the settings as they are; a transaction ends them, but the end of a savepoint does not."""
        new = names - self._custom_settings
        self._custom_settings |= new
        known = turn.settings.get(connection)
        if known is not None and not new:
            return
        try:
            found = backend_for(connection.dialect.name).settings(connection.connection, new if known else names)
        except connection.dialect.loaded_dbapi.Error:
            return  # the transaction is aborted, and its end undoes what it has set
        turn.settings[connection] = {**found, **(known or {})}

    def _restore_settings(self, turn: Turn, connection: Connection) -> None:
        """Set back what was set in ``turn``, as the end of its transaction would."""
        if connection in turn.settings:
            backend = backend_for(connection.dialect.name)
            backend.restore_settings(connection.connection, turn.settings.pop(connection))
            if turn.sets_constraints:
                backend.restore_constraints(connection.connection)

    # -- statements ----------------------------------------------------------------------------

    def _before_cursor_execute(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> tuple[str, Any]:
        if self._turns.find(self._active.session) is self._active:
            if self._sets_mode(self._active, connection, statement, parameters):
                return DO_NOTHING, parameters
            self._note(self._active, connection, statement)
            if statements.may_set(statement, backend_for(connection.dialect.name).syntax):
                self._before_setting(self._active, connection, statement, parameters)
        return self._savepoints.before(statement), parameters

    def _sets_mode(self, turn: Turn, connection: Connection, statement: str, parameters: Any) -> bool:
        """Return True if ``statement`` sets a mode of the transaction that is about to begin, which ends with it.

        On the server, the transaction of the test has begun long before and refuses that.  It is right to
        do so if ``turn`` has sent something else.
        """
        matches = backend_for(connection.dialect.name).mode_of_transaction
        found = None if matches is None or turn.sends or parameters else matches.match(statement)
        if found is None:
            turn.sends = turn.sends or statements.may_begin(statement)
            return False
        turn.read_only = turn.read_only or found["read_only"] is not None
        return True

    def _refuse_to_write(self, turn: Turn, connection: Connection) -> None:
        """Raise the error of the server for a statement that writes in a READ ONLY transaction."""
        turn.read_only = False  # for the statement that raises it
        try:
            connection.exec_driver_sql(backend_for(connection.dialect.name).read_only_error_statement)
        finally:
            turn.read_only = True

    def _note(self, turn: Turn, connection: Connection, statement: str) -> None:
        writes = statements.check(connection, statement, turn.session._unit_of_work)
        if writes and turn.read_only:
            self._refuse_to_write(turn, connection)
        if writes:
            self._check_last(turn)
        turn.wrote = turn.wrote or writes
        turn.failed = turn.failed or turn.executing
        turn.executing = True
        if self.next_statements and not turn.session.is_the_tests and not statements.controls(statement):
            try:
                self.next_statements.pop(0)(connection)
            except Exception as error:
                turn.broken = error
                raise

    def _check_last(self, turn: Turn) -> None:
        if not self._turns.is_last(turn):
            raise IsolationError(
                f"{turn!r} writes while a transaction that was begun inside it is open. On one connection the end of "
                "the inner transaction would decide about both, so end the inner one first."
            )

    def check_flush(self, session: IsolatedSession) -> None:
        """Raise `IsolationError` if ``session`` must not write now."""
        if self._turns.find(session) is not None:
            self._check_last(self._turns.take(session))

    def _after_cursor_execute(self, connection: Connection, cursor: Any, statement: str, *more: Any) -> None:
        self._savepoints.after(connection, statement)
        self._active.executing = False


open_isolations: WeakKeyDictionary[DatabaseCore, Isolation] = WeakKeyDictionary()
"""Those that are open in this process."""
_inherited: list[Isolation] = []
"""Those of the parent process: if their connections were collected, a ROLLBACK would go out on the parent's sockets."""


def isolation_of(db: HasDatabase) -> Isolation:
    """Return the open isolation of a database, or of the one that a plugin has.

    Raises:
        IsolationError: the database is not isolated.
    """
    isolation = open_isolations.get(core_of(db))
    if isolation is None:
        raise IsolationError("This works on an isolated database only. Open `with db.isolated():` around it.")
    return isolation


def leave_to_parent() -> None:
    """Forget the isolations in a forked child, where the connections belong to the parent."""
    for isolation in list(open_isolations.values()):
        isolation.leave_to_parent()
        _inherited.append(isolation)


after_fork_in_child(leave_to_parent)
