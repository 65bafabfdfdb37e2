"""`worker_database`: a database for each worker of a parallel test run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from ..engines.backends import Backend, backend_for

WORKER = "PYTEST_XDIST_WORKER"


@contextmanager
def worker_database(url: str | URL, worker_id: str | None = None) -> Generator[URL]:
    """Create an empty database beside that of ``url`` for one worker, and drop it at the end of the block.

    Args:
        url: the test database; its user may create others.
        worker_id: the worker; from the environment variable of pytest-xdist unless given.  Without a worker, or
            for ``"master"``, ``url`` itself is yielded, and nothing is created or dropped.

    Yields:
        the URL of the worker's own database; ``url`` itself for a database in memory.
    """
    parsed = make_url(url)
    backend = backend_for(parsed.get_backend_name())
    worker = os.environ.get(WORKER, "master") if worker_id is None else worker_id
    if worker == "master" or backend.is_in_memory(parsed):
        yield parsed
        return
    own = backend.worker_url(parsed, worker)
    _drop(parsed, own, backend)
    if backend.create_statement is not None:
        _execute(parsed, backend.create_statement, own)
    try:
        yield own
    finally:
        _drop(parsed, own, backend)


def _drop(url: URL, own: URL, backend: Backend) -> None:
    if backend.drop_statement is not None:
        _execute(url, backend.drop_statement, own)
    for file in backend.files(own):
        file.unlink(missing_ok=True)


def _execute(url: URL, statement: str, own: URL) -> None:
    options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT", "poolclass": NullPool}

    def sync() -> None:
        engine = create_engine(url, **options)
        quoted = engine.dialect.identifier_preparer.quote(str(own.database))
        with engine.connect() as connection:
            connection.execute(text(statement.format(quoted)))

    async def through_async_driver() -> None:
        from sqlalchemy.ext.asyncio import create_async_engine

        engine = create_async_engine(url, **options)
        quoted = engine.dialect.identifier_preparer.quote(str(own.database))
        async with engine.connect() as connection:
            await connection.execute(text(statement.format(quoted)))

    if url.get_dialect().is_async:
        with ThreadPoolExecutor(1) as thread:  # where no event loop runs
            thread.submit(asyncio.run, through_async_driver()).result()
    else:
        sync()
