"""Where ``db.isolated()`` comes from: the test kit, which the core does not import."""

from __future__ import annotations

from importlib import import_module
from typing import Any

TEST_KIT = "session_plugin.testing"


def make_isolation(core: Any) -> Any:
    """Return a new `Isolation` of the database; the test kit is imported when a test asks for the first one."""
    return import_module(TEST_KIT).Isolation(core)
