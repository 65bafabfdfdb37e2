from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .harness import Harness, Store
from .servers import NotInstalled, PostgreSQL
from .units import ASYNC, SYNC, Units

DEMAND = "SESSION_PLUGIN_TEST_DEMAND"
"""Names the environment variable that turns what is missing on this machine into a failure."""

missing: set[str] = set()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A throwaway PostgreSQL server for the whole run."""
    try:
        server = PostgreSQL()
    except NotInstalled as error:
        if os.environ.get(DEMAND):
            raise
        missing.add(str(error))
        pytest.skip(f"{error} is not installed")
    yield server
    server.stop()


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
    store = Store(driver, request.getfixturevalue("postgresql"))
    store.clear()
    return store


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing:
        terminalreporter.section("not found on this machine, so not tested")
        for name in sorted(missing):
            terminalreporter.write_line(name)
