"""SQLite, made to keep its transactions.

Python's driver leaves BEGIN to a guess of its own, by which DDL is not rolled back and a
released savepoint survives an outer ROLLBACK.  Here BEGIN is sent, always, and says what the
transaction is for: IMMEDIATE where it may write, so that two writers wait for one another
instead of failing with "database is locked".
"""

from __future__ import annotations

import logging
from typing import Any
from uuid import uuid4
from weakref import finalize

from sqlalchemy import URL, Connection, Engine, event

from ._autocommit import is_autocommit
from .exceptions import ConfigurationError

BEGIN_OPTION = "session_plugin_sqlite_begin"
IMMEDIATE = "IMMEDIATE"
READ_ONLY = "READ ONLY"
_QUERY_ONLY = "session_plugin.query_only"
_SHARED_MEMORY_SINCE = (3, 36)

logger = logging.getLogger("session_plugin")


def shared_memory_url(url: URL, owner: object) -> URL:
    """For an in-memory URL, one that every thread's connection opens as the same database.

    The database lives as long as ``owner``.  SQLAlchemy's own choice would be a database per
    thread, or one connection on which the transactions of all requests mix.
    """
    if url.get_backend_name() != "sqlite" or url.host or url.database not in (None, "", ":memory:"):
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


def prepare(engine: Engine) -> None:
    """Make every transaction of ``engine`` a real one."""
    event.listen(engine, "begin", _recommend_wal, once=True)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "reset", _reset)


def _begin(connection: Connection) -> None:
    if is_autocommit(connection.get_execution_options()):
        return
    pooled = connection.connection
    if pooled.driver_connection.in_transaction:  # type: ignore[union-attr]
        return  # the engine's owner listens too, or has chosen autocommit=False
    mode = connection.get_execution_options().get(BEGIN_OPTION)
    if mode == READ_ONLY:
        pooled.info[_QUERY_ONLY] = True
        connection.exec_driver_sql("PRAGMA query_only = ON")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if mode == IMMEDIATE else "BEGIN")


def _reset(dbapi_connection: Any, record: Any, reset_state: Any) -> None:
    if reset_state.terminate_only:
        return
    if record.driver_connection.in_transaction:
        dbapi_connection.rollback()  # after a COMMIT that failed, SQLAlchemy takes the connection for clean
    if record.info.pop(_QUERY_ONLY, None):
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA query_only = OFF")
        cursor.close()


def _recommend_wal(connection: Connection) -> None:
    mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    if mode not in ("wal", "memory"):
        logger.warning(
            "This SQLite database is in journal mode %r, in which readers and writers block each other. "
            'Execute "PRAGMA journal_mode=WAL" on the file once; it stays.',
            mode,
        )
