from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

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


def pytest_configure() -> None:
    """A shell ignores SIGINT for what it starts in the background; a server of ours would never end on it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--core", action="store_true", help="the package and its frameworks, without neighbours")


def is_left_out(name: str, config: pytest.Config) -> bool:
    """True if ``name``, from the root, is not in this run; said at its end."""
    if not config.getoption("core") or not any(fnmatch(name, pattern) for pattern in NOT_CORE):
        return False
    left_out.add(name)
    return True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    inside = collection_path.is_relative_to(config.rootpath)
    return (inside and is_left_out(collection_path.relative_to(config.rootpath).as_posix(), config)) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the pages that are not core; test_docs.py has their names as parameters."""
    pages = [item for item in items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    out = {item for item in pages if is_left_out(item.callspec.id, config)}
    if out:
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for title, names in {
        "not found on this machine, so not tested": missing,
        "not core, so left out": left_out,
    }.items():
        if names:
            terminalreporter.section(title)
            for name in sorted(names):
                terminalreporter.write_line(name)
