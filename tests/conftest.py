from __future__ import annotations

import gc
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

import hypothesis  # noqa: F401  asks the collector who holds what it is given, which must not be frozen by then
import pytest

from .drivers import ASYNC, SYNC
from .harness import Harness, Store
from .servers import MariaDB, NotInstalled, PgBouncer, PostgreSQL, Redis
from .units import Units

DEMAND = "SESSION_PLUGIN_TEST_DEMAND"
"""Names the environment variable that turns what is missing on this machine into a failure."""

NOT_CORE = (
    "tests/coming_from/*",
    "tests/test_bench.py",
    "tests/test_coming_from*",
    "tests/test_elsewhere*",
    "tests/test_fastapi_newer.py",
    "tests/test_neighbours*",
    "tests/test_servers.py",
    "tests/test_soak.py",
    "tests/test_testing_pytest.py",
    "docs/coming-from/*",
    "docs/fastapi.md",
    "docs/neighbours/*",
    "docs/testing.md",
    "docs/your-own-adapter.md",
)
"""What ``--core`` leaves out: it needs newer or other packages than the lowest that are supported."""

NOT_QUICK = (
    "example_apps/test_demo.py",
    "tests/test_cancellation.py",
    "tests/test_crowds.py",
    "tests/test_disorder.py",
    "tests/test_failing_parts.py",
    "tests/test_pools.py",
    "tests/test_threads.py",
)
"""What ``--quick`` leaves out besides what is not core: it takes long or needs the machine for itself."""

QUICK_DRIVERS = ("sqlite+pysqlite", "sqlite+aiosqlite", "postgresql+psycopg", "postgresql+psycopg_async")
"""What ``--quick`` runs on."""

STEADY = (
    "tests/test_soak.py",
    "tests/test_servers.py",
    "tests/test_crowds.py",
    "tests/test_threads.py",
    "tests/test_pools.py",
)
"""Crowds and servers of many processes.  In a parallel run, one worker runs them all, so that no two meet."""

LONG = (
    "tests/test_bench.py",
    "tests/test_docs.py",
    "tests/test_neighbours_workers.py",
    "tests/test_neighbours_sentry.py",
    "tests/test_testing_pytest.py",
    "tests/test_coming_from.py",
)
"""What a parallel run begins with besides, so that it does not end with one of them alone."""

DRIVER = re.compile(r"\b(?:sqlite|postgresql|mariadb)\+\w+")

MEMORY = "/dev/shm"
"""Where databases are, if there is room: servers make and remove tens of thousands of files in a run."""

missing: set[str] = set()
left_out: set[str] = set()

collect_ignore = ["coming_from"]  # apps of other libraries, which test_coming_from.py runs

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
    """A throwaway PgBouncer before `postgresql`, for the whole run."""
    yield from throwaway(lambda: PgBouncer(postgresql))


@pytest.fixture(scope="session")
def redis() -> Iterator[Redis]:
    """A throwaway Redis server for the whole run."""
    yield from throwaway(Redis)


def pytest_configure(config: pytest.Config) -> None:
    """A shell ignores SIGINT for what it starts in the background; a server of ours would never end on it.

    The processes that tests start are neither measured nor workers of pytest-xdist, whoever runs the tests.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "TMPDIR" not in os.environ and is_large(MEMORY):
        os.environ["TMPDIR"] = tempfile.tempdir = MEMORY
    if config.getoption("dist", "no") != "no":
        return  # its workers run the tests
    for name in ("COVERAGE_PROCESS_CONFIG", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        os.environ.pop(name, None)


def is_large(folder: str) -> bool:
    """True if the databases of a run have room in ``folder``, which in a container may have next to none."""
    return os.path.isdir(folder) and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 4 * 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="the package and its frameworks, without neighbours")
    parser.addoption("--quick", action="store_true", help="what is fast of the core, on SQLite and psycopg")


def is_left_out(name: str, config: pytest.Config) -> bool:
    """True if ``name``, from the root, is not in this run; said at its end."""
    patterns = (*NOT_CORE, *NOT_QUICK) if config.getoption("quick") else NOT_CORE if config.getoption("core") else ()
    if not any(fnmatch(name, pattern) for pattern in patterns):
        return False
    left_out.add(name)
    return True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    inside = collection_path.is_relative_to(config.rootpath)
    return (inside and is_left_out(collection_path.relative_to(config.rootpath).as_posix(), config)) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in this run, and begin a parallel one with what takes longest."""
    out = {item for item in items if is_deselected(item, config)}
    if out:
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]
    if hasattr(config, "workerinput"):
        items.sort(key=rank)


def is_deselected(item: pytest.Item, config: pytest.Config) -> bool:
    """True for a module, a page or a driver that is not in this run; pages are parameters of test_docs.py."""
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
    """The place in a parallel run: the lower, the earlier."""
    module = item.nodeid.partition("::")[0]
    return 0 if module in STEADY else 1 if module in LONG else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Divide a parallel run into groups; each is run by one worker in one go.

    A group are the tests of a module or a class on one driver, which share a server and a database, or all that is
    `STEADY`.  The mark ``xdist_group`` says nothing to pytest-xdist 3.8 on pytest 9.2.
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
    server.stop()


def skip_missing(what: str) -> NoReturn:
    """Skip what this machine lacks, and say so at the end; where all is demanded, fail."""
    if os.environ.get(DEMAND):
        pytest.fail(f"{what} is not installed")
    missing.add(what)
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="class")
def running(request: pytest.FixtureRequest) -> Iterator[Harness]:
    """A contract app on a running server, for `contract.on`."""
    harness_class, driver = request.param
    store = make_store(request, driver)
    harness = harness_class(store)
    harness.start()
    yield harness
    harness.stop()
    store.engine.dispose()


@pytest.fixture(params=[*SYNC, *ASYNC])
def units(request: pytest.FixtureRequest) -> Iterator[Units]:
    """Units of work on each driver."""
    driver = request.param
    units = Units(driver, make_store(request, driver))
    yield units
    units.close()


def make_store(request: pytest.FixtureRequest, driver: str) -> Store:
    """An empty database for ``driver``, on a throwaway server where it needs one."""
    if driver.startswith("sqlite"):
        return Store(driver, request.getfixturevalue("tmp_path_factory").mktemp("database") / "test.db")
    if driver == "mariadb+mysqldb" and find_spec("MySQLdb") is None:
        skip_missing("mysqlclient (needs MariaDB's headers and a compiler)")
    store = Store(driver, request.getfixturevalue(driver.partition("+")[0]))
    store.clear()
    return store


@pytest.fixture(autouse=True, scope="module")
def garbage_of_before() -> None:
    """The collections that a module's tests ask for pass over what is older, which would be most of their work."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def no_thread_left() -> Iterator[None]:
    """A server that a module's tests forgot would keep the run from ending."""
    yield
    left = [thread.name for thread in threading.enumerate() if "serve_forever" in thread.name and not thread.daemon]
    assert not left, f"still running: {left}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of a parallel run hands on what is said at the end."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update(missing=sorted(missing), left_out=sorted(left_out))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """It has ended; one that crashed hands on nothing."""
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
