from __future__ import annotations

import faulthandler
import gc
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hypothesis  # noqa: F401  calls gc.get_referrers() when imported, so it comes before gc.freeze()
import pytest

from .drivers import ASYNC, SYNC
from .harness import Harness, Store, inspecting_engines
from .servers import MariaDB, NotInstalled, PgBouncer, PostgreSQL, Redis
from .units import Units

DEMAND = "SESSION_PLUGIN_TEST_DEMAND"
"""The environment variable that makes tests fail, instead of being skipped, if a program is not installed."""

NOT_CORE = (
    "tests/coming_from/*",
    "tests/test_begin_blocks.py",
    "tests/test_bench.py",
    "tests/test_coming_from*",
    "tests/test_elsewhere*",
    "tests/test_fastapi_newer.py",
    "tests/test_mounted.py",
    "tests/test_neighbours*",
    "tests/test_servers.py",
    "tests/test_soak.py",
    "tests/test_testing_pytest.py",
    "docs/coming-from/*",
    "docs/errors-inside-a-success.md",
    "docs/fastapi.md",
    "docs/neighbours/*",
    "docs/testing.md",
    "docs/your-own-adapter.md",
)
"""Not run with ``--core``: these need newer or additional packages beyond the lowest supported versions."""

NOT_QUICK = (
    "example_apps/test_demo.py",
    "tests/test_cancellation.py",
    "tests/test_crowds.py",
    "tests/test_database.py",
    "tests/test_disorder.py",
    "tests/test_docs.py",
    "tests/test_failing_parts.py",
    "tests/test_imports.py",
    "tests/test_pools.py",
    "tests/test_threads.py",
)
"""Not run with ``--quick``, in addition to NOT_CORE: these are slow or need the machine for themselves."""

QUICK_DRIVERS = ("sqlite+pysqlite", "sqlite+aiosqlite", "postgresql+psycopg")
"""The drivers that ``--quick`` uses."""

STEADY = (
    "tests/test_soak.py",
    "tests/test_servers.py",
    "tests/test_crowds.py",
    "tests/test_threads.py",
    "tests/test_pools.py",
)
"""Tests with many concurrent requests or processes.  A parallel run gives them all to one worker, one at a time."""

LONG = (
    "tests/test_bench.py",
    "tests/test_docs.py",
    "tests/test_neighbours_workers.py",
    "tests/test_neighbours_sentry.py",
    "tests/test_testing_pytest.py",
    "tests/test_coming_from.py",
)
"""A parallel run starts these early as well, so that it does not end with one worker waiting for a long module."""

DRIVER = re.compile(r"\b(?:sqlite|postgresql|mariadb)\+\w+")

MEMORY = "/dev/shm"
"""The databases are stored here if there is room: the servers create and remove tens of thousands of files in a run."""

missing: set[str] = set()
left_out: set[str] = set()

collect_ignore = ["coming_from"]  # test_coming_from.py runs these apps, which are written for other libraries

S = TypeVar("S", PostgreSQL, MariaDB, PgBouncer, Redis)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A throwaway PostgreSQL server for the whole run."""
    yield from throwaway(PostgreSQL)


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    """A throwaway MariaDB server for the whole run."""
    yield from throwaway(MariaDB)


@pytest.fixture(scope="session")
def pgbouncer(postgresql: PostgreSQL) -> Iterator[PgBouncer]:
    """A throwaway PgBouncer in front of `postgresql`, for the whole run."""
    yield from throwaway(lambda: PgBouncer(postgresql))


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """A throwaway Redis server for the whole run."""
    yield from throwaway(Redis)


def pytest_configure(config: pytest.Config) -> None:
    """Restore SIGINT, choose where databases are stored, and clean the environment of child processes.

    A shell ignores SIGINT for the processes that it starts in the background; our servers would never stop on it.

    Processes that tests start are neither measured for coverage nor treated as workers of pytest-xdist.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.root.manager.loggerDict = Loggers(logging.root.manager.loggerDict)
    if "TMPDIR" not in os.environ and is_large(MEMORY):
        os.environ["TMPDIR"] = tempfile.tempdir = MEMORY
    faulthandler.register(signal.SIGTERM, file=os.dup(2), chain=True)  # a run that is stopped shows what it was doing
    if config.getoption("dist", "no") != "no":
        return  # the workers run the tests
    for name in ("COVERAGE_PROCESS_CONFIG", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        os.environ.pop(name, None)


class Loggers(dict[str, Any]):
    """pytest goes through all loggers before and after each test, while a server's thread may add one."""

    def values(self) -> Any:
        return list(super().values())


def is_large(folder: str) -> bool:
    """Whether ``folder`` has room for a run's databases; in a container it may be almost too small for any."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 4 * 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="the package and its frameworks, without neighbours")
    parser.addoption("--quick", action="store_true", help="what is fast of the core, on SQLite and psycopg")


def is_left_out(name: str, config: pytest.Config) -> bool:
    """Whether this run leaves out ``name``, a path relative to the root; the terminal summary lists it."""
    patterns = (*NOT_CORE, *NOT_QUICK) if config.getoption("quick") else NOT_CORE if config.getoption("core") else ()
    if not any(fnmatch(name, pattern) for pattern in patterns):
        return False
    left_out.add(name)
    return True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    inside = collection_path.is_relative_to(config.rootpath)
    return (inside and is_left_out(collection_path.relative_to(config.rootpath).as_posix(), config)) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that this run leaves out, and begin a parallel run with those that take longest."""
    out = {item for item in items if is_deselected(item, config)}
    if out:
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]
    if hasattr(config, "workerinput"):
        items.sort(key=rank)


