"""Which modules an import loads, checked in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

FRAMEWORKS = ("flask", "werkzeug", "starlette", "fastapi", "anyio", "uvicorn")
CORE = ("session_plugin", "session_plugin.asgi", "session_plugin.wsgi")


@cache
def loaded_by(*modules: str) -> frozenset[str]:
    """The top-level packages that a fresh interpreter has loaded after importing ``modules``."""
    code = f"import {', '.join(modules)}, sys; print(*sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return frozenset(printed.split())


@pytest.mark.parametrize("module", CORE)
def test_the_core_imports_no_framework(module: str) -> None:
    assert loaded_by(module).isdisjoint(FRAMEWORKS)


@pytest.mark.parametrize("module", [*CORE, "session_plugin.flask"])
def test_a_sync_import_loads_nothing_async(module: str) -> None:
    """A sync install has no greenlet, so a sync import loads neither it nor ``sqlalchemy.ext.asyncio``.

    Modules that SQLAlchemy itself loads do not count.
    """
    ours = loaded_by(module) - loaded_by("sqlalchemy.orm")
    assert ours.isdisjoint({"greenlet", "sqlalchemy.ext.asyncio"})


@pytest.mark.parametrize("module", CORE)
def test_an_import_loads_neither_sqlite3_nor_the_thread_pool(module: str) -> None:
    """Only apps on SQLite need ``sqlite3``, and only sync sessions under an event loop need the thread pool."""
    ours = loaded_by(module) - loaded_by("sqlalchemy.orm")
    assert ours.isdisjoint({"sqlite3", "concurrent.futures.thread"})


def test_an_adapter_imports_its_own_framework_only() -> None:
    assert loaded_by("session_plugin.flask").isdisjoint({"starlette", "fastapi"})
    assert loaded_by("session_plugin.starlette").isdisjoint({"flask", "fastapi"})
    assert loaded_by("session_plugin.fastapi").isdisjoint({"flask"})
