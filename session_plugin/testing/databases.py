"""A database for each worker of a parallel test run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool

WORKER = "PYTEST_XDIST_WORKER"


@contextmanager
def worker_database(url: str | URL, worker_id: str | None = None) -> Generator[URL]:
    """An empty database beside that of ``url`` for one worker, dropped at the end of the block.

    Args:
        url: the test database; its user may create others.
        worker_id: the worker, by default what pytest-xdist says in the environment.  Without one, or with
            ``"master"``, the answer is ``url`` itself, and nothing is created or dropped.

    Yields:
        the URL of the worker's own database, the same as ``url`` where the database is in memory.
    """
    parsed = make_url(url)
    worker = os.environ.get(WORKER, "master") if worker_id is None else worker_id
    in_memory = parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:")
    if worker == "master" or in_memory:
        yield parsed
        return
    own = parsed.set(database=_name(parsed, worker))
    _drop(parsed, own)
    if parsed.get_backend_name() != "sqlite":
        _execute(parsed, "CREATE DATABASE {}", own)
    try:
        yield own
    finally:
        _drop(parsed, own)


def _name(url: URL, worker: str) -> str:
    if url.get_backend_name() != "sqlite":
        return f"{url.database}_{worker}"
    path = Path(url.database or "")
    return str(path.with_stem(f"{path.stem}_{worker}"))


def _drop(url: URL, own: URL) -> None:
    if url.get_backend_name() != "sqlite":
        force = " WITH (FORCE)" if url.get_backend_name() == "postgresql" else ""  # the app may still have connections
        _execute(url, "DROP DATABASE IF EXISTS {}" + force, own)
        return
    for suffix in ("", "-wal", "-shm"):
        Path(f"{own.database}{suffix}").unlink(missing_ok=True)


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
