"""The constraints that only COMMIT checks, checked where the app's COMMIT would have been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

Check = Callable[[Connection], None]

CHECK_CONSTRAINTS = """DO $$ BEGIN
    BEGIN
        SET CONSTRAINTS ALL IMMEDIATE;
        RAISE 'checked' USING ERRCODE = 'SP000';
    EXCEPTION WHEN SQLSTATE 'SP000' THEN
        NULL;
    END;
END $$"""


def check_of(connection: Connection) -> Check:
    """What checks the deferred constraints on ``connection``, whose transaction has just begun."""
    if connection.dialect.name == "postgresql":
        return _check_postgresql
    if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
        known = _violations(connection)

        def check(connection: Connection) -> None:
            if _violations(connection) - known:
                message = "FOREIGN KEY constraint failed"
                raise IntegrityError("COMMIT", None, connection.dialect.dbapi.IntegrityError(message))  # type: ignore[union-attr]

        return check
    return _check_nothing


def _check_postgresql(connection: Connection) -> None:
    """Check all, and leave them as they are: the error that ends the inner block restores which ones are deferred."""
    connection.exec_driver_sql(CHECK_CONSTRAINTS)


def _violations(connection: Connection) -> set[tuple[Any, ...]]:
    return {tuple(row) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")}


def _check_nothing(connection: Connection) -> None:
    """The database has no constraint that waits for COMMIT."""
