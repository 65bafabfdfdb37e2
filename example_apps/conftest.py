"""The tests never touch the database that ``LEDGER_DATABASE`` names, and leave nothing in the one that they use."""

import asyncio
import os
from contextlib import contextmanager

import pytest

os.environ.pop("LEDGER_DATABASE", None)
if test_database := os.environ.get("LEDGER_TEST_DATABASE"):
    os.environ["LEDGER_DATABASE"] = test_database


@pytest.fixture(scope="module")
def run():
    """Run a coroutine on the event loop that the tests of one app share, as its requests would."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def entered(run):
    """A block of an async context manager, on that loop."""

    @contextmanager
    def entered(block):
        answer = run(block.__aenter__())
        try:
            yield answer
        finally:
            run(block.__aexit__(None, None, None))

    return entered
