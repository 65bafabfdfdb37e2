"""The benchmark runs, and every contender in it responds correctly; no measurement is judged here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import instructions, isolation
from bench.contenders import CONTENDERS, FLOOR, Contender
from bench.drive import Running
from bench.goals import Goal, judged
from bench.parts import PARTS
from bench.proxy import Proxy
from bench.shop import fill_database

from .conftest import skip_missing
from .servers import PostgreSQL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def database(postgresql: PostgreSQL) -> Iterator[str]:
    name = postgresql.new_database()
    fill_database(postgresql.url("psycopg", name))
    yield name
    postgresql.drop(name)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda each: each.key)
def test_each_contender_reads_and_writes(contender: Contender, postgresql: PostgreSQL, database: str) -> None:
    """Each contender reads and writes through its own session, and leaves no connection checked out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of third-party libraries
        running = Running(contender, postgresql.url("psycopg", database))
        try:
            running.check()
        finally:
            running.close()


def test_the_command_measures_every_part(postgresql: PostgreSQL, tmp_path: Path) -> None:
    """A very small run of the benchmark writes the page, the measurements and the plot."""
    command = [sys.executable, "-m", "bench", "--size", "smoke", "--output", str(tmp_path)]
    chosen = ["--kind", "flask", "--contender", "session_plugin"]
    given = {"SESSION_PLUGIN_TEST_POSTGRESQL": postgresql.url("psycopg", "postgres")}
    subprocess.run([*command, *chosen], check=True, cwd=ROOT, env={**os.environ, **given}, capture_output=True)
    results = json.loads((tmp_path / "smoke.json").read_text())
    assert all(results[part] for part in PARTS if part != "far")
    rows = {row["contender"]: row["endpoints"] for row in results["cpu"][0]["rows"]}
    assert rows["session_plugin"]["write"]["cpu"]["median"] > 0
    assert rows[FLOOR]["write"]["cpu_ratio"]["median"] == 1
    page = (tmp_path / "smoke.md").read_text()
    assert "| session_plugin |" in page
    assert "## Goals" in page
    assert (tmp_path / "smoke.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # by Flask-SQLAlchemy-Lite
def test_isolation_is_measured(postgresql: PostgreSQL, tmp_path: Path) -> None:
    """The benchmark of isolation levels measures all seven ways on SQLite and PostgreSQL."""
    for url in (f"sqlite:///{tmp_path}/test.db", postgresql.url("psycopg")):
        assert len(isolation.measured(url, rounds=2)) == 7


def test_instructions_are_counted(tmp_path: Path) -> None:
    """Instructions are counted for the process and, from Python 3.12 on, for each function including its callees."""
    if shutil.which("valgrind") is None:
        skip_missing("valgrind")
    script = tmp_path / "session_plugin" / "work.py"
    script.parent.mkdir()
    script.write_text("def inner():\n    sum(range(100_000))\ndef outer():\n    inner()\n    inner()\nouter()\n")
    by_function = sys.version_info >= (3, 12)
    count = instructions.Count([str(script)], functions=by_function)
    assert count.total > 200_000
    names = ["<module>", "inner", "outer"] if by_function else []
    assert sorted(count.functions) == [f"{name} (session_plugin/work.py)" for name in names]
    assert all(200_000 < counted < count.total for counted in count.functions.values())


def test_the_proxy_counts_round_trips(postgresql: PostgreSQL, database: str) -> None:
    """A hand-written read takes three round trips (BEGIN, the statement and the end); an unused database takes none."""
    contender = next(each for each in CONTENDERS if each.key == f"flask/{FLOOR}")
    with Proxy(postgresql.url("psycopg", database)) as proxy:
        running = Running(contender, proxy.url)
        running.run("read", 5)  # psycopg prepares a statement that is repeated
        proxy.count()
        for endpoint, trips in (("bare", 0), ("read", 3), ("write", 3)):
            running.run(endpoint, 10)
            assert proxy.count() / 10 == pytest.approx(trips, abs=0.2), endpoint
        running.close()


def test_a_goal_is_missed_above_its_limit() -> None:
    """A goal is met up to its limit, and missed above it."""

    def growth(blocks: int) -> list[Goal]:
        part = {"kind": "flask", "requests": 1000, "blocks": blocks, "kilobytes": 0}
        return judged({"growth": [part]})

    assert [goal.met for goal in growth(0)] == [True]
    assert [goal.met for goal in growth(1000)] == [False]
