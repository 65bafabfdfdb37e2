"""Units of work outside any framework, on every driver.

A test defines its work as a function of a sync session.  On an async database, the function runs in
``run_sync()``, on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from session_plugin import AsyncDatabase, Database

from .drivers import ASYNC
from .harness import POOL, Base, Store, check_foreign_keys, wait_for


def on(*drivers: str) -> Any:
    """Run a test that uses ``units`` on these drivers only."""
    return pytest.mark.parametrize("units", drivers, indirect=True)


class Units:
    """A `Database` or `AsyncDatabase`, and a `Store` that inspects the same database."""

    def __init__(self, driver: str, store: Store, **options: Any) -> None:
        self.driver = driver
        self.store = store
        self.is_async = driver in ASYNC
        self.runner = asyncio.Runner()
        options = {**POOL, "metadata": Base.metadata, **options}
        self.db: Any = (AsyncDatabase if self.is_async else Database)(store.url, **options)
        if store.backend == "sqlite":
            event.listen(self.sync_engine, "connect", check_foreign_keys)

    @property
    def sync_engine(self) -> Any:
        return getattr(self.db.engine, "sync_engine", self.db.engine)

    def run(self, work: Callable[[Session], Any], *, new: bool = False) -> Any:
        """Run ``work`` in one unit of work, and return its result."""
        if self.is_async:
            return self.runner.run(self.arun(work, new=new))
        with self.db.session_scope(new=new) as session:
            return work(session)

    async def arun(self, work: Callable[[Session], Any], *, new: bool = False) -> Any:
        async with self.db.session_scope(new=new) as session:
            return await session.run_sync(work)

    def close(self) -> None:
        """Check that no connection is checked out and no transaction is open, and dispose of the engines."""
        assert self.sync_engine.pool.checkedout() == 0
        # the server may notice a closed connection late
        assert wait_for(lambda: self.store.open_transactions() == [], 10)
        if self.is_async:
            self.runner.run(self.db.dispose())
        else:
            self.db.dispose()
        self.runner.close()
        self.store.close()
