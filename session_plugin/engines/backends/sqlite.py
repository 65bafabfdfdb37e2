"""SQLite, with real transactions.

Python's driver decides by itself when to send BEGIN, so that DDL is not rolled back and a released
savepoint survives an outer ROLLBACK.  Here BEGIN is sent, and says what the transaction is for: IMMEDIATE
where it may write, so that two writers wait for one another instead of failing with "database is locked".

On an engine that the user made, it is sent where a unit of work begins only: a connection that nobody has
taken for a unit of work holds no lock between its statements, and its user may rely on that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import finalize

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.pool import PoolProxiedConnection

from ...exceptions import ConfigurationError
from ..autocommit import is_autocommit
from .interface import Backend, CommitFailure, LockListener
from .syntax import HARMLESS, Syntax, words

SYNTAX = Syntax(
    backslash_escapes=False,
    hash_comments=False,
    nested_comments=False,
    dollar_quotes=False,
    backticks=True,
    brackets=True,
    dashes_need_space=False,
    harmless=HARMLESS
    | words("""
        acos asin atan atan2 bm25 changes char cos datetime degrees format generate_series glob group_concat hex
        highlight ifnull iif instr json json_array json_array_length json_each json_extract json_group_array
        json_group_object json_insert json_object json_patch json_quote json_remove json_replace json_set json_tree
        json_type json_valid jsonb julianday last_insert_rowid like likelihood likely log10 log2 pi pow
        pragma_foreign_key_list pragma_index_info pragma_index_list pragma_table_info pragma_table_list
        pragma_table_xinfo printf quote radians random randomblob sin snippet soundex sqlite_version strftime
        string_agg tan timediff total total_changes trunc typeof unhex unicode unixepoch unlikely zeroblob
    """),
    operators=words("glob match regexp"),
)

_BEGIN_OPTION = "session_plugin_sqlite_begin"
_DEFERRED = "DEFERRED"
_IMMEDIATE = "IMMEDIATE"
_READ_ONLY = "READ ONLY"
_BEGAN = "session_plugin.began"
"""In the ``info`` of a connection on which a transaction was begun here: how."""
_SHARED_MEMORY_SINCE = (3, 36)
_SQLITE_READONLY = 8
"""SQLITE_READONLY, among SQLite's result codes."""
_LOCKED = {5, 6}
"""SQLITE_BUSY, _LOCKED."""
_lock_listeners: set[LockListener] = set()
_REFUSALS = {1, 5, 6, 8, 9, 13, 19}
"""SQLITE_ERROR, _BUSY, _LOCKED, _READONLY, _INTERRUPT, _FULL, _CONSTRAINT.  Not _IOERR: a COMMIT whose last
``fsync`` failed may be found in the file all the same."""

logger: logging.Logger = logging.getLogger("session_plugin")