def is_deselected(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether the item's module, page or driver is not in this run; a page is a parameter of test_docs.py."""
    if is_left_out(item.nodeid.partition("::")[0], config):
        return True
    if isinstance(item, pytest.Function) and hasattr(item, "callspec") and is_left_out(item.callspec.id, config):
        return True
    if not config.getoption("quick"):
        return False
    others = {*DRIVER.findall(item.nodeid)}.difference(QUICK_DRIVERS)
    others |= {"mariadb"}.intersection(getattr(item, "fixturenames", ()))
    left_out.update(others)
    return bool(others)


def rank(item: pytest.Item) -> int:
    """The position in a parallel run: lower ranks start earlier."""
    module = item.nodeid.partition("::")[0]
    return 0 if module in STEADY else 1 if module in LONG else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide a parallel run into groups, each of which one worker runs in one go.

    A group consists of the tests of a module or a class on one driver, which share a server and a database, or of
    all `STEADY` tests.  The mark ``xdist_group`` of pytest-xdist 3.8 has no effect with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.partition("::")[0] in STEADY:
                return "steady"
            return " ".join([nodeid.rpartition("::")[0], *DRIVER.findall(nodeid)])

    return Groups(config, log)


def throwaway(make: Callable[[], S]) -> Iterator[S]:
    try:
        server = make()
    except NotInstalled as error:
        skip_missing(str(error))
    yield server
    while inspecting_engines:
        inspecting_engines.popitem()[1].dispose()
    server.stop()


def skip_missing(what: str) -> NoReturn:
    """Skip the test and name the missing program in the summary; fail instead if `DEMAND` is set."""
    if os.environ.get(DEMAND):
        pytest.fail(f"{what} is not installed")
    missing.add(what)
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="class")
def running(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """A running server with a contract app, for `contract.on`."""
    harness_class, driver = request.param
    store = make_store(request, driver)
    harness = harness_class(store)
    harness.start()
    yield harness
    harness.stop()
    store.close()


@pytest.fixture(params=[*SYNC, *ASYNC])
def units(request: pytest.FixtureRequest) -> Iterator[Units]:
    """A `Units` on each driver."""
    driver = request.param
    units = Units(driver, make_store(request, driver))
    yield units
    units.close()


def make_store(request: pytest.FixtureRequest, driver: str) -> Store:
    """An empty database for ``driver``, on a throwaway server if the driver needs one."""
    if driver.startswith("sqlite"):
        return Store(driver, request.getfixturevalue("tmp_path_factory").mktemp("database") / "test.db")
    if driver == "mariadb+mysqldb" and find_spec("MySQLdb") is None:
        skip_missing("mysqlclient (needs MariaDB's headers and a compiler)")
    store = Store(driver, request.getfixturevalue(driver.partition("+")[0]))
    store.clear()
    return store


@pytest.fixture(autouse=True, scope="module")
def garbage_of_before() -> None:
    """Freeze older objects, which would otherwise take most of the time of each gc.collect() in a module's tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def no_thread_left() -> Iterator[None]:
    """Fail if a module's tests leave a server thread running, which would keep the run from ending."""
    yield
    left = [thread.name for thread in threading.enumerate() if "serve_forever" in thread.name and not thread.daemon]
    assert not left, f"still running: {left}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the lists for the terminal summary from a worker to the controller."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update(missing=sorted(missing), left_out=sorted(left_out))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Merge the lists of a worker that has ended; a worker that crashed has sent none."""
    output = getattr(node, "workeroutput", {})
    missing.update(output.get("missing", ()))
    left_out.update(output.get("left_out", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, names in {
        "not found on this machine, so not tested": missing,
        "not core, so left out": left_out,
    }.items():
        if names:
            terminalreporter.section(title)
            for name in sorted(names):
                terminalreporter.write_line(name)
