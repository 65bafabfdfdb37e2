"""The diffs on each "coming from" page move an app of another library to session_plugin, and its tests still pass.

`coming_from/<library>/` contains the original app and its tests.  `change.diff` moves it to
`session_plugin` with ``policy=manual``; `turn_on.diff`, applied after it, lets the library commit.
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
"""The number of diffs that are applied in each state."""

FILE = re.compile(r"^```python\n(# (\w+\.py)\n.*?)^```$", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)


OTHER_TESTS = "changed, with the tests of turned on"


def page(library: str) -> str:
    return (PAGES / f"{library.replace('_', '-')}.md").read_text()


def copy(library: str, state: str, directory: Path) -> Path:
    """The app of ``library`` in ``state``, with the files that its page adds."""
    copied = directory / f"{library}, {state}"
    shutil.copytree(APPS / library, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for source, name in FILE.findall(page(library)):
        (copied / name).write_text(source)
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(directory)}  # git would look in a repository around it
    for diff in DIFFS[: STATES[state]]:
        subprocess.run(["git", "apply", diff], cwd=copied, env=outside, check=True)
    return copied


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The folder of each app in each state, and a copy with the tests of the last state if these differ."""
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
    """The exit code and the output of each app's tests."""
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
def test_the_apps_own_tests_pass(
    library: str, state: str, apps: dict[tuple[str, str], Path], outcomes: dict[Path, tuple[int, str]]
) -> None:
    """The app's own tests pass on the original app and after each diff."""
    outcome = outcomes[apps[library, state]]
    assert passed(outcome), outcome[1]


def test_manual_without_an_override(apps: dict[tuple[str, str], Path], outcomes: dict[Path, tuple[int, str]]) -> None:
    """The tests that do not override `get_db` pass while the app still commits by itself."""
    outcome = outcomes[apps["fastapi_get_db", OTHER_TESTS]]
    assert passed(outcome), outcome[1]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_diff_leaves_the_tests_unchanged(library: str, apps: dict[tuple[str, str], Path]) -> None:
    """A diff changes the tests only where its page says so."""
    was, changed, turned_on = (suite(apps[library, state]) for state in STATES)
    assert changed == was.replace("db.session.remove()", "db.session.close()")
    assert turned_on == changed or library == "fastapi_get_db"


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_page_shows_the_diffs(library: str) -> None:
    """The page shows exactly the diffs that are applied."""
    assert DIFF.findall(page(library)) == [(APPS / library / diff).read_text() for diff in DIFFS]
