"""`TransactionState`: what a session did since its transaction began, and what it left open on its connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection
from typing import Any
from weakref import ref

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Result
from sqlalchemy.orm import Session, SessionTransaction

from ..engines import commits
from ..engines.guard import TWO_AT_ONCE, ConnectionGuard
from ..engines.twophase import TransactionIds
from ..exceptions import ConcurrentUseError
from ..policy import Policy
from .hooks import Event
from .rows import LoadedRows, loaded_rows, unchanged_rows


class LateConnection:
    """A connection that another thread or task is taking while the transaction ends.

    The two flags are set before the other one is read, so a connection that arrives as the ending gives up is
    released by one of the two sides.

    Attributes:
        deadline: until when the ending waits for it, by `time.monotonic`.
        arrived: True once it has arrived and was refused; the end of the transaction releases it.
        given_up: True once the ending waits no longer; the connection is then discarded where it arrives.
    """

    __slots__ = ("arrived", "deadline", "given_up")

    def __init__(self, deadline: float) -> None:
        self.deadline: float = deadline
        self.arrived: bool = False
        self.given_up: bool = False

    def refuse(self, connection: Connection) -> None:
        """Note that ``connection`` has arrived; discard it if the ending does not wait any more."""
        self.arrived = True
        if self.given_up:
            connection.invalidate()

    def give_up(self) -> bool:
        """Wait no longer; return False if it has just arrived, and is released a moment later."""
        self.given_up = True
        return not self.arrived


class TransactionState:
    """The state of a session's transaction.

    Attributes:
        begun: the transaction that ``session.begin()`` began last, or None.
        committed: the transaction or savepoint that was committed last.
        saved: True if a transaction has committed what it wrote since the last settlement looked.
        flushing: the thread or the task that flushes, or None.
        late: the connection that another thread or task was still taking when the transaction was to end, or None.
        kept: the rows that can be read on once the session has rolled back, or None; see `rows`.
        report: what a COMMIT that failed has left on each engine, for the log, or None.
        unknown: True once it is not known whether a transaction was committed, until that was logged with a success.
        variants: by engine, its variant with which this transaction has begun; see `engines.variants`.
    """

    __slots__ = (
        "_current_owner", "_doomed", "_first", "_guards", "_ids", "_loaded", "_session", "begun", "committed",
        "flushing", "kept", "late", "report", "saved", "unknown", "variants",
    )  # fmt: skip

    def __init__(self, session: Session, doomed: str | None = None, *, is_async: bool = False) -> None:
        self._session = ref(session)
        self._loaded: LoadedRows | None = None
        self.kept: LoadedRows | None = None
        self._current_owner: Callable[[], object] = current_task if is_async else threading.get_ident
        self._guards: dict[Connection, ConnectionGuard] = {}
        self._doomed = doomed
        self._ids: TransactionIds | None = None
        self._first: asyncio.Task[Any] | None = None
        self.begun: SessionTransaction | None = None
        self.committed: SessionTransaction | None = None
        self.saved: bool = False
        self.report: str | None = None
        self.unknown: bool = False
        self.flushing: object = None
        self.late: LateConnection | None = None
        self.variants: dict[Engine, Engine] = {}

    @property
    def wrote(self) -> bool:
        """True if a statement of this transaction was an INSERT, UPDATE, DELETE or the like."""
        for guard in self._guards.values():  # noqa: SIM110  a generator costs as much as all else here
            if guard.wrote:
                return True
        return False

    @property
    def holds(self) -> bool:
        """True if a statement of this transaction has locked or set something, or a connection was given options."""
        return any(
            guard.holds or connection.get_execution_options() is not guard.options
            for connection, guard in self._guards.items()
        )

    @property
    def was_handed_out(self) -> bool:
        """True if the user has one of its connections."""
        return any(guard.was_handed_out for guard in self._guards.values())

    @property
    def hides_raw_writes(self) -> bool:
        """True if the driver's own cursors may have written and nothing would show it."""
        return any(guard.hides_raw_writes for guard in self._guards.values())

    @property
    def in_doubt(self) -> bool:
        """True once COMMIT was sent and it is not known whether the server has committed."""
        return commits.outcome(self._guards) == "unknown"

    def _note_first_write(self) -> None:
        """Remember what was read before the first write on any connection."""
        session = self._session()
        if self._loaded is None and session is not None:
            self._loaded = loaded_rows(session)

    def rolled_back(self, session: Session) -> None:
        """Note which rows stay as they are; SQLAlchemy expires all of them next."""
        before = loaded_rows(session) if self._loaded is None else self._loaded  # None: nothing was written
        self.kept = unchanged_rows(session, before)

    def handed_out(self, connection: Connection, *, with_options: bool) -> None:
        """Note that the user was given ``connection``, and with it the driver's own cursors."""
        guard = self._guards.get(connection)
        if guard is not None:
            self._note_first_write()  # that of a raw cursor is not seen
            guard.handed_out(connection.connection)
            guard.holds = guard.holds or with_options

    @property
    def may_have_raw_writes(self) -> bool:
        """True if only `ask_whether_wrote` shows whether something was written."""
        for guard in self._guards.values():  # noqa: SIM110  as above
            if guard.may_have_raw_writes:
                return True
        return False

    def ask_whether_wrote(self) -> None:
        """Ask the drivers or the servers whether something was written through raw cursors."""
        for connection, guard in self._guards.items():
            if guard.may_have_raw_writes and not (connection.closed or connection.invalidated):
                guard.ask_whether_wrote(connection.connection)

    @property
    def connected(self) -> bool:
        """True while the session holds a connection."""
        return bool(self._guards)

    @property
    def connections(self) -> Collection[Connection]:
        """Those that the session holds, each in a transaction."""
        return list(self._guards)

    def announce_id(self, engine: Engine) -> None:
        """Name the two-phase transaction that is about to begin on ``engine``, unless one is open there."""
        if all(connection.engine is not engine for connection in self._guards):
            if self._ids is None:
                self._ids = TransactionIds()
            self._ids.announce(first=not self._guards)

    def connection_taken(self, connection: Connection, policy: Policy) -> None:
        """Guard ``connection``, which the session has taken under ``policy``; a savepoint on it reports it again."""
        if connection not in self._guards:
            self._guards[connection] = guard = ConnectionGuard(connection, self._guards, self._note_first_write)
            guard.doomed = self._doomed
            if policy.read_only:
                guard.read_only_policy = policy.name

    def doom(self, reason: str | None) -> None:
        """Let no connection commit any more, including those that are yet to be taken; None ends that."""
        self._doomed = reason
        for guard in self._guards.values():
            guard.doomed = reason

    def check_alone(self, error: BaseException | None = None) -> None:
        """Raise `ConcurrentUseError` if another thread or task waits for a statement or a COMMIT.

        A flush that failed there has ended the transaction, and SQLAlchemy's own error says so at every use that
        follows.

        Args:
            error: what SQLAlchemy has raised, which is then the cause.
        """
        session = self._session()
        if self.kept is not None and session is not None and not session.is_active:
            return
        for guard in self._guards.values():
            guard.check_alone(error)

    @property
    def busy(self) -> bool:
        """True while another thread or task waits for a statement of this session."""
        return any(guard.busy for guard in self._guards.values())

    def wait_alone(self) -> None:
        """Wait for the statements of other threads or tasks, for a limited time."""
        for guard in self._guards.values():
            guard.wait_alone()

    def leave(self) -> None:
        """Have the statements of other threads or tasks raise `ConcurrentUseError`: their connections are discarded."""
        for guard in self._guards.values():
            guard.left = True

    def discard(self) -> None:
        """Discard the connections, where the session cannot: it is still taking another one."""
        guards, self._guards = self._guards, {}
        for connection, guard in guards.items():
            guard.release()
            if not connection.closed:
                connection.invalidate()

    def check_first(self) -> None:
        """Raise `ConcurrentUseError` if another task is taking the connection.

        It is called once an engine has been chosen: a listener that serves a statement from a cache takes none.
        Only tasks are compared: a thread may well go on where another one failed to connect.
        """
        if not self._guards:
            first, self._first = self._first, current_task()
            if first is not None and first is not self._first and not first.done():
                raise ConcurrentUseError(TWO_AT_ONCE)

    def end_in_another_task(self) -> None:
        """Note that the running task takes no connection: it waits for the end, which runs in a task of its own."""
        if not self._guards and self._first is current_task():
            self._first = None

    def begin_flush(self) -> object:
        """Note who flushes, and return who did before: nobody, or the same one, in a nested flush.

        Raises:
            ConcurrentUseError: another thread or task flushes.
        """
        outer, self.flushing = self.flushing, self._current_owner()
        if outer not in (None, self.flushing):
            self.flushing = outer
            raise ConcurrentUseError(TWO_AT_ONCE)
        return outer

    @property
    def streams(self) -> bool:
        """True if a connection of the session streams every result."""
        for guard in self._guards.values():  # noqa: SIM110  as above
            if guard.streams:
                return True
        return False

    def keep_result(self, result: Result[Any]) -> None:
        """Keep an ORM ``result``, to be closed before the transaction ends.

        Those of Core are kept by the guards, and once these are closed no ORM result reads on.  But one that was
        opened without ``yield_per`` has fetched all its rows with the first.
        """
        for guard in self._guards.values():
            guard.keep_result(result)
            break

    @property
    def open_results(self) -> list[Result[Any]]:
        """The results that still read from its connections."""
        return [result for guard in self._guards.values() for result in guard.open_results]

    def forget_read_results(self) -> None:
        """Let the results that have all their rows be read on, whatever happens to the connections."""
        for guard in self._guards.values():
            guard.forget_read_results()

    def close_results(self) -> None:
        """Close the results that still read from its connections."""
        for guard in self._guards.values():
            guard.close_results()

    def note_commit_failure(self, error: BaseException) -> None:
        """Add a note to the error of a COMMIT if the data may be saved all the same, or a part of it is."""
        commits.add_note(error, commits.note_for(self._guards))

    def is_committed(self, transaction: SessionTransaction) -> bool:
        """Return True if all of ``transaction`` is durable, whatever SQLAlchemy's COMMIT has raised."""
        return self.committed is transaction or commits.outcome(self._guards) == "commit"

    def detach_after_fork(self) -> list[Any]:
        """Send nothing more on the connections, which are the parent's; return those of the driver."""
        for guard in self._guards.values():
            guard.inherited = True
        return [
            connection.connection.dbapi_connection
            for connection in self._guards
            if not (connection.closed or connection.invalidated)
        ]

    def ended(self, *, committed: bool) -> Event:
        """Start anew: the transaction has ended, and its connections are back in their pools.

        Returns:
            how it ended.
        """
        guards, self._guards = self._guards, {}
        ended_by: Event = "commit" if committed else commits.outcome(guards)
        if ended_by == "commit":
            self.saved = self.saved or any(guard.wrote for guard in guards.values())
        elif guards:
            self._report(guards, ended_by)
        self._first = self.late = self._loaded = None
        for guard in guards.values():
            guard.release()
        return ended_by

    def _report(self, guards: dict[Connection, ConnectionGuard], ended_by: Event) -> None:
        """Note on the error, and for the log, what a COMMIT that failed has left."""
        errors = [guard.commit_error for guard in guards.values() if guard.commit_error is not None]
        for error in errors:
            commits.add_note(error, commits.note_for(guards))
        if ended_by == "unknown":
            self.unknown = True
        if ended_by == "unknown" or commits.leaves_prepared(guards):
            because = f" ({', '.join(type(error).__name__ for error in errors)})" if errors else ""
            self.report = f"{commits.describe(guards)}{because}"


def has_changes(session: Session) -> bool:
    """Return True if a flush may have something to write."""
    return bool(session.new or (session.identity_map and (session.dirty or session.deleted)))


def current_task() -> asyncio.Task[Any] | None:
    """Return the running task, or None."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None  # no event loop runs here
