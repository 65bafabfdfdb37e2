"""What a statement does to a transaction that must be undone."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection

from ...engines.backends import backend_for
from ...engines.backends.postgresql import CHECK_CONSTRAINTS
from ...engines.statements import effects
from ...exceptions import IsolationError, ReadOnlyError
from ...scope.unit_of_work import UnitOfWork

_CONTROL = re.compile(
    r"\s*(?:BEGIN|START\s+TRANSACTION|SAVEPOINT|RELEASE|ROLLBACK|COMMIT|PRAGMA|SET\s+(?:CONSTRAINTS|TRANSACTION))\b",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"\s*(?:COMMIT|END|ABORT|ROLLBACK(?!\s+(?:WORK\s+)?TO\b)|BEGIN|START\s+TRANSACTION)\b", re.IGNORECASE
)


def controls(statement: str) -> bool:
    """Return True if ``statement`` begins, ends, sets or checks a transaction or a savepoint."""
    return statement == CHECK_CONSTRAINTS or _CONTROL.match(statement) is not None


def check(connection: Connection, statement: str, unit: UnitOfWork[Any] | None) -> bool:
    """Return True if ``statement`` may write.

    Raises:
        IsolationError: it would end the transaction of the test.
        ReadOnlyError: the policy is read-only, and this database does not enforce that inside a transaction.
    """
    backend = backend_for(connection.dialect.name)
    implicit_commit = backend.implicit_commit
    if _ENDS.match(statement) or (implicit_commit is not None and implicit_commit.match(statement)):
        raise IsolationError(
            "This statement commits or ends the transaction in which the test is isolated. Call commit() or rollback() "
            f"on the session; create tables before the test: {statement.strip()[:80]}"
        )
    found = effects(statement, backend.syntax)
    if found.writes and not backend.enforces_read_only_in_savepoint and unit is not None and unit.policy.read_only:
        raise ReadOnlyError(
            f"The policy {unit.policy.name} is read-only, and this statement writes. Choose another policy."
        )
    return found.may_write
