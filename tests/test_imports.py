"""Who imports whom, asked of a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import session_plugin

PACKAGE = Path(session_plugin.__file__).parent
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
    """A sync install has no greenlet; what SQLAlchemy itself loads does not count."""
    ours = loaded_by(module) - loaded_by("sqlalchemy.orm")
    assert ours.isdisjoint({"greenlet", "sqlalchemy.ext.asyncio"})


@pytest.mark.parametrize("module", CORE)
def test_an_import_loads_no_driver_and_no_pool_of_threads(module: str) -> None:
    """Only apps on SQLite need the one, and sync sessions under an event loop the other."""
    ours = loaded_by(module) - loaded_by("sqlalchemy.orm")
    assert ours.isdisjoint({"sqlite3", "concurrent.futures.thread"})


def test_an_adapter_imports_its_own_framework_only() -> None:
    assert loaded_by("session_plugin.flask").isdisjoint({"starlette", "fastapi"})
    assert loaded_by("session_plugin.starlette").isdisjoint({"flask", "fastapi"})
    assert loaded_by("session_plugin.fastapi").isdisjoint({"flask"})


LAYERS = [
    {"exceptions", "typevars"},
    {"current"},
    {"policy", "_drive", "_permits", "_threads", "_hooks", "_mysql", "_autocommit"},
    {"_watch", "_lifecycle", "_sqlite", "configuration", "_processes"},
    {"_work", "_pools"},
    {"_session", "_engines"},
    {"_begin"},
    {"scope"},
    {"access"},
    {"sync_access", "async_access"},
    {"database"},
    {"plugin", "_client", "wsgi"},
    {"_asgi"},
    {"asgi"},
    {"starlette", "flask"},
    {"fastapi"},
    {"testing"},
]
"""Each module may import those of the layers above it in this list."""


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in typing_only:
            top = path.parent if node.level == 1 else path.parents[node.level - 1]
            if top != PACKAGE:
                continue
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found.update(names)
    return found


LATE = {("sync_access", "testing"), ("async_access", "testing")}
"""``db.isolated()`` imports the test kit when it is called."""


def test_the_layers_hold() -> None:
    """A module imports only what stands below it, and every module has its place."""
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        name = inside.parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        for imported in imports_of(path):
            assert level[imported] < level[name] or (name, imported) in LATE, f"{inside} imports {imported}"


def test_no_module_and_no_function_outgrows_a_head() -> None:
    """At most 300 lines a module, and 40 a function, its docstring aside."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 40, (path, node.name)
