"""Connections without transactions: each statement is saved by itself, or, in a pool for readers, refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, event

from .exceptions import ConfigurationError

LEVEL = "AUTOCOMMIT"
_OPTION = "session_plugin_autocommit"
_READ_ONLY = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}


def is_autocommit(options: Mapping[str, Any]) -> bool:
    """True if a connection with these execution options has no transactions."""
    return options.get("isolation_level") == LEVEL or _OPTION in options


def reader_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an engine, for one in autocommit mode.

    As an execution option the level would be set, and reset, whenever a connection is lent.
    """
    return {
        **options,
        "isolation_level": LEVEL,
        "execution_options": {**options.get("execution_options", {}), _OPTION: True},
    }


def forbid_writing(engine: Engine) -> None:
    """Make every connection of ``engine`` read-only from its first moment on.

    Raises:
        ConfigurationError: how to tell its server is not known.
    """
    statement = _READ_ONLY.get(engine.dialect.name)
    if statement is None:
        raise ConfigurationError(
            f"How to forbid writing outside a transaction on {engine.dialect.name} is not known here. Choose the "
            "policy read_only."
        )

    def forbid(dbapi_connection: Any, record: object) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute(statement)
        cursor.close()

    event.listen(engine, "connect", forbid)