class SQLite(Backend):
    """A file, or a database in memory that all threads share."""

    names: tuple[str, ...] = ("sqlite",)
    syntax = SYNTAX
    async_driver: str | None = "aiosqlite"
    read_only_statement: str | None = "PRAGMA query_only = ON"
    goes_on_after_abort: bool = True
    sees_raw_writes: bool = True
    enforces_read_only_in_savepoint: bool = True
    create_statement: str | None = None
    drop_statement: str | None = None

    def is_in_memory(self, url: URL) -> bool:
        """True for ``sqlite://`` and ``sqlite:///:memory:``."""
        return not url.host and url.database in (None, "", ":memory:")

    def connect_url(self, url: URL, owner: object) -> URL:
        """For a database in memory, return a URL that every thread's connection opens as the same database.

        It exists as long as ``owner``.  SQLAlchemy's own choice would be a database for each thread, or one
        connection on which the transactions of all requests mix.
        """
        if not self.is_in_memory(url):
            return url
        import sqlite3  # not every app has a SQLite database, nor every Python its driver

        if sqlite3.sqlite_version_info < _SHARED_MEMORY_SINCE:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} cannot share an in-memory database between threads. "
                "Name a file, or use SQLite 3.36 or newer."
            )
        name = f"file:/session_plugin-{uuid4().hex}"
        anchor = sqlite3.connect(f"{name}?vfs=memdb", uri=True, check_same_thread=False)
        finalize(owner, anchor.close)
        return url.set(database=name).update_query_dict({"vfs": "memdb", "uri": "true"})

    def in_folder(self, url: URL, folder: str) -> URL:
        """Put a relative path into ``folder``, which is created if it is missing."""
        scheme = "file:" if (url.database or "").startswith("file:") else ""
        path = (url.database or "").removeprefix(scheme)
        in_memory = self.is_in_memory(url) or path == ":memory:" or "memory" in (url.query.get("mode"), path)
        if not path or in_memory or Path(path).is_absolute() or "vfs" in url.query:
            return url
        Path(folder).mkdir(parents=True, exist_ok=True)
        return url.set(database=f"{scheme}{Path(folder) / path}")

    def prepare(self, engine: Engine, *, made_here: bool) -> None:
        """Make every transaction of ``engine`` a real one; on one that the user made, those of units of work."""
        recommends_wal = True

        def begin(connection: Connection) -> None:
            nonlocal recommends_wal
            mode = connection.get_execution_options().get(_BEGIN_OPTION, _DEFERRED if made_here else None)
            if mode is not None:
                if recommends_wal:
                    recommends_wal = False
                    _recommend_wal(connection)
                _begin(connection, mode)

        event.listen(engine, "begin", begin)
        event.listen(engine, "reset", _reset)

    def begin_options(self, *, read_only: bool, may_write: bool) -> dict[str, Any]:
        """Refuse writes, or take the write lock at BEGIN, before the first read."""
        return {_BEGIN_OPTION: _READ_ONLY if read_only else _IMMEDIATE if may_write else _DEFERRED}

    def is_aborted(self, pooled: PoolProxiedConnection, error: BaseException, dialect: Dialect) -> bool:
        """SQLite itself knows whether a transaction is open."""
        driver_connection: Any = pooled.driver_connection
        return not driver_connection.in_transaction

    def has_refused_commit(self, error: BaseException, dialect: Dialect) -> bool:
        """By SQLite's result code, whose lowest byte is the primary one."""
        code: int | None = getattr(error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in _REFUSALS

    def has_refused_to_write(self, error: BaseException) -> bool:
        """By SQLite's result code."""
        code: int | None = getattr(error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF == _SQLITE_READONLY

    def listen_for_locks(self, listener: LockListener) -> None:
        """Listen on the dialect, since the engine that is kept waiting may be one that nobody has given to us."""
        if listener in _lock_listeners:
            return
        _lock_listeners.add(listener)
        from sqlalchemy.dialects.sqlite import dialect  # the base of those of all drivers

        def handle_error(context: ExceptionContext) -> None:
            error, engine = context.sqlalchemy_exception, context.engine
            code = getattr(context.original_exception, "sqlite_errorcode", 0)
            if code & 0xFF in _LOCKED and error is not None and engine is not None:
                listener(error, partial(_has_transaction_on, _file_of(engine), context.connection))

        event.listen(dialect, "handle_error", handle_error)

    def write_mark(self, pooled: PoolProxiedConnection) -> Any:
        """SQLite counts the rows that a connection has changed."""
        return getattr(pooled.driver_connection, "total_changes", None)

    def has_written(self, pooled: PoolProxiedConnection, mark: Any, dialect: Dialect) -> bool:
        """Compare the counts; tables that are created or dropped change none."""
        return bool(self.write_mark(pooled) != mark)

    def deferred_constraints_check(self, connection: Connection) -> Callable[[Connection], None]:
        """Compare the violated foreign keys with those that were violated before."""
        if not connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
            return super().deferred_constraints_check(connection)
        known = _violations(connection)

        def check(connection: Connection) -> None:
            if _violations(connection) - known:
                self.raise_commit_failure(connection, "integrity")

        return check

    def begin_read_only_savepoint(self, connection: Connection) -> None:
        """A pragma is no part of the transaction, and has to be taken back by hand."""
        connection.exec_driver_sql("PRAGMA query_only = ON")

    def end_read_only_savepoint(self, connection: Connection) -> None:
        """Accept writes again."""
        connection.exec_driver_sql("PRAGMA query_only = OFF")

    def raise_commit_failure(self, connection: Connection, failure: CommitFailure) -> None:
        """Raise one of the two errors that COMMIT can raise; without a second writer no statement provokes them."""
        driver: Any = connection.dialect.dbapi
        if failure == "integrity":
            raise IntegrityError("COMMIT", None, driver.IntegrityError("FOREIGN KEY constraint failed"))
        raise OperationalError("COMMIT", None, driver.OperationalError("database is locked"))

    def worker_url(self, url: URL, worker: str) -> URL:
        """Name a file beside that of ``url``."""
        path = Path(url.database or "")
        return url.set(database=str(path.with_stem(f"{path.stem}_{worker}")))

    def files(self, url: URL) -> list[Path]:
        """The database and what its journal mode leaves beside it."""
        return [Path(f"{url.database}{suffix}") for suffix in ("", "-wal", "-shm")]


def _begin(connection: Connection, mode: str) -> None:
    if is_autocommit(connection.get_execution_options()):
        return
    pooled: Any = connection.connection
    pooled.info[_BEGAN] = mode
    if pooled.driver_connection.in_transaction:
        return  # the owner of the engine listens too, or has chosen autocommit=False
    if mode == _READ_ONLY:
        connection.exec_driver_sql("PRAGMA query_only = ON")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if mode == _IMMEDIATE else "BEGIN")


def _reset(dbapi_connection: Any, record: Any, reset_state: Any) -> None:
    if reset_state.terminate_only:
        return
    began = record.info.pop(_BEGAN, None)
    if began is None:
        return  # a connection of the user's own engine, or a raw one
    if record.driver_connection.in_transaction:
        dbapi_connection.rollback()  # after a COMMIT that failed, SQLAlchemy takes the connection for clean
    if began == _READ_ONLY:
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA query_only = OFF")
        cursor.close()


def _file_of(engine: Engine) -> Path | None:
    """Return the file that ``engine`` opens, which has one writer at a time; None if its URL does not say."""
    path = (engine.url.database or "").removeprefix("file:").partition("?")[0]
    return None if path in ("", ":memory:") else Path(path).resolve()


def _has_transaction_on(file: Path | None, besides: Connection | None, connection: Connection) -> bool:
    if connection is besides or connection.dialect.name != "sqlite" or file is None:
        return False
    return not is_autocommit(connection.get_execution_options()) and _file_of(connection.engine) == file


def _recommend_wal(connection: Connection) -> None:
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode not in ("wal", "memory"):
        logger.warning(
            "This SQLite database is in journal mode %r, in which readers and writers block each other. "
            'Execute "PRAGMA journal_mode=WAL" on the file once; it stays.',
            mode,
        )


def _violations(connection: Connection) -> set[tuple[Any, ...]]:
    return {tuple(row) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")}
