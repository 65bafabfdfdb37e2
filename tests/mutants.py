"""Mutation testing: make small changes to the package, one at a time, and check that a test fails for each.

Cosmic Ray makes the changes, in two copies of the tree at the same time.  ``RemoveStatement`` is our own operator.
The first step records which tests run which lines.  A mutant then runs the tests of its line: first those in NEAR,
then the others, fast ones first and up to a time limit.  ``--wide`` runs all of them for the mutants that survived.
Ctrl-C stops the run at once.  ``.mutants`` keeps the results, so that the next run continues.  Remove it after a
change of the package, and remove its ``recorded.json`` after a change of the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from difflib import unified_diff
from functools import cache
from importlib import import_module
from itertools import accumulate
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import DEVNULL, PIPE, run
from typing import Any

import cosmic_ray.plugins
import coverage
import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.operators.operator import Operator
from cosmic_ray.tools.filters.operators_filter import OperatorsFilter
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult
from parso.python.tree import Keyword

from .servers import MariaDB, PostgreSQL

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / ".mutants"
PROCESSES = 2
TIMEOUT = 20
"""The time limit of one test, in seconds."""
LONGEST = 900
"""The time limit of all tests of one mutant, in seconds."""
BOUND = 15.0
"""The time, in seconds, that the tests of one mutant may take together without ``--wide``."""
TIMED_OUT = "from pytest-timeout"
"""What the output of a test contains that has reached its time limit."""
IMPORTED_BEFORE = (
    "aiosqlite", "asyncpg", "fastapi", "flask", "httptools", "httpx", "hypothesis", "psycopg", "psycopg2",
    "pymysql", "sqlalchemy.ext.asyncio", "sqlalchemy.orm", "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.dialects.postgresql.asyncpg", "uvicorn", "uvicorn.protocols.http.h11_impl",
    "werkzeug.serving",
)  # fmt: skip
"""Third-party modules that are slow to import; they are imported once for all mutants."""
MODULES = (
    "policy", "plugin",
    "engines/making", "engines/registry", "engines/variants", "engines/autocommit", "engines/pools",
    "engines/semaphore", "engines/commits", "engines/twophase",
    "engines/guard", "engines/backends/interface", "engines/backends/sqlite", "engines/backends/postgresql",
    "engines/backends/mysql",
    "scope/lifecycle", "scope/ending", "scope/unit_of_work", "scope/transaction_state", "scope/session", "scope/blocks",
    "scope/current", "scope/opening", "scope/permits", "scope/hooks", "scope/log", "scope/runner", "scope/threads",
    "scope/session_scope", "scope/frames", "scope/joined", "scope/late", "scope/rows",
    "database/configuration", "database/core", "database/interface", "database/sync_interface",
    "database/async_interface", "database/forks", "database/middleware",
    "wsgi/middleware", "wsgi/response", "asgi/middleware", "asgi/request_cycle", "asgi/client",
    "flask/plugin", "flask/settling", "flask/configuration", "flask/late_calls",
    "starlette/plugin", "starlette/settling", "starlette/background", "testing/isolation/statements",
)  # fmt: skip
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "access", "asgi", "autocommit", "background", "cancellation", "careless", "client", "crowds", "current",
        "database", "databases", "disorder", "drive", "failing_parts", "fastapi", "fastapi_newer", "flask", "isolation",
        "joined", "lifecycle", "mysql", "pools", "rows", "scope", "secrets", "sqlite", "starlette", "statements",
        "streaming", "threads", "two_phases", "unknown_outcome", "writes", "wsgi",
    )
]  # fmt: skip
DRIVERS = (  # SQLite's drivers, and one of PostgreSQL for what SQLite cannot show
    "(not mariadb or test_mysql) and not mysqldb and not psycopg2 and not psycopg_async"
    " and (not asyncpg or sibling or beside or test_current)"
    " and (not postgresql or test_threads or test_crowds or test_cancellation or test_disorder or test_databases"
    " or test_autocommit or test_isolation_level or test_read_only or test_two_phases or test_unknown_outcome"
    " or test_statements or test_writes or test_isolation or test_current)"
)
NEAR = {
    "scope": ("tests/test_scope.py", "tests/test_lifecycle.py"),
    "frames": ("tests/test_current.py",),
    "current": ("tests/test_current.py",),
    "blocks": ("tests/test_joined.py", "tests/test_current.py", "tests/test_scope.py"),
    "joined": ("tests/test_joined.py",),
    "late": ("tests/test_background.py",),
    "late_calls": ("tests/test_background.py", "tests/test_flask.py"),
    "background": ("tests/test_background.py",),
    "rows": ("tests/test_rows.py",),
    "runner": ("tests/test_drive.py",),
    "permits": ("tests/test_threads.py",),
    "database": ("tests/test_database.py", "tests/test_secrets.py"),
    "interface": ("tests/test_access.py",),
    "plugin.py": ("tests/test_access.py",),
    "engines": ("tests/test_database.py", "tests/test_secrets.py"),
    "variants": ("tests/test_autocommit.py", "tests/test_scope.py"),
    "autocommit": ("tests/test_autocommit.py",),
    "semaphore": ("tests/test_threads.py", "tests/test_pools.py"),
    "pools": ("tests/test_pools.py",),
    "commits": ("tests/test_unknown_outcome.py", "tests/test_two_phases.py"),
    "twophase": ("tests/test_two_phases.py",),
    "postgresql": ("tests/test_statements.py", "tests/test_writes.py"),
    "statements": ("tests/test_isolation.py",),
    "guard": ("tests/test_scope.py", "tests/test_lifecycle.py"),
    "sqlite": ("tests/test_sqlite.py",),
    "mysql": ("tests/test_mysql.py",),
    "wsgi": ("tests/test_wsgi.py",),
    "asgi": ("tests/test_asgi.py",),
    "client": ("tests/test_client.py", "tests/test_asgi.py"),
    "starlette": ("tests/test_starlette.py",),
    "flask": ("tests/test_flask.py",),
}
"""The tests to run first for a module."""
OPTIONS = ["-q", "--tb=short", "-W", "ignore::pytest.PytestAssertRewriteWarning", f"--timeout={TIMEOUT}"]
EXCLUDED = [
    "core/ReplaceBinaryOperator_(BitOr|Mul|Pow)_",  # type annotations, and the asterisks of parameters
    "core/ReplaceBinaryOperator_(Add_(?!Sub)|Sub_(?!Add)|Div_(?!Mul))",  # one replacement is enough for each operator
    "core/ReplaceComparisonOperator_(Is_(?!IsNot)|IsNot_(?!Is)|Eq_(?!NotEq)|NotEq_(?!Eq))",
    "core/ReplaceComparisonOperator_(GtE_(?!Gt$)|Gt_(?!GtE)|LtE_(?!Lt$)|Lt_(?!LtE))",
    "core/ReplaceUnaryOperator_USub_",
]
DEFINITION = re.compile(r"\s*(@|def |async def )")
"""A line that runs when the module is imported, and whose effect is seen by the tests of the function's body."""
COMPOUND = re.compile(r"\b(not|is|and|or)\b|[=<>]")
"""A compound condition: its parts are mutated, so it is not negated as a whole."""


