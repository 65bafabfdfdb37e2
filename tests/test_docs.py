"""The code in the documentation is executed, so that it stays correct.

Every ``python`` block of `README.md` and of `docs/` runs; the blocks of one page run in order and in one
module.  An HTML comment above a block can be ``<!-- needs: postgresql -->``, ``<!-- needs: redis -->``, or
``<!-- file: migrations/env.py -->``, which writes the block to that file for other blocks.  A
comment that begins with ``<!-- check`` contains code that runs but is not shown.  ``# prints: ...``
gives the output of a block.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine

import session_plugin
from session_plugin import exceptions

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?:needs: (?P<needs>\w+)|file: (?P<file>\S+)) -->\n)?```python\n(?P<shown>.*?)^```$"
    r"|^<!-- check\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
PRINTS = re.compile(r"# prints: (.*)$", re.MULTILINE)
POSTGRESQL_URL = re.compile(r"postgresql\+(\w+)://localhost/(\w+)")
REDIS_URL = "redis://localhost"
SERVERS = {"postgresql", "redis"}


@dataclass(frozen=True)
class Block:
    """A block of code, padded so that its line numbers agree with those of its page."""

    source: str
    needs: str | None
    file: str | None

    @property
    def checks(self) -> bool:
        """Whether running the block can fail for other reasons than an exception."""
        return "assert " in self.source or bool(PRINTS.search(self.source))


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in BLOCK.finditer(text):
        group = "shown" if match["shown"] is not None else "hidden"
        padding = "\n" * text.count("\n", 0, match.start(group))
        yield Block(padding + match[group], match["needs"], match["file"])


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def needs(page: Path) -> set[str]:
    return {block.needs for block in blocks(page) if block.needs}


class Namespace:
    """The module in which the blocks of one page run, and the event loop for blocks that await."""

    def __init__(self, page: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._page = page
        self._engines: dict[Any, Engine] = {}
        self._runner = asyncio.Runner()
        self._logging = logging.root.handlers[:], logging.root.level  # the migrations' env.py configures logging
        self._directory = directory
        self._module = ModuleType("shop")
        self._module.__file__ = str(directory / "shop.py")
        monkeypatch.chdir(directory)
        for name in ("shop", "models"):  # the names under which pages import their own blocks
            monkeypatch.setitem(sys.modules, name, self._module)

    def __enter__(self) -> Namespace:
        event.listen(Engine, "engine_connect", self._note)
        return self

    def __exit__(self, *error: object) -> None:
        event.remove(Engine, "engine_connect", self._note)
        for engine in self._engines.values():
            if engine.dialect.is_async:
                self._runner.run(AsyncEngine(engine).dispose())
            else:
                engine.dispose()
        self._runner.close()
        self._module.__dict__.clear()
        logging.root.handlers[:], level = self._logging
        logging.root.setLevel(level)
        gc.collect()  # so that a resource that is left open makes this page fail, and not a later one

    def _note(self, connection: Connection) -> None:
        self._engines[connection.engine.pool] = connection.engine

    def write(self, name: str, source: str) -> None:
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def run(self, source: str) -> None:
        code = compile(source, str(self._page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if code.co_flags & inspect.CO_COROUTINE:
            self._runner.run(eval(code, self._module.__dict__))
        else:
            exec(code, self._module.__dict__)


def run_page(
    page: Path, namespace: Namespace, capsys: pytest.CaptureFixture[str], servers: dict[str, Any] | None = None
) -> None:
    """Run the blocks of a page, without those that need a server if there are no ``servers``."""
    databases: dict[str, str] = {}

    def real_url(match: re.Match[str]) -> str:
        assert servers
        driver, name = match.groups()
        if name not in databases:
            databases[name] = servers["postgresql"].new_database()
        url: str = servers["postgresql"].url(driver, database=databases[name])
        return url

    with namespace:
        for block in blocks(page):
            source = block.source
            if block.needs and servers is None:
                continue
            if block.file:
                namespace.write(block.file, source)
                continue
            if block.needs == "postgresql":
                source = POSTGRESQL_URL.sub(real_url, source)
            elif block.needs == "redis" and servers:
                source = source.replace(REDIS_URL, servers["redis"].url)
            namespace.run(source)
            assert capsys.readouterr().out.splitlines() == PRINTS.findall(block.source)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The code of a page runs and prints what the page says."""
    run_page(page, Namespace(page, tmp_path, monkeypatch), capsys)


@pytest.mark.parametrize("page", [page for page in PAGES if needs(page)], ids=page_id)
def test_page_with_servers(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """The blocks of a page that need PostgreSQL or Redis run too."""
    servers = {name: request.getfixturevalue(name) for name in needs(page)}
    run_page(page, Namespace(page, tmp_path, monkeypatch), capsys, servers)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_is_checked(page: Path) -> None:
    """Every code block of a page is found, and a page with code contains at least one assertion or output."""
    found = list(blocks(page))
    text = page.read_text()
    assert text.count("```python") + text.count("<!-- check") == len(found)
    assert not found or any(block.checks for block in found)
    assert needs(page) <= SERVERS


def test_every_error_is_explained() -> None:
    """errors.md has a section for each of session_plugin's exceptions, and for no other."""
    sections = re.findall(r"^## `?(\w+Error)`?$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert set(sections) == set(exceptions.__all__) - {"SessionPluginError"}


def test_every_public_name_is_mentioned() -> None:
    """The documentation mentions each public name."""
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in session_plugin.__all__ if name not in text] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT], ids=page_id)
def test_the_links_of_the_readme_exist(page: Path) -> None:
    """Relative links in the README lead to existing files; mkdocs checks the links in docs/."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
