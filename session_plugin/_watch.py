"""What happens on each connection that a scope's session holds.

A `Watch` hangs in ``connection.info`` from the moment a session takes the connection until it
gives it back.  Core connections carry none and are left alone.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.engine import ExceptionContext, Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import SessionTransaction

from .exceptions import ConcurrentUseError, SessionPluginError, TransactionAbortedError

KEY = "session_plugin.watch"
MANY_STREAMS = 100
TWO_AT_ONCE = (
    "Two threads or tasks used one session at the same time. Give each its own: open a "
    "session_scope(new=True) in every branch."
)
WRITING = re.compile(
    r"(?:\s|/\*.*?\*/|--[^\n]*\n)*(?:INSERT|UPDATE|DELETE|MERGE|REPLACE|COPY|CALL|DO|CREATE|ALTER|DROP|TRUNCATE"
    r"|WITH\b.*\b(?:INSERT|UPDATE|DELETE|MERGE))\b",
    re.IGNORECASE | re.DOTALL,
)


class Watch:
    """One connection in the hands of one session.

    It does not hold the connection: the pool holds ``info``, so a session that is collected
    without being closed could never give the connection back.
    """

    __slots__ = ("_current_owner", "_info", "_lock", "_owner", "commit_sent", "doomed", "error", "wrote")

    def __init__(self, connection: Connection) -> None:
        self.commit_sent = False
        self.doomed: str | None = None
        self.error: BaseException | None = None
        self.wrote = False
        self._info = connection.info
        self._lock = threading.Lock()
        self._owner: object = None
        self._current_owner: Callable[[], object] = (
            asyncio.current_task if connection.dialect.is_async else threading.get_ident
        )
        self._info[KEY] = self

    def release(self) -> None:
        """The session has given the connection back."""
        if self._info.get(KEY) is self:
            del self._info[KEY]

    @property
    def busy(self) -> bool:
        """True while another thread or task waits for a statement on this connection."""
        return self._lock.locked() and self._owner != self._current_owner()

    def enter(self) -> None:
        """A statement starts.  Raises `ConcurrentUseError` if another one is under way."""
        if self._lock.acquire(blocking=False):
            self._owner = self._current_owner()
        else:
            self.check_alone()

    def leave(self) -> None:
        """The statement is over, well or not."""
        if self._lock.locked():
            self._lock.release()

    def check_alone(self) -> None:
        """Raise `ConcurrentUseError` if a statement of another thread or task is under way."""
        if self.busy:
            raise ConcurrentUseError(TWO_AT_ONCE)

    def check_alive(self, connection: Connection) -> None:
        """Raise `TransactionAbortedError` if the server has already given the transaction up.

        Asks only after an error, since classifying errors would call a recovered savepoint aborted, or
        after a statement that never ended: a listener of the user's may have replaced its error.
        """
        error, suspicious = self.error, self.error is not None or self._lock.locked()
        if suspicious and _is_aborted(connection):
            self.error = error
            what = "an error" if error is None else type(error).__name__
            raise TransactionAbortedError(
                f"The database had already aborted this transaction when {what} was raised and caught, so nothing "
                "of it can be committed. Let the error leave, call rollback() before going on, or put the statement "
                "that may fail in begin_nested()."
            ) from error
        self.error = None

    def check_can_commit(self, connection: Connection) -> None:
        """Raise what forbids a COMMIT, an explicit one too."""
        if self.doomed is not None:
            raise TransactionAbortedError(
                f"This unit of work is doomed ({self.doomed}): it rolls back, whatever happens. What must be "
                "saved all the same belongs in a session_scope(new=True)."
            )
        self.check_alone()
        self.check_alive(connection)


def _is_aborted(connection: Connection) -> bool:
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        return False
    if connection.dialect.name == "sqlite":
        driver_connection = connection.connection.driver_connection
        return not (driver_connection and driver_connection.in_transaction)
    try:
        connection.scalar(select(1))
    except DBAPIError:
        return True
    return False


def _is_open(result: Any) -> bool:
    """False once a result was read to its end; a Core one tells by its cursor."""
    return not result.closed and getattr(result, "cursor", result) is not None


def _before_cursor_execute(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    watch: Watch | None = connection.info.get(KEY)
    if watch is not None:
        if watch.error is not None and connection.dialect.name == "sqlite":
            watch.check_alive(connection)  # what follows a lost transaction would commit by itself
        watch.enter()
        if not watch.wrote:
            watch.wrote = WRITING.match(statement) is not None


def _after_cursor_execute(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    watch: Watch | None = connection.info.get(KEY)
    if watch is not None:
        watch.leave()


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    watch: Watch | None = connection.info.get(KEY)
    if watch is not None and not isinstance(context.original_exception, SessionPluginError):
        watch.leave()
        watch.error = context.sqlalchemy_exception or context.original_exception


def _before_rollback(connection: Connection) -> None:
    watch: Watch | None = None if connection.invalidated else connection.info.get(KEY)
    if watch is not None and watch.busy:
        connection.invalidate()  # the driver's ROLLBACK would cut into the sibling's statement


def _before_commit(connection: Connection, *xid: Any) -> None:
    watch: Watch | None = connection.info.get(KEY)
    if watch is not None:
        watch.check_can_commit(connection)
        watch.commit_sent = True


def watch_engine(engine: Engine) -> None:
    """Listen to what the sessions of our scopes do on ``engine``."""
    event.listen(engine, "commit", _before_commit)
    event.listen(engine, "rollback", _before_rollback)
    event.listen(engine, "prepare_twophase", _before_commit)
    event.listen(engine, "before_cursor_execute", _before_cursor_execute)
    event.listen(engine, "after_cursor_execute", _after_cursor_execute)
    event.listen(engine, "handle_error", _handle_error)


class Work:
    """What a scope's session did since its transaction began.

    Attributes:
        committed: the transaction or savepoint that ended last by a commit.
        streams: the results that still read from the connection: those opened with ``yield_per`` or
            ``stream``, and on SQLite, whose cursors are lazy, those of Core.
        begin_engines: the twins of engines that only this transaction knows; see `BaseDatabase._begin_engine`.
    """

    __slots__ = ("_doomed", "_first", "_watches", "begin_engines", "committed", "streams")

    def __init__(self) -> None:
        self._watches: dict[Connection, Watch] = {}
        self._doomed: str | None = None
        self._first: asyncio.Task[Any] | None = None
        self.committed: SessionTransaction | None = None
        self.streams: list[Result[Any]] = []
        self.begin_engines: dict[tuple[Any, ...], Engine] = {}

    @property
    def wrote(self) -> bool:
        """True if a statement of this transaction was an INSERT, UPDATE, DELETE or the like."""
        return any(watch.wrote for watch in self._watches.values())

    @property
    def connected(self) -> bool:
        """True while the session holds a connection."""
        return bool(self._watches)

    @property
    def busy(self) -> bool:
        """True while another thread or task waits for a statement of this session."""
        return any(watch.busy for watch in self._watches.values())

    def connection_taken(self, connection: Connection) -> None:
        """The session took ``connection``; a savepoint on one it already has says so again."""
        if connection not in self._watches:
            self._watches[connection] = watch = Watch(connection)
            watch.doomed = self._doomed

    def doom(self, reason: str) -> None:
        """Let no connection of this work commit any more, those that it will yet take included."""
        self._doomed = reason
        for watch in self._watches.values():
            watch.doomed = reason

    def check_alone(self) -> None:
        """Raise `ConcurrentUseError` if another thread or task waits for a statement."""
        for watch in self._watches.values():
            watch.check_alone()

    def check_first(self) -> None:
        """Raise `ConcurrentUseError` if another task is just taking the connection.

        Only tasks are told apart: a thread may well go on where another one failed to connect.
        """
        if not self._watches:
            first, self._first = self._first, asyncio.current_task()
            if first is not None and first is not self._first and not first.done():
                raise ConcurrentUseError(TWO_AT_ONCE)

    def keep_stream(self, result: Result[Any]) -> None:
        """Close ``result`` with the transaction, unless it is read to its end before."""
        if len(self.streams) >= MANY_STREAMS:
            self.streams = [stream for stream in self.streams if _is_open(stream)]
        if _is_open(result):
            self.streams.append(result)

    def close_streams(self) -> None:
        """Close the results that would otherwise go on reading from a lent connection."""
        for stream in self.streams:
            stream.close()

    def note_partial_commit(self, error: Exception) -> None:
        """Say on the error of a COMMIT which of several engines had committed before it."""
        committed = [
            str(connection.engine.url)
            for connection, watch in self._watches.items()
            if watch.commit_sent and watch.error is None
        ]
        if committed:
            error.add_note(
                f"This unit of work had already committed on {', '.join(committed)}. Engines that must commit "
                "together need twophase=True."
            )

    def ended(self) -> None:
        """The transaction is over and its connections are back in their pools."""
        watches, self._watches, self._first = self._watches, {}, None
        self.streams.clear()
        self.begin_engines.clear()
        for watch in watches.values():
            watch.release()
