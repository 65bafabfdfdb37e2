"""Connections in autocommit mode, on which every statement is a transaction of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEVEL = "AUTOCOMMIT"
_OPTION = "session_plugin_autocommit"


def is_autocommit(options: Mapping[str, Any]) -> bool:
    """Return True if a connection with these execution options has no transactions."""
    return options.get("isolation_level") == LEVEL or _OPTION in options


def autocommit_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``create_engine()`` options of an engine, changed to those of one in autocommit mode.

    The level is an option of the engine: as an execution option, SQLAlchemy would set and reset it at
    every checkout.  A result knows its ``rowcount`` after its cursor was closed too.
    """
    return {
        **options,
        "isolation_level": LEVEL,
        "execution_options": {**options.get("execution_options", {}), _OPTION: True, "preserve_rowcount": True},
    }