class RemoveStatement(Operator):
    """Removes a call, a ``raise`` or an assignment to something other than a local variable."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        statement = node.children[0] if node.type == "simple_stmt" else None
        if statement is not None and _is_inside_function(node) and _has_effect(statement):
            yield statement.start_pos, statement.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        statement = node.children[0]
        node.children[0] = Keyword("pass", statement.start_pos, prefix=statement.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


def _is_inside_function(node: Any) -> bool:
    while node is not None and node.type != "funcdef":
        node = node.parent
    return node is not None


def _has_effect(statement: Any) -> bool:
    if statement.type == "expr_stmt":
        return any(name.parent.type != "expr_stmt" for name in statement.get_defined_names(include_setitem=True))
    return statement.type in ("atom_expr", "await_expr", "yield_expr", "raise_stmt", "del_stmt")


cosmic_ray.plugins.OPERATOR_PROVIDERS["own"] = {"RemoveStatement": RemoveStatement}


def test_module(module: str, *, wide: bool) -> str:
    """Run the mutants of ``module``, and return a line with the numbers of those that survived or timed out."""
    path = RESULTS / f"{module.replace('/', '.')}.sqlite"
    if wide and path.exists():
        _forget_survivors(path)
    with use_db(str(path), WorkDB.Mode.create) as found:
        if not found.num_work_items:
            init([Path("session_plugin", f"{module}.py")], found, {})
        OperatorsFilter()._skip_filtered(found, EXCLUDED)
        _skip_useless_mutants(found)
        for item in found.pending_work_items:
            found.set_result(item.job_id, _run(item.mutations[0], math.inf if wide else BOUND))
        return _figure(module, found)


def _skip_useless_mutants(found: WorkDB) -> None:
    """Skip compound conditions, ``@abstractmethod``, and dotted exceptions, which Cosmic Ray cannot replace."""
    useless = {
        "core/AddNot": COMPOUND.search,
        "core/RemoveDecorator": re.compile("@abstractmethod").match,
        "core/ExceptionReplacer": re.compile(r"[\w.]+\.").match,
    }
    for item in found.pending_work_items:
        mutation = item.mutations[0]
        line = mutation.module_path.read_text().splitlines()[mutation.start_pos[0] - 1]
        search = useless.get(mutation.operator_name)
        if search is not None and search(line[mutation.start_pos[1] :]):
            found.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))


def _run(mutation: MutationSpec, limit: float) -> WorkResult:
    operator = cosmic_ray.plugins.get_operator(mutation.operator_name)(**mutation.operator_args)
    with use_mutation(mutation.module_path, operator, mutation.occurrence) as (code, mutant):
        killed = any(_tests_fail(["-x", *OPTIONS, *tests]) for tests in _tests_of(mutation, limit) if tests)
        outcome = TestOutcome.KILLED if killed else TestOutcome.SURVIVED
        diff = "\n".join(unified_diff(code.splitlines(), mutant.splitlines(), str(mutation.module_path), lineterm=""))
    output = TIMED_OUT if killed and TIMED_OUT in Path("last-output").read_text(errors="replace") else None
    return WorkResult(WorkerOutcome.NORMAL, output, outcome, diff)


class Recorder:
    """A pytest plugin that records which tests run which line, and how long each test takes."""

    def __init__(self) -> None:
        self._coverage = coverage.Coverage(data_file=None, source=["session_plugin"])
        self._seconds: Counter[str] = Counter()
        self._failed: set[str] = {""}

    def pytest_sessionstart(self) -> None:
        self._coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        lines = {
            str(Path(file).relative_to(Path.cwd())): {
                line: sorted(set(tests) - self._failed, key=self._seconds.__getitem__)
                for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        (RESULTS / "recorded.json").write_text(json.dumps([lines, self._seconds]))


def _record() -> None:
    if (RESULTS / "recorded.json").exists():
        return
    _work_in_copy()
    if _tests_fail([*OPTIONS, "-k", DRIVERS, *TESTS], [Recorder()]):
        print("Left out, as they fail without a mutant:", Path("last-output").read_text(), sep="\n")


def _tests_fail(arguments: list[str], plugins: Sequence[object] = ()) -> bool:
    process = get_context("fork").Process(target=_test, args=(arguments, plugins))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        _kill(process)
        process.join()
        Path("last-output").write_text(TIMED_OUT)
    return process.exitcode != 0


def _kill(process: BaseProcess) -> None:
    """Kill ``process`` and its child processes."""
    process.kill()
    with suppress(ProcessLookupError):  # it has no process group of its own yet
        os.killpg(process.pid, signal.SIGKILL)


def _test(arguments: list[str], plugins: Sequence[object] = ()) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.dont_write_bytecode = True
    output = os.open("last-output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # the tests of the copy are imported instead
    os._exit(pytest.main(arguments, plugins))


@cache
def _recorded() -> Any:
    return json.loads((RESULTS / "recorded.json").read_text())


def _tests_of(mutation: MutationSpec, limit: float) -> tuple[list[str], list[str]]:
    """The tests that run the lines of ``mutation``, in the order in which to run them: near ones, and others."""
    lines, seconds = _recorded()
    of_lines = lines[str(mutation.module_path)]
    first, last = mutation.start_pos[0], mutation.end_pos[0]
    found = {test for line in range(first, last + 1) for test in of_lines.get(str(line), ())}
    if not found:  # the line runs when the module is imported, or is in the middle of a statement
        is_definition = DEFINITION.match(mutation.module_path.read_text().splitlines()[first - 1])
        near = range(first + 1, first + 40) if is_definition else range(first - 1, first - 6, -1)
        beside = next((of_lines[str(line)] for line in near if of_lines.get(str(line))), None)
        found = set(beside or [test for tests in of_lines.values() for test in tests])
    nearest = NEAR.get(mutation.module_path.stem) or NEAR.get(mutation.module_path.parts[1], NEAR["scope"])
    tests = sorted(found, key=lambda test: (not test.startswith(nearest), seconds.get(test, 0)))
    until = accumulate(seconds.get(test, 0) for test in tests)
    bounded = [test for test, ends_at in zip(tests, until, strict=True) if ends_at < limit]
    return [test for test in bounded if test.startswith(nearest)], [
        test for test in bounded if not test.startswith(nearest)
    ]


def _forget_survivors(path: Path) -> None:
    with closing(sqlite3.connect(path)) as found, found:
        found.execute("DELETE FROM work_results WHERE test_outcome = ?", (TestOutcome.SURVIVED.name,))


def _figure(module: str, found: WorkDB) -> str:
    results = [result for _, result in found.results if result.worker_outcome is not WorkerOutcome.SKIPPED]
    outcomes = Counter(result.test_outcome for result in results)
    survivors = [result.diff for result in results if result.test_outcome is TestOutcome.SURVIVED]
    (RESULTS / f"{module.replace('/', '.')}.survivors").write_text("\n".join(map(str, survivors)))
    timed_out = sum(result.output == TIMED_OUT for result in results)
    survived = outcomes[TestOutcome.SURVIVED]
    return f"{module}: {len(results)} mutants, {survived} survived, {timed_out} killed by a time limit only"


def _work_in_copy() -> None:
    """Change to a new copy of the tree, in which this process makes its mutants and from which its tests import."""
    copy = Path(tempfile.mkdtemp(dir=RESULTS))
    listed = run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, stdout=PIPE, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)
    for name in IMPORTED_BEFORE:
        import_module(name)
    writing = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run([sys.executable, "-m", "pytest", "--collect-only", "-q", *TESTS], stdout=DEVNULL, env=writing)


@contextmanager
def _workers(number: int, begin: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that call ``begin`` first, and that stop on Ctrl-C whatever they are doing."""
    with ProcessPoolExecutor(number, get_context("spawn"), _begin_worker, (begin,)) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                process.terminate()
            raise


