"""The machine and the software versions of a run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from sqlalchemy import create_engine, text

from tests.servers import NotInstalled, PostgreSQL

PACKAGES = (
    "sqlalchemy", "flask", "fastapi", "starlette", "psycopg", "asyncpg", "aiosqlite", "greenlet",
    "uvicorn", "uvloop", "httptools", "gunicorn",
    "flask-sqlalchemy", "flask-sqlalchemy-lite", "advanced-alchemy", "fastapi-async-sqlalchemy",
)  # fmt: skip


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """A throwaway server, or the one that the environment names; exits if there is neither."""
    try:
        server = PostgreSQL()
    except NotInstalled as error:
        sys.exit(f"{error} is not installed, and SESSION_PLUGIN_TEST_POSTGRESQL names no server.")
    try:
        yield server
    finally:
        server.stop()


def description(url: str) -> dict[str, str]:
    """The machine and the versions, including that of the server at ``url``, by name."""
    described = {
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "PostgreSQL": _server_version(url),
    }
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            continue
    return described


def _server_version(url: str) -> str:
    engine = create_engine(url)
    with engine.connect() as connection:
        found: str = connection.scalar(text("SHOW server_version"))
    engine.dispose()
    return found


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
