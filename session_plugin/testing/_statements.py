"""What a statement does to a transaction that must be undone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from .. import _mysql
from .._watch import WRITING
from ..exceptions import IsolationError, ReadOnlyError
from ._constraints import CHECK_CONSTRAINTS

if TYPE_CHECKING:
    from ..scope import SessionScope

_CONTROL = re.compile(
    r"\s*(?:BEGIN|START\s+TRANSACTION|SAVEPOINT|RELEASE|ROLLBACK|COMMIT|PRAGMA|SET\s+(?:CONSTRAINTS|TRANSACTION))\b",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"\s*(?:COMMIT|END|ABORT|ROLLBACK(?!\s+(?:WORK\s+)?TO\b)|BEGIN|START\s+TRANSACTION)\b", re.IGNORECASE
)
_COMMITS_ON_MYSQL = re.compile(
    r"\s*(?:(?:CREATE|DROP)(?!\s+TEMPORARY)|ALTER|TRUNCATE|RENAME|LOCK\s+TABLES|GRANT|REVOKE)\b", re.IGNORECASE
)


def controls(statement: str) -> bool:
    """True if ``statement`` begins or ends a transaction or a savepoint, or sets or checks it."""
    return statement == CHECK_CONSTRAINTS or _CONTROL.match(statement) is not None


def check(connection: Connection, statement: str, scope: SessionScope[Any] | None) -> bool:
    """True if ``statement`` writes.

    Raises:
        IsolationError: it would end the transaction of the test.
        ReadOnlyError: the policy does not write, and this database is not told so inside a transaction.
    """
    is_mysql = connection.dialect.name in _mysql.NAMES
    if _ENDS.match(statement) or (is_mysql and _COMMITS_ON_MYSQL.match(statement)):
        raise IsolationError(
            "This statement commits or ends the transaction in which the test is isolated. Call commit() or rollback() "
            f"on the session; create tables before the test: {statement.strip()[:80]}"
        )
    writes = WRITING.match(statement) is not None
    if writes and is_mysql and scope is not None and scope.policy.read_only:
        raise ReadOnlyError(
            f"The policy {scope.policy.name} does not write, and this statement would have. Choose another policy."
        )
    return writes


def begin_read_only(connection: Connection) -> None:
    """Let the database refuse writes until the savepoint that was just begun has ended."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
    elif connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA query_only = ON")


def end_read_only(connection: Connection) -> None:
    """Let it accept them again; PostgreSQL does by itself."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("PRAGMA query_only = OFF")
