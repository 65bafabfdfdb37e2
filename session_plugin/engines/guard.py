"""`ConnectionGuard`: what happens on each connection that a session of ours holds.

A guard is kept in ``connection.info`` from the moment a session takes the connection until it gives it
back.  Core connections have none and are left alone.

The dialect reports to it: by its events and, for COMMIT and ROLLBACK, which have none, by its documented
methods.  The engine has events for all of that, but with a single listener to any of them SQLAlchemy makes
a dispatcher for each step of each connection, which costs a tenth of a small query.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any
from weakref import WeakSet, ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import CursorResult, Dialect, ExceptionContext, ExecutionContext, Result
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy
from sqlalchemy.exc import DBAPIError, ResourceClosedError
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only

from ..exceptions import ConcurrentUseError, ScopeClosedError, SessionPluginError, TransactionAbortedError
from . import commits
from .autocommit import is_autocommit
from .backends import backend_for
from .commits import CommitState, Guards
from .statements import Kind, kind
from .twophase import wrap_create_xid

KEY = "session_plugin.guard"
POLL_INTERVAL = 0.01
MANY_RESULTS = 100
LONGEST_WAIT = 5.0
"""Seconds for which a ROLLBACK waits for a statement of another thread or task on the same connection."""
_NO_CURSOR = object()
TWO_AT_ONCE = (
    "Two threads or tasks used one session at the same time. Give each its own: open a "
    "session_scope(new=True) in every branch."
)


class _ClosedCursor:
    """Stands for the cursor of a result that was closed while a loop over its rows was under way."""

    def close(self) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        raise ResourceClosedError("This result object is closed.")


_CLOSED_CURSOR = _ClosedCursor()


class _GuardedCursor:
    """The cursor of a streamed result: to fetch from the server counts as a statement."""

    def __init__(self, cursor: Any, guard: ConnectionGuard) -> None:
        self._cursor = cursor
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def close(self) -> None:
        """Close the cursor, unless another thread or task uses the connection; the end of the transaction closes it."""
        if not self._guard.busy:
            self._cursor.close()

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        return self._guard.alone(self._cursor.fetchone)

    def fetchmany(self, *size: int) -> Any:
        """Return the next rows."""
        return self._guard.alone(self._cursor.fetchmany, *size)

    def fetchall(self) -> Any:
        """Return the remaining rows."""
        return self._guard.alone(self._cursor.fetchall)


class ConnectionGuard:
    """Guards one connection while one session holds it.

    It has no reference to the connection: the pool holds ``info``, so a session that is garbage-collected
    without being closed could otherwise never give the connection back.

    Attributes:
        commit_error: the exception of a COMMIT that failed, as the user's code gets it, or None.
        commit_state: how its COMMIT went.
        doomed: why nothing may be committed, or None.
        ending: the thread or task that has begun to COMMIT or to ROLLBACK, or None; the statements of others are
            refused, also while the connection is on its way back to the pool.
        error: the error of the last statement that failed, until it is known whether it aborted the transaction.
        fellows: the guards of the session's other connections and this one.
        inherited: True in a forked child, where the connection is the parent's.
        holds: True once a statement has locked or set something that ends with the transaction.
        left: True once the session has given the connection back, or is about to discard it.
        on_first_write: called before its first statement that is not known to be a plain read.
        has_lazy_cursors: True if the driver reads rows from the database as they are fetched.
        options: the execution options of the connection when the session took it.
        read_only_policy: the name of the policy under which nothing may be written, or None.
        wrote: True once a statement was executed that is not known to be a plain read.
        xid: the id of its prepared transaction once PREPARE was sent, or None.
    """

    __slots__ = (
        "__weakref__", "_current_owner", "_dialect", "_info", "_lock", "_many", "_mark", "_owner", "_pooled",
        "_results", "_syntax", "commit_error", "commit_state", "doomed", "ending", "error", "fellows",
        "has_lazy_cursors", "holds", "inherited", "left", "on_first_write", "options", "read_only_policy", "wrote",
        "xid",
    )  # fmt: skip

    def __init__(self, connection: Connection, fellows: Guards, on_first_write: Callable[[], None]) -> None:
        self.commit_error: BaseException | None = None
        self.commit_state: CommitState = commits.OPEN
        self.fellows: Guards = fellows
        self.on_first_write: Callable[[], None] = on_first_write
        self.xid: Any = None
        self.doomed: str | None = None
        self.error: BaseException | None = None
        self.inherited: bool = False
        self.options: Mapping[str, Any] = connection.get_execution_options()
        self.holds: bool = False
        self.read_only_policy: str | None = None
        self.left: bool = False
        self.ending: object = None
        self.wrote: bool = False
        self._info = connection.info
        self._pooled = ref(connection.connection)
        self._dialect = connection.dialect
        backend = backend_for(self._dialect.name)
        self._syntax = backend.syntax
        self.has_lazy_cursors: bool = backend.has_lazy_cursors and not self._dialect.is_async
        self._results: list[Result[Any]] = []
        self._many = MANY_RESULTS
        self._mark: Any = _NO_CURSOR
        self._lock = threading.Lock()
        self._owner: object = None
        self._current_owner: Callable[[], object] = (
            asyncio.current_task if self._dialect.is_async else threading.get_ident
        )
        self._info[KEY] = ref(self)  # the pool holds `info`, and `error` has a traceback that holds the session

    def release(self) -> None:
        """Leave the connection, which the session has given back."""
        self.left = True
        if self._results:
            self.close_results(discarded=True)  # no COMMIT or ROLLBACK has done it
        if (held := self._info.get(KEY)) is not None and held() is self:
            del self._info[KEY]

    @property
    def busy(self) -> bool:
        """True while another thread or task waits for a statement or a COMMIT on this connection."""
        return self._lock.locked() and self._owner != self._current_owner()

    def execute(
        self, pooled: PoolProxiedConnection, call: Callable[..., None], cursor: Any, statement: str, *rest: Any
    ) -> None:
        """Make ``call``, which executes ``statement``.

        Raises:
            ConcurrentUseError: another statement is being executed, or another thread or task has meanwhile ended the
                transaction and discarded the connection.
            TransactionAbortedError: it would be the first one after the loss of a transaction.
        """
        self._check_own()
        if self.error is not None and backend_for(self._dialect.name).goes_on_after_abort:
            self.check_alive(pooled)
        if self.ending is not None:
            self.check_alone()
            if self.commit_state == commits.COMMITTED and kind(statement, self._syntax):
                self.commit_state = commits.OPEN  # the user's code has committed the connection itself, and goes on
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(TWO_AT_ONCE)
        self._owner = self._current_owner()
        try:
            if not self.wrote and (found := kind(statement, self._syntax)):
                self._note(found)
            call(cursor, statement, *rest)
        except BaseException as error:
            self.error = error
            if self.left and isinstance(error, Exception):
                raise ConcurrentUseError(TWO_AT_ONCE) from error
            raise
        finally:
            self._lock.release()
        if self.left:
            raise ConcurrentUseError(TWO_AT_ONCE)

    def commit(self, pooled: PoolProxiedConnection, commit: Callable[[PoolProxiedConnection], None]) -> None:
        """Call ``commit`` unless something forbids it; a statement beside it is refused.

        From the moment it is called until it has returned the outcome is unknown, unless the server refuses.
        """
        self.check_can_commit(pooled)
        self.commit_state = commits.UNKNOWN
        self.alone(commit, pooled)
        self.commit_state = commits.COMMITTED

    def roll_back(self, pooled: PoolProxiedConnection, rollback: Callable[[PoolProxiedConnection], None]) -> None:
        """Call ``rollback`` after the statement of another thread or task, or discard ``pooled`` if that takes long."""
        if self.inherited:
            return
        self.ending = self._current_owner()  # first: no statement of another one begins from here on
        if self.busy:
            self.wait_alone()
            if self.busy:
                self.left = True
                pooled.invalidate()
                return
        self.close_results()
        rollback(pooled)

    def alone(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Make ``call``, which uses the connection.

        Raises:
            ConcurrentUseError: another thread or task uses it, or ends its transaction.
        """
        if self.ending is not None:
            self.check_alone()
        if not self._lock.acquire(blocking=False):
            raise ConcurrentUseError(TWO_AT_ONCE)
        self._owner = self._current_owner()
        try:
            return call(*arguments)
        except Exception as error:
            if self.left:
                raise ConcurrentUseError(TWO_AT_ONCE) from error
            raise
        finally:
            self._lock.release()

    def _note(self, found: Kind) -> None:
        """Note a statement that is not a plain read."""
        if found is Kind.HOLDS:
            self.holds = True
        else:
            self.wrote = True
            self.on_first_write()

    @property
    def streams(self) -> bool:
        """True if every result of the connection is to be streamed."""
        return bool(self.options.get("stream_results"))

    def handed_out(self, pooled: PoolProxiedConnection) -> None:
        """Note that the user has the connection, and may use the driver's own cursors from now on."""
        if self._mark is _NO_CURSOR:
            self._mark = backend_for(self._dialect.name).write_mark(pooled)

    @property
    def may_have_raw_writes(self) -> bool:
        """True if only `ask_whether_wrote` shows whether something was written."""
        return self.was_handed_out and not self.wrote and not self.inherited

    @property
    def was_handed_out(self) -> bool:
        """True if the user has the connection."""
        return self._mark is not _NO_CURSOR

    @property
    def hides_raw_writes(self) -> bool:
        """True if nothing shows whether something was written through raw cursors."""
        return self.was_handed_out and not backend_for(self._dialect.name).sees_raw_writes

    def ask_whether_wrote(self, pooled: PoolProxiedConnection) -> None:
        """Ask the driver or the server whether something was written through raw cursors."""
        self.wrote = backend_for(self._dialect.name).has_written(pooled, self._mark, self._dialect)

    def keep_result(self, result: Result[Any]) -> None:
        """Keep ``result``, to be closed before the transaction ends."""
        if len(self._results) >= self._many:
            self._results = self.open_results
            self._many = max(MANY_RESULTS, 2 * len(self._results))
        if _is_open(result):
            self._results.append(result)

    @property
    def open_results(self) -> list[Result[Any]]:
        """The results that still read from the connection: streams, and where cursors are lazy, every other one."""
        return [result for result in self._results if _is_open(result)]

    def forget_read_results(self) -> None:
        """Leave the results that were read to their end as they are: they read nothing more from the connection."""
        self._results = self.open_results

    def close_results(self, *, discarded: bool = False) -> None:
        """Close the results that would otherwise go on reading from a connection that somebody else has by then.

        If the connection was ``discarded``, nothing is sent on it.
        """
        if not self.inherited:
            results, self._results = self._results, []
            for result in results:
                core_result: Any = getattr(result, "raw", result)
                if discarded:
                    core_result.cursor = _CLOSED_CURSOR
                result.close()
                core_result.cursor = _CLOSED_CURSOR  # a loop over its rows that has begun reads on from there

    def _check_own(self) -> None:
        if self.inherited:
            raise ScopeClosedError(
                "This session belongs to the parent process, which goes on with its transaction; nothing was sent on "
                "its connection. Open a session_scope() here."
            )

    def check_alone(self, error: BaseException | None = None) -> None:
        """Raise `ConcurrentUseError`, from ``error``, beside a statement or the end of another thread or task."""
        if self.busy or (self.ending is not None and self.ending != self._current_owner()):
            raise ConcurrentUseError(TWO_AT_ONCE) from error

    def wait_alone(self) -> None:
        """Wait up to `LONGEST_WAIT` for the statement of another thread or task, which a ROLLBACK would cut into."""
        deadline = time.monotonic() + LONGEST_WAIT
        while self.busy and time.monotonic() < deadline:
            if self._current_owner is asyncio.current_task:
                await_only(asyncio.sleep(POLL_INTERVAL))
            else:
                time.sleep(POLL_INTERVAL)

    def check_alive(self, pooled: PoolProxiedConnection) -> None:
        """Raise `TransactionAbortedError` if the server has already aborted the transaction.

        The server is asked, and only after an error: judging by the error alone would call a recovered
        savepoint aborted.  Where the driver knows, errors of raw cursors are seen too.
        """
        error, self.error = self.error, None
        if self._is_aborted(pooled, error):
            self.error = error
            what = "An error" if error is None else type(error).__name__
            raise TransactionAbortedError(
                f"{what} was raised and caught, but the database has aborted this transaction because of it, so "
                "nothing of it can be committed. Let the error propagate, call rollback() before you go on, or, unless "
                "it is a deadlock, put the statement that may fail into begin_nested()."
            ) from error

    def check_can_commit(self, pooled: PoolProxiedConnection) -> None:
        """Raise whatever forbids a COMMIT, an explicit one too."""
        self._check_own()
        if self.doomed is not None:
            raise TransactionAbortedError(
                f"This unit of work is doomed ({self.doomed}) and rolls back, whatever happens. What must be "
                "saved all the same belongs in a session_scope(new=True)."
            )
        self.ending = self._current_owner()  # first: no statement of another one begins from here on
        self.check_alone()
        if self._results:
            self.close_results()  # first: on SQLite nothing is committed while a statement is being read
        self.check_alive(pooled)

    def commit_failed(self, error: BaseException, raised: BaseException, dialect: Dialect) -> bool:
        """Note that a COMMIT, or one of the two phases, raised ``error``; ``raised`` is what the user's code gets.

        Returns:
            True if the connection must be discarded, because the server has not clearly answered.
        """
        self.commit_error = raised
        first_phase = self.commit_state == commits.PREPARING
        driver_error = (error.orig if isinstance(error, DBAPIError) else None) or error  # a phase may be a statement
        if self.commit_state != commits.COMMITTING_PREPARED and (
            backend_for(dialect.name).has_refused_commit(driver_error, dialect)
        ):
            self.commit_state = commits.ROLLED_BACK if first_phase else commits.OPEN
        if not first_phase:  # in it, what was prepared is yet to be rolled back
            commits.add_note(raised, commits.note_for(self.fellows))
        return self.commit_state in commits.SENT

    def _is_aborted(self, pooled: PoolProxiedConnection, error: BaseException | None) -> bool:
        backend = backend_for(self._dialect.name)
        if error is not None and not is_autocommit(self.options) and backend.is_aborted(pooled, error, self._dialect):
            return True
        return backend.is_known_to_be_aborted(pooled)


