"""What a statement does to a transaction that must be undone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection

from ...engines.backends import backend_for
from ...engines.backends.postgresql import CHECK_CONSTRAINTS
from ...engines.backends.syntax import Syntax
from ...engines.statements import effects, tokens
from ...exceptions import IsolationError, ReadOnlyError
from ...scope.unit_of_work import UnitOfWork

_CONTROL = re.compile(
    r"\s*(?:BEGIN|START\s+TRANSACTION|SAVEPOINT|RELEASE|ROLLBACK|COMMIT|PRAGMA|SET\s+(?:CONSTRAINTS|TRANSACTION))\b",
    re.IGNORECASE,
)
_ENDS = re.compile(
    r"\s*(?:COMMIT|END|ABORT|ROLLBACK(?!\s+(?:WORK\s+)?TO\b)|BEGIN|START\s+TRANSACTION)\b", re.IGNORECASE
)


_PLAIN_SET = re.compile(r"\s*SET\s+(?!STATEMENT\b|[^;]*?\bSELECT\b)", re.IGNORECASE)
_CUSTOM_SETTING = re.compile(r"\b[A-Za-z_][A-Za-z0-9_$]*(?:\.[A-Za-z_][A-Za-z0-9_$]*)+")
"""The name of a setting that an app makes up, such as ``app.tenant``."""
_LONGEST_NAME = 200


@lru_cache(maxsize=512)
def may_set(statement: str, syntax: Syntax) -> bool:
    """Return True if ``statement`` may change a setting, for the transaction or for longer."""
    if statement == CHECK_CONSTRAINTS:
        return False
    if effects(statement, syntax).changes_session:
        return True
    before = ";"
    for token in tokens(statement, syntax):
        if token == "SET_CONFIG" or (token == "SET" and before == ";"):
            return True
        before = token
    return False


def custom_settings(statement: str, parameters: Any) -> set[str]:
    """Return what may be the names of custom settings in ``statement`` and its parameters."""
    texts = [statement, *(value for value in _values(parameters) if len(value) <= _LONGEST_NAME)]
    return {name.lower() for value in texts for name in _CUSTOM_SETTING.findall(value)}


def _values(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, str):
        yield parameters
    elif isinstance(parameters, Mapping):
        yield from _values(list(parameters.values()))
    elif isinstance(parameters, list | tuple):
        for value in parameters:
            yield from _values(value)


def controls(statement: str) -> bool:
    """Return True if ``statement`` begins, ends, sets or checks a transaction or a savepoint."""
    return statement == CHECK_CONSTRAINTS or _CONTROL.match(statement) is not None


def may_begin(statement: str) -> bool:
    """Return True if ``statement`` may begin a transaction on the server: a SET without a query in it does not."""
    return not (controls(statement) or _PLAIN_SET.match(statement))


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
