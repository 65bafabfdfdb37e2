"""PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from ..autocommit import is_autocommit
from .interface import Backend, CommitFailure

CHECK_CONSTRAINTS = """DO $$ BEGIN
    BEGIN
        SET CONSTRAINTS ALL IMMEDIATE;
        RAISE 'checked' USING ERRCODE = 'SP000';
    EXCEPTION WHEN SQLSTATE 'SP000' THEN
        NULL;
    END;
END $$"""
"""Checks all deferred constraints, and leaves them deferred: the error that ends the inner block restores that."""

_IN_ERROR = 3
"""libpq's PQTRANS_INERROR."""
_NO_REFUSAL = re.compile("08|40003|57P|58|XX")
"""The SQLSTATEs of lost connections, of "statement completion unknown", of sessions that the server ended (shutdown,
crash, idle time-out), and of failures inside the server; poolers use some of these too."""


class PostgreSQL(Backend):
    """Refuses every statement of an aborted transaction until ROLLBACK."""

    names = ("postgresql",)
    async_driver = "asyncpg"
    read_only_statement = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
    enforces_read_only_in_savepoint = True
    error_statements: Mapping[CommitFailure, str] = {
        "integrity": "DO $$ BEGIN RAISE EXCEPTION 'a test asked for this' USING ERRCODE = '23505'; END $$",
        "serialization": "DO $$ BEGIN RAISE EXCEPTION 'a test asked for this' USING ERRCODE = '40001'; END $$",
    }
    disconnect_statement = "SELECT pg_terminate_backend(pg_backend_pid())"
    drop_statement = "DROP DATABASE IF EXISTS {} WITH (FORCE)"  # the app may still have connections

    def begin_options(self, *, read_only: bool, may_write: bool) -> dict[str, Any]:
        """Begin READ ONLY where the policy says so."""
        return {"postgresql_readonly": True} if read_only else {}

    def begin_now(self, connection: Connection) -> None:
        """On asyncpg, SQLAlchemy sends BEGIN with the first statement; what the driver sent before commits itself."""
        if connection.dialect.driver == "asyncpg" and not is_autocommit(connection.get_execution_options()):
            driver_connection: Any = connection.connection.driver_connection
            if not driver_connection.is_in_transaction():
                connection.exec_driver_sql("SELECT 1").close()

    def is_known_to_be_aborted(self, pooled: PoolProxiedConnection) -> bool:
        """Psycopg and psycopg2 remember the state of the transaction; errors of raw cursors are seen this way too."""
        driver_connection = pooled.driver_connection
        libpq = getattr(driver_connection, "pgconn", None) or getattr(driver_connection, "info", None)
        return getattr(libpq, "transaction_status", None) == _IN_ERROR

    def has_refused_commit(self, error: BaseException, dialect: Dialect) -> bool:
        """An ERROR says so: the server has rolled back by then.  After a FATAL one the session is gone."""
        sqlstate: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return sqlstate is not None and not _NO_REFUSAL.match(sqlstate) and _severity_of(error) == "ERROR"

    def deferred_constraints_check(self, connection: Connection) -> Callable[[Connection], None]:
        """The same statement checks the constraints of any transaction."""
        return _check_constraints

    def begin_read_only_savepoint(self, connection: Connection) -> None:
        """PostgreSQL restores the mode of the transaction when the savepoint ends."""
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")


def _check_constraints(connection: Connection) -> None:
    connection.exec_driver_sql(CHECK_CONSTRAINTS)


def _severity_of(error: Any) -> str | None:
    """Return the severity in English: of psycopg and psycopg2 from ``diag``, of asyncpg from the error it wraps."""
    fields = getattr(error, "diag", None)
    severity: str | None = getattr(fields, "severity_nonlocalized", None) or getattr(
        error.__cause__, "severity_en", None
    )
    return severity
