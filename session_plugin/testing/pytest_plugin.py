"""Fixtures for pytest, available wherever session_plugin is installed.

An app's ``conftest.py`` overrides `session_plugin_database`, and its tests ask for the others.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import pytest

from ..exceptions import IsolationError

if TYPE_CHECKING:
    from ..database.interface import DatabaseInterface


_created: WeakSet[Any] = WeakSet()
"""The databases whose tables were created: modules may have different ones."""


@pytest.fixture(scope="session")
def session_plugin_database() -> DatabaseInterface[Any]:
    """The database of the tests, or the plugin that has it: override this fixture."""
    raise IsolationError(
        "The fixture session_plugin_database is not defined. Define a fixture of that name in conftest.py, with "
        'scope="session", that returns your db.'
    )


@pytest.fixture(scope="module")
def session_plugin_schema(session_plugin_database: DatabaseInterface[Any]) -> None:
    """Create the missing tables, once per run: override it to run migrations, or to do nothing."""
    database = session_plugin_database.database
    if database in _created:
        return
    _created.add(database)
    if not inspect.iscoroutinefunction(database.create_all):
        database.create_all()
        return

    async def create() -> None:
        await database.create_all()
        await database.dispose()  # so that the event loop of the tests can use it

    with ThreadPoolExecutor(1) as thread:  # where no event loop runs
        thread.submit(asyncio.run, create()).result()


@pytest.fixture
def isolated_database(
    request: pytest.FixtureRequest, session_plugin_database: DatabaseInterface[Any]
) -> DatabaseInterface[Any]:
    """The database, isolated: what the test commits is undone at its end."""
    request.getfixturevalue("db_session")
    return session_plugin_database


@pytest.fixture
def db_session(
    request: pytest.FixtureRequest, session_plugin_database: DatabaseInterface[Any], session_plugin_schema: None
) -> Any:
    """A session of the test's own on the isolated database, to arrange and to assert with."""
    if not inspect.iscoroutinefunction(session_plugin_database.database.create_all):
        return request.getfixturevalue("_isolated_sync")
    if not inspect.iscoroutinefunction(getattr(request.function, "__wrapped__", request.function)):
        raise IsolationError(
            "An async database is isolated on the event loop of its app, and a test that is a plain function has no "
            "event loop. With TestClient, use client.portal.wrap_async_context_manager(db.isolated())."
        )
    return request.getfixturevalue(
        "_isolated_anyio" if "anyio_backend" in request.fixturenames else "_isolated_asyncio"
    )


@pytest.fixture
def _isolated_sync(session_plugin_database: DatabaseInterface[Any]) -> Generator[Any]:
    database: Any = session_plugin_database
    block: AbstractContextManager[Any] = database.isolated()
    with block as session:
        yield session


async def _isolated(session_plugin_database: DatabaseInterface[Any]) -> AsyncGenerator[Any]:
    database: Any = session_plugin_database
    async with database.isolated() as session:
        yield session
    await database.dispose()  # the next test may have an event loop of its own


_isolated_anyio = pytest.fixture(_isolated, name="_isolated_anyio")
_asyncio: Any = import_module("pytest_asyncio") if find_spec("pytest_asyncio") else pytest
_isolated_asyncio = _asyncio.fixture(_isolated, name="_isolated_asyncio")
