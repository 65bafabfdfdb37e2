"""WSGI apps on real servers, and on a server that records what is committed whenever it sends data."""

from __future__ import annotations

import http.client
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from sqlalchemy import event

from .apps import WSGIHarness
from .conftest import make_store
from .harness import POOL, Store, check_foreign_keys

DRIVERS = ["sqlite+pysqlite", "postgresql+psycopg"]
TEXT = [("Content-Type", "text/plain")]


@pytest.fixture(params=DRIVERS, scope="module")
def module_store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """An empty database on each driver, created once for each module."""
    store = make_store(request, request.param)
    yield store
    store.engine.dispose()


@pytest.fixture
def store(module_store: Store) -> Store:
    """The module's database, emptied before each test."""
    module_store.clear()
    return module_store


class Server:
    """A single-threaded server that follows PEP 3333 strictly.

    Attributes:
        status: the status that the client receives; 500 if the app failed before anything was sent.
        sent: the status line and each chunk of the body, each with the names that were committed when it was sent.
        complete: whether the response ended normally.
        error: the exception that the app raised.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.started: tuple[str, Any] | None = None
        self.sent: list[tuple[Any, list[str]]] = []
        self.complete = False
        self.error: BaseException | None = None

    @property
    def status(self) -> int:
        return int(self.sent[0][0][:3]) if self.sent else 500

    def serve(self, app: Any, method: str = "POST", path: str = "/", **environ: Any) -> Server:
        """Serve one request to its end."""
        environ = new_environ(method, path, **environ)
        try:
            body = app(environ, self.start_response)
            try:
                for chunk in body:
                    self.write(chunk, flush=bool(chunk))
                if not self.sent:
                    self.write(b"")
                self.complete = True
            finally:
                if hasattr(body, "close"):
                    body.close()
        except Exception as error:
            self.error = error
        return self

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], object]:
        if exc_info is not None and self.sent:
            raise exc_info[1].with_traceback(exc_info[2])
        assert exc_info is not None or self.started is None, "start_response() twice"
        self.started = (status, headers)
        return self.write

    def write(self, data: bytes, *, flush: bool = True) -> None:
        assert self.started is not None, "a body before start_response()"
        assert data or not flush or not self.sent, "an empty write, which ends a chunked response on some servers"
        if flush and not self.sent:
            self.sent.append((self.started[0], self.store.names()))
        if data:
            self.sent.append((data, self.store.names()))


def new_environ(method: str = "POST", path: str = "/", **more: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path}
    setup_testing_defaults(environ)
    return {**environ, "wsgi.input": io.BytesIO(), "QUERY_STRING": "", **more}


@dataclass
class Answer:
    """A response that a client read from a socket."""

    status: int
    headers: Any
    body: bytes
    complete: bool

    @property
    def cookies(self) -> SimpleCookie:
        return SimpleCookie(self.headers.get("Set-Cookie", ""))


class Site(WSGIHarness):
    """A WSGI app on a real server, which is started by the first call of `ask`."""

    def __init__(self, store: Store, app: Any, db: Any) -> None:
        self.store, self.app, self.db = store, app, db
        self.port = 0
        if store.backend == "sqlite":
            event.listen(self.sync_engine, "connect", check_foreign_keys)

    def ask(self, path: str, method: str = "POST", **headers: str) -> Answer:
        """Send one request over a socket, and read the response until it ends or is cut off."""
        if not self.port:
            self.start()
        with self.connect() as connection:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            try:
                body, complete = response.read(), True
            except (http.client.IncompleteRead, ConnectionError) as error:
                body, complete = getattr(error, "partial", b""), False
            return Answer(response.status, response.headers, body, complete)

    @contextmanager
    def checked(self) -> Iterator[Site]:
        """Check at the end that no connection and no transaction is left open, and stop the server."""
        try:
            yield self
            self.settle_down()
        finally:
            if self.port:
                self.stop()
            else:
                self.db.dispose()


__all__ = ["DRIVERS", "POOL", "TEXT", "Answer", "Server", "Site", "module_store", "new_environ", "store"]