def guard_of(connection: Connection) -> ConnectionGuard | None:
    """Return the guard of the session that holds ``connection``; None for a Core connection."""
    return _guard_of(connection.connection)


def _guard_of(pooled: PoolProxiedConnection) -> ConnectionGuard | None:
    """As `guard_of`.

    A session that has given the connection back may not have released its guard when somebody else takes it from the
    pool, as another object.
    """
    try:
        held: Callable[[], ConnectionGuard | None] | None = pooled.info.get(KEY)
    except NotImplementedError:
        return None  # a dialect's first connection, on which it asks the server for its version
    guard = None if held is None else held()
    return guard if guard is not None and guard._pooled() is pooled else None


def guard_connections(engine: Engine) -> None:
    """Have the guards see what is done on ``engine``, and on all engines that share its dialect."""
    dialect = engine.dialect
    if dialect in _guarded:
        return
    _guarded.add(dialect)
    event.listen(engine, "do_execute", _execute)
    event.listen(engine, "do_executemany", _execute_many)
    event.listen(engine, "do_execute_no_params", _execute_without_parameters)
    event.listen(engine, "handle_error", _handle_error)
    methods: Any = dialect
    methods.do_commit = _commit(dialect.do_commit)
    methods.create_xid = wrap_create_xid(dialect.create_xid)
    methods.do_prepare_twophase = _prepare(dialect.do_prepare_twophase)
    methods.do_commit_twophase = _commit_prepared(dialect.do_commit_twophase)
    methods.do_rollback_twophase = _roll_back_prepared(dialect.do_rollback_twophase)
    methods.do_rollback = _alone(dialect.do_rollback)


