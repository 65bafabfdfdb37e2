"""`Isolation`: for one test, whatever a database commits is undone at the end.

Each engine has one connection with a transaction that is never committed.  The app's sessions are
bound to it, so that their transactions are savepoints of that one.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import Pool

from .. import _begin, _engines
from .._mysql import NAMES
from .._watch import KEY, watch_of
from ..exceptions import IsolationError
from . import _constraints, _statements
from ._open import open_isolations
from ._savepoints import Savepoints
from ._session import IsolatedSession
from ._switch import give_back, session_of_the_test, switched
from ._turns import Turn, Turns

if TYPE_CHECKING:
    from ..database import BaseDatabase

Failure = Callable[[Connection], None]


class IsolationWarning(UserWarning):
    """What a test saw is not what a real database would have kept."""


class Isolation:
    """The connections of one database for the time of one test.

    Attributes:
        session: the test's own.
        next_commits: what fails the next commits, one after the other.
        next_statements: what fails the next statements.
        exhausted: True while the app gets no connection.
    """

    _at_work: Turn

    def __init__(self, database: BaseDatabase[Any]) -> None:
        self._database = database
        self._turns = Turns(is_async=database.is_async)
        self._connections: dict[Engine, Connection] = {}
        self._opened: dict[Connection, tuple[_constraints.Check, Pool]] = {}
        self._warnings: list[str] = []
        self._opening = False
        self._over = False
        self._is_the_parents = False
        self._savepoints = Savepoints()
        self.next_commits: list[Failure] = []
        self.next_statements: list[Failure] = []
        self.exhausted = False
        if database in open_isolations:
            raise IsolationError("This database is isolated already. Leave that block before you open another one.")
        self.session: Any = session_of_the_test(database, self)

    # -- its course ----------------------------------------------------------------------------

    @contextmanager
    def entered(self) -> Generator[None]:
        """Isolate a sync database for the time of the block."""
        try:
            with self._switched():
                yield
        finally:
            self._end(self.session)
        self._tell()

    @asynccontextmanager
    async def aentered(self) -> AsyncGenerator[None]:
        """Isolate an async database for the time of the block."""
        try:
            with self._switched():
                yield
        finally:
            await self.session.run_sync(self._end)
        self._tell()

    @contextmanager
    def _switched(self) -> Generator[None]:
        with switched(self._database, self):
            open_isolations[self._database] = self
            try:
                yield
            finally:
                del open_isolations[self._database]

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
        """In a forked child: not a word to the database."""
        self._is_the_parents = True

    def _tell(self) -> None:
        """Tell, at the end of a test that would pass, what it has not shown."""
        if self.next_commits or self.next_statements:
            raise IsolationError(
                "The failure that this test asked for has not come. Let the app commit or execute more."
            )
        for message in self._warnings:
            warnings.warn(message, IsolationWarning, stacklevel=5)

    # -- connections ---------------------------------------------------------------------------

    def connection_for(self, session: IsolatedSession, engine: Engine) -> Connection:
        """The connection to ``engine``, once it is the turn of ``session``."""
        if self._is_the_parents:
            raise IsolationError(
                "This process was forked inside isolated(), and the connection is its parent's. Start it before the "
                "block, or test what it does without one."
            )
        if self._over:
            raise IsolationError("This session belongs to an isolated() that has ended. Take a new one.")
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
                "The connection of this isolated() was lost, and with it what the test had written. To try that, use "
                "kill_connection()."
            )
        self._at_work = turn
        self._savepoints.finish(connection)
        return connection

    def _open(self, engine: Engine) -> Connection:
        if engine.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            raise IsolationError("An engine in AUTOCOMMIT mode cannot be isolated. Make the test's engine without it.")
        connection = self.connect_beside(engine)
        try:
            options = _begin.begin_options(engine.dialect.name, read_only=False, isolation_level=None, safe=False)
            connection.execution_options(**options).begin()
            self._opened[connection] = _constraints.check_of(connection), engine.pool
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
        """Another connection to ``engine``, which nothing undoes."""
        _engines.prepare(engine)
        self._opening = True
        try:
            return engine.connect()
        finally:
            self._opening = False

    def refuse_checkout(self, *checkout: Any) -> None:
        """Refuse a connection that no session has asked for."""
        if not self._opening:
            raise IsolationError(
                "A connection was taken from the engine itself, which cannot be isolated: it sees nothing of the test, "
                "and what it writes stays. Use a session, or session.connection()."
            )

    def spare_cancelled(self, context: ExceptionContext) -> None:
        """Keep a connection whose statement was cancelled; only drivers of MySQL close it."""
        if context.connection in self._opened and not isinstance(context.original_exception, Exception):
            context.is_disconnect = context.dialect.name in NAMES

    # -- transactions --------------------------------------------------------------------------

    def begun(self, session: IsolatedSession, connection: Connection) -> None:
        """The transaction of ``session`` is a savepoint of ``connection`` now."""
        turn = self._turns.find(session)
        if turn is not None:
            turn.savepoints[connection] = self._savepoints.last
            turn.watches[connection] = connection.info.get(KEY)
            scope = session._session_scope
            if scope is not None and scope.policy.read_only:
                _statements.begin_read_only(connection)

    def ended(self, session: IsolatedSession) -> None:
        """The transaction of ``session`` is over."""
        turn = self._turns.end(session)
        if turn is None:
            return
        scope = session._session_scope
        for connection, watch in turn.watches.items():
            if watch is not None:
                connection.info[KEY] = watch
            if scope is not None and scope.policy.read_only:
                _statements.end_read_only(connection)

    def _before_release(self, connection: Connection, name: str, context: Any) -> None:
        """Before a RELEASE that stands for a COMMIT: fail where that one would."""
        turn = self._turns.owner(connection, name)
        if turn is None:
            return
        self._turns.wait_for_those_inside(turn)
        self._savepoints.finish(connection)
        watch = watch_of(connection)
        try:
            if turn.broken is not None:
                raise turn.broken
            if watch is not None:
                watch.check_can_commit(connection.connection)
            if self.next_commits and not turn.session.is_the_tests:
                self.next_commits.pop(0)(connection)
            if turn.wrote:
                self._opened[connection][0](connection)
        except BaseException:
            if watch is not None:
                watch.error, watch.commit_sent = None, False
            self._savepoints.rolls_back(connection, name)
            self._savepoints.finish(connection)  # SQLAlchemy takes it for ended
            raise
        self._turns.note_committed(turn)

    def _before_rollback(self, connection: Connection, name: str, context: Any) -> None:
        """Before a ROLLBACK TO: what was committed inside must stay, if this one has itself written nothing."""
        turn = self._turns.owner(connection, name)
        if turn is None:
            return
        self._turns.wait_for_those_inside(turn)
        self._savepoints.rolls_back(connection, name)
        if turn.kept and (turn.wrote or turn.failed or turn.under_way):
            self._warnings.append(
                f"{turn!r} rolled back, and with it went what was committed inside it in a transaction of its own. A "
                "real database would have kept that; one connection cannot."
            )
        elif turn.kept:
            self._savepoints.release_instead(name)

    # -- statements ----------------------------------------------------------------------------

    def _before_cursor_execute(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> tuple[str, Any]:
        if self._turns.find(self._at_work.session) is self._at_work:
            self._note(self._at_work, connection, statement)
        return self._savepoints.before(statement), parameters

    def _note(self, turn: Turn, connection: Connection, statement: str) -> None:
        writes = _statements.check(connection, statement, turn.session._session_scope)
        if writes:
            self._check_last(turn)
        turn.wrote = turn.wrote or writes
        turn.failed = turn.failed or turn.under_way
        turn.under_way = True
        if self.next_statements and not turn.session.is_the_tests and not _statements.controls(statement):
            try:
                self.next_statements.pop(0)(connection)
            except Exception as error:
                turn.broken = error
                raise

    def _check_last(self, turn: Turn) -> None:
        if not self._turns.is_last(turn):
            raise IsolationError(
                f"{turn!r} writes while a transaction that was begun inside it is open, and on one connection that one "
                "decides about both. End that one first."
            )

    def check_flush(self, session: IsolatedSession) -> None:
        """Raise `IsolationError` if ``session`` must not write now."""
        if self._turns.find(session) is not None:
            self._check_last(self._turns.take(session))

    def _after_cursor_execute(self, connection: Connection, cursor: Any, statement: str, *more: Any) -> None:
        self._savepoints.after(connection, statement)
        self._at_work.under_way = False
