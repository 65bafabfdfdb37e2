"""What happens on each connection that a scope's session holds.

A `Watch` hangs in ``connection.info`` from the moment a session takes the connection until it
gives it back.  Core connections carry none and are left alone.

It is told of by the dialect: by its events, and for COMMIT and ROLLBACK, which have none, by its
documented methods.  The engine has events for all of that; with a single listener to any of them,
SQLAlchemy makes a dispatcher for each step of each connection, a tenth of what a small query costs.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakSet, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext, ExecutionContext
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from . import _mysql
from ._autocommit import is_autocommit
from .exceptions import ConcurrentUseError, ScopeClosedError, SessionPluginError, TransactionAbortedError

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

    __slots__ = (
        "__weakref__", "_current_owner", "_dialect", "_info", "_lock", "_options", "_owner", "commit_sent", "doomed",
        "error", "inherited", "wrote",
    )  # fmt: skip

    def __init__(self, connection: Connection) -> None:
        self.commit_sent = False
        self.doomed: str | None = None
        self.error: BaseException | None = None
        self.inherited = False
        self.wrote = False
        self._info = connection.info
        self._dialect = connection.dialect
        self._options = connection.get_execution_options()
        self._lock = threading.Lock()
        self._owner: object = None
        self._current_owner: Callable[[], object] = (
            asyncio.current_task if self._dialect.is_async else threading.get_ident
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

    def execute(
        self, pooled: PoolProxiedConnection, call: Callable[..., None], cursor: Any, statement: str, *rest: Any
    ) -> None:
        """Make the call, which executes ``statement``.

        Raises:
            ConcurrentUseError: another statement is under way.
            TransactionAbortedError: it would be the first one after a lost transaction.
        """
        self._check_own()
        if self.error is not None and self._dialect.name in GOES_ON:
            self.check_alive(pooled)
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(TWO_AT_ONCE)
        self._owner = self._current_owner()
        if not self.wrote and not statement.startswith("SELECT"):  # the most frequent, sooner than by the expression
            self.wrote = WRITING.match(statement) is not None
        try:
            call(cursor, statement, *rest)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._lock.release()

    def _check_own(self) -> None:
        if self.inherited:
            raise ScopeClosedError(
                "This session is that of the parent process, which goes on with its transaction: nothing was sent on "
                "its connection. Open a session_scope() here."
            )

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

    def check_alive(self, pooled: PoolProxiedConnection) -> None:
        """Raise `TransactionAbortedError` if the server has already given the transaction up.

        Asks only after an error, since classifying errors would call a recovered savepoint aborted.  Where
        the driver knows, errors of raw cursors are seen too.
        """
        error, self.error = self.error, None
        if (error is not None and self._is_aborted(pooled, error)) or self._is_known_to_be_aborted(pooled):
            self.error = error
            what = "an error" if error is None else type(error).__name__
            raise TransactionAbortedError(
                f"The database had already aborted this transaction when {what} was raised and caught, so nothing "
                "of it can be committed. Let the error leave, call rollback() before going on, or, where it is not a "
                "deadlock, put the statement that may fail in begin_nested()."
            ) from error

    def check_can_commit(self, pooled: PoolProxiedConnection) -> None:
        """Raise what forbids a COMMIT, an explicit one too."""
        self._check_own()
        if self.doomed is not None:
            raise TransactionAbortedError(
                f"This unit of work is doomed ({self.doomed}): it rolls back, whatever happens. What must be "
                "saved all the same belongs in a session_scope(new=True)."
            )
        self.check_alone()
        self.check_alive(pooled)
        self.commit_sent = True

    def _is_known_to_be_aborted(self, pooled: PoolProxiedConnection) -> bool:
        """True if psycopg or psycopg2 remembers so: then the error of a raw cursor is known too."""
        if self._dialect.name != "postgresql":
            return False
        driver_connection = pooled.driver_connection
        told_by = getattr(driver_connection, "pgconn", None) or getattr(driver_connection, "info", None)
        return getattr(told_by, "transaction_status", None) == IN_ERROR

    def _is_aborted(self, pooled: PoolProxiedConnection, error: BaseException) -> bool:
        if is_autocommit(self._options):
            return False
        if self._dialect.name == "sqlite":
            driver_connection: Any = pooled.driver_connection
            return not driver_connection.in_transaction
        if self._dialect.name in _mysql.NAMES:
            return _mysql.has_rolled_back(pooled, error)
        cursor = pooled.cursor()
        try:
            cursor.execute("SELECT 1")
        except self._dialect.loaded_dbapi.Error:
            return True
        finally:
            cursor.close()
        return False


def watch_of(pooled: Any) -> Watch | None:
    """The watch of the session that has the connection; None on a Core connection."""
    try:
        held: Callable[[], Watch | None] | None = pooled.info.get(KEY)
    except NotImplementedError:
        return None  # a dialect's first look at its server
    return None if held is None else held()


def watch_engine(engine: Engine) -> None:
    """Look at what the sessions of our scopes do on ``engine``, and on all that share its dialect."""
    dialect = engine.dialect
    if dialect in _watched:
        return
    _watched.add(dialect)
    event.listen(engine, "do_execute", _execute)
    event.listen(engine, "do_executemany", _execute_many)
    event.listen(engine, "do_execute_no_params", _execute_without_parameters)
    event.listen(engine, "handle_error", _handle_error)
    methods: Any = dialect
    methods.do_commit = _checked(dialect.do_commit)
    methods.do_prepare_twophase = _checked(dialect.do_prepare_twophase)
    methods.do_rollback = _alone(dialect.do_rollback)


_watched: WeakSet[Dialect] = WeakSet()


def _execute(cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool | None:
    return _watched_execute(context, context.dialect.do_execute, cursor, statement, parameters, context)


def _execute_many(cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool | None:
    return _watched_execute(context, context.dialect.do_executemany, cursor, statement, parameters, context)


def _execute_without_parameters(cursor: Any, statement: str, context: Any) -> bool | None:
    return _watched_execute(context, context.dialect.do_execute_no_params, cursor, statement, context)


def _watched_execute(context: ExecutionContext, call: Callable[..., None], *arguments: Any) -> bool | None:
    """True if the statement was executed here; None leaves it to SQLAlchemy."""
    pooled = context.root_connection.connection
    watch = watch_of(pooled)
    if watch is None:
        return None
    watch.execute(pooled, call, *arguments)
    return True


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    watch = watch_of(connection)
    if watch is not None and not isinstance(context.original_exception, SessionPluginError):
        watch.error = context.sqlalchemy_exception or context.original_exception


def _checked(save: Callable[..., None]) -> Callable[..., None]:
    """``save``, which commits or prepares a connection, once nothing forbids it."""

    @wraps(save)
    def checked(held: PoolProxiedConnection | Connection, *xid: Any) -> None:
        watch = watch_of(held)
        if watch is not None:
            watch.check_can_commit(held.connection if isinstance(held, Connection) else held)
        save(held, *xid)

    return checked


def _alone(rollback: Callable[[PoolProxiedConnection], None]) -> Callable[[PoolProxiedConnection], None]:
    """``rollback``, once no sibling's statement is under way; if that takes too long, the connection is discarded.

    On a connection of the parent process nothing is sent.
    """

    @wraps(rollback)
    def alone(pooled: PoolProxiedConnection) -> None:
        watch = watch_of(pooled)
        if watch is not None and watch.inherited:
            return
        if watch is not None and watch.busy:
            watch.wait_alone()
            if watch.busy:
                pooled.invalidate()
                return
        rollback(pooled)

    return alone
