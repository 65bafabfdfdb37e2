"""Calls an app as a server does, but without a server, sockets or a test client.

Each ASGI request runs in its own task, and therefore in its own context, as in uvicorn.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .contenders import Contender
from .shop import ANSWERS, ENDPOINTS, fill


def close(body: Any) -> None:
    """Close a response's body as a server does: a plain list has no ``close()``."""
    getattr(body, "close", lambda: None)()


class WrongResponseError(Exception):
    """A contender sent a wrong response, or left a connection checked out."""


class AsgiDriver:
    """Sends requests to an ASGI app, one after the other, on an event loop of its own."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.runner = asyncio.Runner()
        self.loop = self.runner.get_loop()
        self._scopes = {name: _asgi_scope(*target) for name, target in ENDPOINTS.items()}

    def run(self, endpoint: str, times: int) -> None:
        """Send ``times`` requests to an endpoint."""
        self.runner.run(self._run(self._scopes[endpoint], times))

    def request(self, endpoint: str) -> tuple[int, bytes]:
        """Send one request, and return the status and the body."""
        return self.runner.run(self._request(endpoint))

    async def _run(self, template: dict[str, Any], times: int) -> None:
        create_task = self.loop.create_task
        left = self.loop.create_future()

        for _ in range(times):
            statuses: list[int] = []
            await create_task(self.app({**template, "state": {}}, _receiver(left), _sender(statuses, [])))
            if statuses[0] >= 300:
                raise WrongResponseError(f"{template['path']} answered {statuses[0]}")

    async def _request(self, endpoint: str) -> tuple[int, bytes]:
        statuses: list[int] = []
        body: list[bytes] = []
        scope = {**self._scopes[endpoint], "state": {}}
        left = self.loop.create_future()
        await self.loop.create_task(self.app(scope, _receiver(left), _sender(statuses, body)))
        return statuses[0], b"".join(body)

    @contextmanager
    def idle(self, endpoint: str, requests: int) -> Iterator[None]:
        """Hold requests in flight, whose responses wait for their clients."""
        gate = asyncio.Event()
        finished = self.runner.run(self._hold(self._scopes[endpoint], requests, gate))
        try:
            yield
        finally:
            self.runner.run(_finish(gate, finished))

    async def _hold(self, template: dict[str, Any], requests: int, gate: asyncio.Event) -> list[asyncio.Task[None]]:
        waiting = 0
        all_wait = asyncio.Event()
        left = self.loop.create_future()

        async def send(message: Any) -> None:
            nonlocal waiting
            if message["type"] == "http.response.start":
                waiting += 1
                if waiting == requests:
                    all_wait.set()
            await gate.wait()

        tasks = [
            self.loop.create_task(self.app({**template, "state": {}}, _receiver(left), send)) for _ in range(requests)
        ]
        await asyncio.wait_for(all_wait.wait(), 60)
        return tasks

    def close(self) -> None:
        """Close the event loop."""
        self.runner.close()


async def _finish(gate: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    gate.set()
    await asyncio.gather(*tasks)


def _receiver(left: asyncio.Future[Any]) -> Any:
    """Return a ``receive`` that returns an empty body, and then waits for a disconnect."""
    received = False

    async def receive() -> Any:
        nonlocal received
        if received:
            return await left
        received = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive


def _sender(statuses: list[int], body: list[bytes]) -> Any:
    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        else:
            body.append(message["body"])

    return send


def _asgi_scope(method: str, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1:8000"), (b"accept", b"*/*")],
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 8000),
    }


class WsgiDriver:
    """Sends requests to a WSGI app, one after the other, in the current thread."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._environs = {name: _wsgi_environ(*target) for name, target in ENDPOINTS.items()}
        self._status = ""

    def run(self, endpoint: str, times: int) -> None:
        """Send ``times`` requests to an endpoint."""
        template = self._environs[endpoint]
        for _ in range(times):
            body = self.app({**template, "wsgi.input": io.BytesIO()}, self._start_response)
            for _chunk in body:
                pass
            close(body)
            if self._status[0] != "2":
                raise WrongResponseError(f"{template['PATH_INFO']} answered {self._status}")

    def request(self, endpoint: str) -> tuple[int, bytes]:
        """Send one request, and return the status and the body."""
        body = self.app({**self._environs[endpoint], "wsgi.input": io.BytesIO()}, self._start_response)
        content = b"".join(body)
        close(body)
        return int(self._status[:3]), content

    @contextmanager
    def idle(self, endpoint: str, requests: int) -> Iterator[None]:
        """Hold requests whose bodies are not read."""
        template = self._environs[endpoint]
        bodies = [self.app({**template, "wsgi.input": io.BytesIO()}, self._start_response) for _ in range(requests)]
        try:
            yield
        finally:
            for body in bodies:
                close(body)

    def _start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        self._status = status

    def close(self) -> None:
        """There is nothing to close."""


def _wsgi_environ(method: str, path: str) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "CONTENT_LENGTH": "0",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "127.0.0.1:8000",
        "HTTP_ACCEPT": "*/*",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }


class Running:
    """A contender that is ready to serve in this process."""

    def __init__(self, contender: Contender, url: str, name: str | None = None) -> None:
        self.contender = contender
        self.name = name or contender.name
        self.app, self._owner = contender.make_app(url)
        self._engine = self._owner if hasattr(self._owner, "sync_engine") else self._owner.engine
        self.engine = getattr(self._engine, "sync_engine", self._engine)
        self.driver: Any = WsgiDriver(self.app) if contender.kind == "flask" else AsgiDriver(self.app)
        self.run = self.driver.run
        if url.startswith("sqlite"):
            self._fill()

    @property
    def endpoints(self) -> list[str]:
        """The endpoints in the contender's row."""
        return list(self.contender.endpoints or ENDPOINTS)

    def check(self) -> None:
        """Check that each endpoint sends the expected response and leaves no connection checked out.

        Raises:
            WrongResponseError: an endpoint does not.
        """
        for endpoint in self.endpoints:
            status, body = self.driver.request(endpoint)
            found = b"".join(body.split())
            expected = 201 if endpoint == "write" else 200
            if status != expected or found != ANSWERS.get(endpoint, found):
                raise WrongResponseError(f"{self.contender.key}: {endpoint} answered {status} {body!r}")
            if checked_out(self.engine):
                raise WrongResponseError(f"{self.contender.key}: {endpoint} left a connection checked out")

    def close(self) -> None:
        """Close the pool's connections and the event loop."""
        disposed = self._owner.dispose()
        if disposed is not None:
            self.driver.runner.run(disposed)
        self.driver.close()

    def _fill(self) -> None:
        """Fill a database in memory, which exists in this engine only."""
        if self._engine is self.engine:
            with self._engine.begin() as connection:
                fill(connection)
        else:
            self.driver.runner.run(self._afill())

    async def _afill(self) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(fill)


def checked_out(engine: Any) -> int:
    """The number of connections that are checked out; 0 for SQLite in memory, whose pool does not count them."""
    count = getattr(engine.pool, "checkedout", None)
    return count() if count else 0
