"""The tests never touch the database that ``LEDGER_DATABASE`` names: each drops its tables at the end."""

import asyncio
import os

import pytest

os.environ.pop("LEDGER_DATABASE", None)
if test_database := os.environ.get("LEDGER_TEST_DATABASE"):
    os.environ["LEDGER_DATABASE"] = test_database


@pytest.fixture(scope="module")
def run():
    """Run a coroutine on the event loop that the tests of one app share, as its requests would."""
    with asyncio.Runner() as runner:
        yield runner.run
