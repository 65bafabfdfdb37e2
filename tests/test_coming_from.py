"""An app written for another library becomes one of ours by the diffs that its page shows; its own tests still pass.

`coming_from/<library>/` holds the app and its tests as they were.  `change.diff` moves it to
`session_plugin` under ``policy=manual``; `turn_on.diff`, on top of it, lets the library commit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
APPS = TESTS / "coming_from"
PAGES = TESTS.parent / "docs/coming-from"
LIBRARIES = sorted(path.name for path in APPS.iterdir())
DIFFS = ("change.diff", "turn_on.diff")
STATES = {"as it was": 0, "changed": 1, "turned on": 2}
"""How many of the diffs an app has had."""

FILE = re.compile(r"^```python\n(# (\w+\.py)\n.*?)^```$", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)


OTHER_TESTS = "changed, with the tests of turned on"


def page(library: str) -> str:
    return (PAGES / f"{library.replace('_', '-')}.md").read_text()


def copy(library: str, state: str, directory: Path) -> Path:
    """The app of ``library`` in ``state``, with the files that its page gives."""
    copied = directory / f"{library}, {state}"
    shutil.copytree(APPS / library, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for source, name in FILE.findall(page(library)):
        (copied / name).write_text(source)
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(directory)}  # in a repository, git would look for its files
    for diff in DIFFS[: STATES[state]]:
        subprocess.run(["git", "apply", diff], cwd=copied, env=outside, check=True)
    return copied


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Each app in each state, and with the tests of the last state where these differ."""
    directory = tmp_path_factory.mktemp("coming_from")
    copies = {(library, state): copy(library, state, directory) for library in LIBRARIES for state in STATES}
    for library in LIBRARIES:
        copies[library, OTHER_TESTS] = directory / f"{library}, other tests"
        shutil.copytree(copies[library, "changed"], copies[library, OTHER_TESTS])
        shutil.copy(copies[library, "turned on"] / "test_app.py", copies[library, OTHER_TESTS])
        if suite(copies[library, "changed"]) == suite(copies[library, "turned on"]):
            del copies[library, OTHER_TESTS]
    return copies


def suite(directory: Path) -> str:
    return (directory / "test_app.py").read_text()


@pytest.fixture(scope="module")
def outcomes(apps: dict[tuple[str, str], Path]) -> dict[Path, tuple[int, str]]:
    """What became of the tests of each app: an exit code and an output."""
    run = subprocess.run(
        [sys.executable, str(TESTS / "forks.py"), *map(str, apps.values())],
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    return {Path(name): outcome for name, outcome in json.loads(run.stdout).items()}


def passed(outcome: tuple[int, str]) -> bool:
    code, output = outcome
    return code == 0 and re.search(r"^\d+ passed in", output, re.MULTILINE) is not None


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_apps_own_tests(
    library: str, state: str, apps: dict[tuple[str, str], Path], outcomes: dict[Path, tuple[int, str]]
) -> None:
    """They pass on the app as it was, and after each diff."""
    outcome = outcomes[apps[library, state]]
    assert passed(outcome), outcome[1]


def test_manual_without_an_override(apps: dict[tuple[str, str], Path], outcomes: dict[Path, tuple[int, str]]) -> None:
    """The tests that no longer override `get_db` pass while the app still commits by hand."""
    outcome = outcomes[apps["fastapi_get_db", OTHER_TESTS]]
    assert passed(outcome), outcome[1]


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_becomes_of_the_tests(library: str, apps: dict[tuple[str, str], Path]) -> None:
    """A diff leaves the tests alone, but for what the page names."""
    was, changed, turned_on = (suite(apps[library, state]) for state in STATES)
    assert changed == was.replace("db.session.remove()", "db.session.close()")
    assert turned_on == changed or library == "fastapi_get_db"


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_page_shows_the_diffs(library: str) -> None:
    """What is shown is what is applied."""
    assert DIFF.findall(page(library)) == [(APPS / library / diff).read_text() for diff in DIFFS]
