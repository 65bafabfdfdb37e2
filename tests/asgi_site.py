"""An ASGI app on a real server, and the database that it uses."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import event

from session_plugin import ConfigurationError
from session_plugin.starlette import AsyncSessionPlugin, SessionPlugin

from .apps import ASGIHarness
from .conftest import make_store
from .harness import POOL, Reply, Store, check_foreign_keys, wait_for

ASYNC_DRIVERS = ["sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg"]
SYNC_DRIVERS = ["sqlite+pysqlite", "postgresql+psycopg"]


def stores(drivers: list[str]) -> Any:
    """Return a fixture that provides an empty database on each driver, created once for each module."""

    @pytest.fixture(params=drivers, scope="module")
    def made(request: pytest.FixtureRequest) -> Iterator[Store]:
        store = make_store(request, request.param)
        yield store
        store.engine.dispose()

    return made


class Site(ASGIHarness):
    """An app with a plugin on ``store``.  Define the app first, then enter `running`."""

    def __init__(self, store: Store, app: Any = None, *, sync: bool = False, **options: Any) -> None:
        self.store = store
        self.app: Any = FastAPI() if app is None else app
        store.clear()
        self.db: Any = (SessionPlugin if sync else AsyncSessionPlugin)(store.url, **{**POOL, **options})
        self.server_options: dict[str, Any] = {}

    @contextmanager
    def running(self) -> Iterator[Site]:
        """Serve the app, and check at the end that no connection and no transaction is left open."""
        try:
            self.db.init_app(self.app)
        except ConfigurationError:
            pass  # the test has already called init_app()
        if self.store.backend == "sqlite":
            event.listen(self.sync_engine, "connect", check_foreign_keys)
        self.start()
        try:
            yield self
            self.settle_down()
        finally:
            self.stop()

    def get(self, path: str = "/", method: str = "GET", **headers: str) -> Reply:
        """Send one request, and read the response until it ends or is cut off."""
        with self.connect() as connection:
            return self.exchange(connection, path, method, **headers)

    def exchange(self, connection: http.client.HTTPConnection, path: str, method: str = "GET", **headers: str) -> Reply:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        self.headers = response.headers
        try:
            return Reply(response.status, response.read(), complete=True)
        except (http.client.IncompleteRead, ConnectionError) as error:
            return Reply(response.status, getattr(error, "partial", b""), complete=False)

    def wait_until_left(self) -> None:
        """Wait until the server has noticed that no client is connected."""
        assert wait_for(lambda: not self._server.server_state.connections)


class Gate:
    """Lets a test hold a request at a chosen point."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.opened.wait(10)