def _begin_worker(begin: Callable[[], None] | None) -> None:
    os.setsid()  # the terminal's Ctrl-C is handled by the parent process, which stops this one
    signal.signal(signal.SIGTERM, _end_worker)
    if begin is not None:
        begin()


def _end_worker(*_: object) -> None:
    for process in active_children():
        _kill(process)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", default=[*MODULES], metavar="module", help="such as flask/plugin")
    parser.add_argument("--wide", action="store_true", help="those that survived so far, against more tests")
    arguments = parser.parse_args()
    servers = [PostgreSQL(), MariaDB()]
    for server in servers:
        os.environ[f"SESSION_PLUGIN_TEST_{server.name.upper()}"] = server.base_url
    try:
        RESULTS.mkdir(exist_ok=True)
        with _workers(1) as pool:
            pool.submit(_record).result()
        with _workers(PROCESSES, _work_in_copy) as pool:
            running = [pool.submit(test_module, module, wide=arguments.wide) for module in arguments.modules]
            for module in running:
                print(module.result(), flush=True)
    except KeyboardInterrupt:
        print("Stopped; the next run goes on. What is left over is being removed.", flush=True)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for copy in filter(Path.is_dir, RESULTS.iterdir()):
            shutil.rmtree(copy)
        for server in servers:
            server.stop()


if __name__ == "__main__":
    main()
