"""The tests never use the database that ``LEDGER_DATABASE`` names, and leave no rows in the one that they use."""

import asyncio
import os
from contextlib import contextmanager

import pytest

os.environ.pop("LEDGER_DATABASE", None)
if test_database := os.environ.get("LEDGER_TEST_DATABASE"):
    os.environ["LEDGER_DATABASE"] = test_database


@pytest.fixture(scope="module")
def run():
    """Run a coroutine on the event loop that the tests and requests of one app share."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def entered(run):
    """Enter an async context manager on that loop, for the length of a block."""

    @contextmanager
    def entered(block):
        entered_value = run(block.__aenter__())
        try:
            yield entered_value
        finally:
            run(block.__aexit__(None, None, None))

    return entered
