from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .harness import Harness, Store
from .servers import NotInstalled, PostgreSQL

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
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """A contract app on a running server, for `contract.on`."""
    harness_class, driver = request.param
    if driver.startswith("sqlite"):
        location = tmp_path_factory.mktemp("contract") / "contract.db"
    else:
        location = request.getfixturevalue("postgresql")
    store = Store(driver, location)
    harness = harness_class(store)
    harness.start()
    yield harness
    harness.stop()
    store.engine.dispose()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing:
        terminalreporter.section("not found on this machine, so not tested")
        for name in sorted(missing):
            terminalreporter.write_line(name)