_guarded: WeakSet[Dialect] = WeakSet()


def _execute(cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool | None:
    return _guarded_execute(context, context.dialect.do_execute, cursor, statement, parameters, context)


def _execute_many(cursor: Any, statement: str, parameters: Any, context: ExecutionContext) -> bool | None:
    return _guarded_execute(context, context.dialect.do_executemany, cursor, statement, parameters, context)


def _execute_without_parameters(cursor: Any, statement: str, context: Any) -> bool | None:
    return _guarded_execute(context, context.dialect.do_execute_no_params, cursor, statement, context)


def _guarded_execute(context: Any, call: Callable[..., None], *arguments: Any) -> bool | None:
    """Return True if the statement was executed here; None leaves it to SQLAlchemy."""
    pooled = context.root_connection.connection
    guard = _guard_of(pooled)
    if guard is None:
        return None
    guard.execute(pooled, call, *arguments)
    if guard.has_lazy_cursors or context._is_server_side:
        _keep_result(context, guard)
    return True


def _keep_result(context: Any, guard: ConnectionGuard) -> None:
    """Have ``guard`` keep the result that ``context`` is about to make of the statement that was executed.

    SQLAlchemy has no event that shows every result: ``after_execute`` leaves out ``exec_driver_sql()``, and
    ``do_orm_execute`` whatever a session's connection executes, and both slow down statements without one.  So
    the method of this one context is replaced until it was called; ``_is_server_side``, too, is not public.
    """

    def make_result() -> CursorResult[Any]:
        del context._setup_result_proxy
        if context._is_server_side:
            context.cursor = _GuardedCursor(context.cursor, guard)  # which the result reads from, at once or later
        result: CursorResult[Any] = context._setup_result_proxy()
        if not isinstance(result.cursor_strategy, FullyBufferedCursorFetchStrategy):  # it has all its rows
            guard.keep_result(result)
        return result

    context._setup_result_proxy = make_result


def _is_open(result: Any) -> bool:
    """Return False once a result was read to its end: Core's has no cursor then; an ORM result contains one of Core."""
    return getattr(getattr(result, "raw", result), "cursor", None) is not None


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    guard = guard_of(connection)
    if guard is None or isinstance(context.original_exception, SessionPluginError):
        return
    guard.error = context.sqlalchemy_exception or context.original_exception
    if guard.read_only_policy is not None and (
        backend_for(context.dialect.name).has_refused_to_write(context.original_exception)
    ):
        commits.add_note(
            guard.error,
            f"This unit of work is under the read-only policy {guard.read_only_policy}. To write, choose another one "
            "before its first statement: @db.policy(commit_on_success) on the endpoint, or db.use(commit_on_success).",
        )
    if (
        guard.commit_state in commits.SENT
        and guard.commit_failed(context.original_exception, guard.error, context.dialect)
        and not context.is_disconnect
    ):
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False


def _commit(commit: Callable[[PoolProxiedConnection], None]) -> Callable[[PoolProxiedConnection], None]:
    """Wrap the dialect's COMMIT, which runs only if nothing forbids it."""

    @wraps(commit)
    def checked(pooled: PoolProxiedConnection) -> None:
        guard = _guard_of(pooled)
        if guard is None:
            commit(pooled)
        else:
            guard.commit(pooled, commit)

    return checked


def _prepare(prepare: Callable[[Connection, Any], None]) -> Callable[[Connection, Any], None]:
    """Wrap the first phase of a two-phase commit, which runs only if nothing forbids it."""

    @wraps(prepare)
    def checked(connection: Connection, xid: Any) -> None:
        guard = guard_of(connection)
        if guard is None:
            prepare(connection, xid)
            return
        guard.check_can_commit(connection.connection)
        guard.xid, guard.commit_state = xid, commits.PREPARING
        prepare(connection, xid)
        guard.commit_state = commits.PREPARED

    return checked


def _commit_prepared(commit: Callable[..., None]) -> Callable[..., None]:
    """Wrap the second phase, whose failure leaves either of two states."""

    @wraps(commit)
    def noted(connection: Connection, xid: Any, *how: Any, **named: Any) -> None:
        guard = guard_of(connection)
        if guard is None or guard.commit_state != commits.PREPARED:
            commit(connection, xid, *how, **named)
            return
        guard.commit_state = commits.COMMITTING_PREPARED
        guard.ending = guard._current_owner()  # after an explicit prepare() another one may end the transaction
        commit(connection, xid, *how, **named)
        guard.commit_state = commits.COMMITTED

    return noted


def _roll_back_prepared(roll_back: Callable[..., None]) -> Callable[..., None]:
    """Wrap the rollback of a two-phase transaction; once another one's second phase has begun, it stays prepared."""

    @wraps(roll_back)
    def noted(connection: Connection, xid: Any, *how: Any, **named: Any) -> None:
        guard = guard_of(connection)
        if guard is not None:
            guard.ending = None  # its statements are those of whoever rolls back
        if guard is not None and guard.commit_state == commits.ROLLED_BACK:
            connection.invalidate()  # the server refused to prepare; psycopg would send ROLLBACK PREPARED all the same
            return
        if guard is not None and guard.commit_state == commits.PREPARED:
            if commits.is_second_phase(guard.fellows):
                connection.invalidate()  # its driver refuses to do anything else with it
                return
            guard.commit_state = commits.PREPARING
        roll_back(connection, xid, *how, **named)
        if guard is not None and guard.xid is not None:
            guard.commit_state = commits.ROLLED_BACK

    return noted


def _alone(rollback: Callable[[PoolProxiedConnection], None]) -> Callable[[PoolProxiedConnection], None]:
    """Wrap the dialect's ROLLBACK, which waits for a statement that another thread or task is executing.

    If that takes too long, the connection is discarded.  On a connection of the parent process nothing is sent.
    """

    @wraps(rollback)
    def alone(pooled: PoolProxiedConnection) -> None:
        guard = _guard_of(pooled)
        if guard is None:
            rollback(pooled)
        else:
            guard.roll_back(pooled, rollback)

    return alone
