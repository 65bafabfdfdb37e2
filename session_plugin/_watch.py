"""What happens on each connection that a scope's session holds.

A `Watch` hangs in ``connection.info`` from the moment a session takes the connection until it
gives it back.  Core connections carry none and are left alone.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import ref

from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import await_only

from . import _mysql
from .exceptions import ConcurrentUseError, SessionPluginError, TransactionAbortedError

KEY = "session_plugin.watch"
GOES_ON = ("sqlite", *_mysql.NAMES)
"""Where what follows a lost transaction is executed, and would be committed without the first half."""
IN_ERROR = 3
"""libpq's PQTRANS_INERROR."""
MOMENT = 0.01
LONGEST_WAIT = 5.0
"""Seconds that a ROLLBACK waits for the statement of a sibling, which was refused or will be."""
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

    __slots__ = ("__weakref__", "_current_owner", "_info", "_lock", "_owner", "commit_sent", "doomed", "error", "wrote")

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
        self._info[KEY] = ref(self)  # the pool holds `info`, and `error` has a traceback that holds the session

    def release(self) -> None:
        """The session has given the connection back."""
        if (held := self._info.get(KEY)) is not None and held() is self:
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

    def wait_alone(self) -> None:
        """Wait for the statement of a sibling: a ROLLBACK would cut into it, and so would closing its socket."""
        given_up = time.monotonic() + LONGEST_WAIT
        while self.busy and time.monotonic() < given_up:
            if self._current_owner is asyncio.current_task:
                await_only(asyncio.sleep(MOMENT))
            else:
                time.sleep(MOMENT)

    def check_alive(self, connection: Connection) -> None:
        """Raise `TransactionAbortedError` if the server has already given the transaction up.

        Asks only after an error, since classifying errors would call a recovered savepoint aborted, or
        after a statement that never ended: a listener of the user's may have replaced its error.  Where
        the driver knows, errors of raw cursors are seen too.
        """
        error, self.error = self.error, None
        in_doubt = error is not None or self._lock.locked()
        if (in_doubt and _is_aborted(connection, error)) or _is_known_to_be_aborted(connection):
            self.error = error
            what = "an error" if error is None else type(error).__name__
            raise TransactionAbortedError(
                f"The database had already aborted this transaction when {what} was raised and caught, so nothing "
                "of it can be committed. Let the error leave, call rollback() before going on, or, where it is not a "
                "deadlock, put the statement that may fail in begin_nested()."
            ) from error

    def check_can_commit(self, connection: Connection) -> None:
        """Raise what forbids a COMMIT, an explicit one too."""
        if self.doomed is not None:
            raise TransactionAbortedError(
                f"This unit of work is doomed ({self.doomed}): it rolls back, whatever happens. What must be "
                "saved all the same belongs in a session_scope(new=True)."
            )
        self.check_alone()
        self.check_alive(connection)


def watch_of(connection: Connection) -> Watch | None:
    """The watch of the session that has ``connection``; None on a Core connection."""
    held: Callable[[], Watch | None] | None = connection.info.get(KEY)
    return None if held is None else held()


def _is_known_to_be_aborted(connection: Connection) -> bool:
    """True if psycopg or psycopg2 remembers so: then the error of a raw cursor is known too."""
    if connection.dialect.name != "postgresql":
        return False
    info = getattr(connection.connection.driver_connection, "info", None)
    return getattr(info, "transaction_status", None) == IN_ERROR


def _is_aborted(connection: Connection, error: BaseException | None) -> bool:
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        return False
    if connection.dialect.name == "sqlite":
        driver_connection = connection.connection.driver_connection
        return not (driver_connection and driver_connection.in_transaction)
    if error is not None and connection.dialect.name in _mysql.NAMES:
        return _mysql.has_rolled_back(connection, error)
    try:
        connection.scalar(select(1))
    except DBAPIError:
        return True
    return False


def _before_cursor_execute(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    watch = watch_of(connection)
    if watch is not None:
        if watch.error is not None and connection.dialect.name in GOES_ON:
            watch.check_alive(connection)
        watch.enter()
        if not watch.wrote:
            watch.wrote = WRITING.match(statement) is not None


def _after_cursor_execute(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    watch = watch_of(connection)
    if watch is not None:
        watch.leave()


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    watch = watch_of(connection)
    if watch is not None and not isinstance(context.original_exception, SessionPluginError):
        watch.leave()
        watch.error = context.sqlalchemy_exception or context.original_exception


def _before_rollback(connection: Connection) -> None:
    watch = None if connection.invalidated else watch_of(connection)
    if watch is not None and watch.busy:
        watch.wait_alone()
        if watch.busy:
            connection.invalidate()


def _before_commit(connection: Connection, *xid: Any) -> None:
    watch = watch_of(connection)
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
