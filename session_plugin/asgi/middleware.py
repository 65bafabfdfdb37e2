"""`SessionScopeMiddleware` for ASGI, which may be applied more than once.

The outermost one opens the unit of work, settles it before the last byte, and closes it.  Every one
settles before the first byte what was done inside it, so the innermost settles first: inside an app's
exception handling, where `session_plugin.starlette` puts one, the app's own handlers see a failed commit.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..database.core import DatabaseCore, HasDatabase
from ..database.interface import core_of
from ..database.middleware import check_middleware
from ..engines.event_loop import needs_asyncio, running_loop
from ..exceptions import ConfigurationError
from ..policy import Policy
from ..scope.current import innermost, leave
from ..scope.ending import aclose, close_if_idle
from ..scope.opening import open_unit_of_work
from .client import Client
from .request_cycle import HttpCycle, Layer, RequestCycle, WebSocketCycle
from .types import ASGIApp, Message, Receive, Scope, Send

KEY = "session_plugin"
POLL_INTERVAL = 0.01
LONGEST_WAIT = 5.0
"""Seconds for which the shutdown waits for requests to end."""


class SessionScopeMiddleware:
    """Gives every request, and every WebSocket handshake, a unit of work on ``database``."""

    layer_class: type[Layer] = Layer

    def __init__(
        self,
        app: ASGIApp,
        database: HasDatabase,
        *,
        find_policy: Callable[[Scope], Policy | None] | None = None,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: any ASGI app.
            database: a `Database`, an `AsyncDatabase`, or a plugin.
            find_policy: from the ASGI scope to the policy of the endpoint, or None; see
                `session_plugin.policy.endpoint_policy`.

        Raises:
            ConfigurationError: an argument has a wrong type.
        """
        check_middleware(app, database, find_policy)
        self.app = app
        self._db = database
        self._find_policy = find_policy
        self._open_cycles = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] not in ("http", "websocket"):
            await (self._lifespan if scope["type"] == "lifespan" else self.app)(scope, receive, send)
            return
        core = core_of(self._db)
        cycles: dict[Any, RequestCycle] = scope.setdefault(KEY, {})
        if core in cycles:
            await self.layer_class(cycles[core], send).run(self.app, scope, receive)
            return
        client = Client(receive)
        cycle = cycles[core] = self._open(core, scope, client)
        self._open_cycles += 1
        innermost.set(cycle.unit)
        try:
            try:
                await self.layer_class(cycle, send).run(self.app, scope, client.receive)
            finally:
                if not client.start:
                    cycle.ended_unsent()
                leave(cycle.unit)
        finally:
            del cycles[core]
            try:
                if not close_if_idle(cycle.unit):
                    await aclose(cycle.unit)
            finally:
                client.close()
                self._open_cycles -= 1

    def _open(self, core: DatabaseCore, scope: Scope, client: Client) -> RequestCycle:
        method = scope.get("method")
        find_policy = self._find_policy
        unit = open_unit_of_work(
            core,
            origin=f"{method or 'WEBSOCKET'} {scope['path']}",
            method=method,
            find_policy=None if find_policy is None else lambda: find_policy(scope),
        )
        if not core.is_async:
            try:
                unit.loop = asyncio.get_running_loop()
            except RuntimeError as error:
                raise needs_asyncio() from error
            unit.serves = partial(_serves, scope)
        kind = HttpCycle if scope["type"] == "http" else WebSocketCycle
        return kind(unit, client)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Report a misconfiguration at startup, and dispose before the server hears that the shutdown is complete.

        A function that names the database is called once the app's own startup is complete, which may make the
        engine.  On the message of a complete shutdown a server ends its event loop, and does not wait for the app
        to return.
        """
        is_late = getattr(self._db, "is_late", False)
        try:
            if running_loop() is None:
                raise needs_asyncio()
            database = None if is_late else self._db.database
        except Exception as error:
            await receive()
            await send(_startup_failed(error))
            raise
        disposing: set[Any] = scope.setdefault(KEY, set())
        if database in disposing:
            await self.app(scope, receive, send)
            return
        disposing.add(database or self._db)
        failure: Exception | None = None

        async def send_lifespan(message: Message) -> None:
            nonlocal database, failure
            if failure is not None:
                return  # the server has the reason already
            if message["type"] != "lifespan.startup.complete":
                await dispose()
            elif database is None:
                try:
                    database = self._db.database
                except Exception as error:
                    failure = error
                    await send(_startup_failed(error))
                    raise
            await send(message)

        async def dispose() -> None:
            await self._wait_for_open_cycles()
            disposed = None if database is None else database.dispose()
            if inspect.isawaitable(disposed):
                await disposed

        try:
            await self.app(scope, receive, send_lifespan)
        finally:
            await dispose()

    async def _wait_for_open_cycles(self) -> None:
        """Wait for requests that the server has cancelled and not awaited: their connections go back first."""
        deadline = time.monotonic() + LONGEST_WAIT
        while self._open_cycles and time.monotonic() < deadline:  # noqa: ASYNC110  an app may serve several loops
            await asyncio.sleep(POLL_INTERVAL)


def find_cycle(scope: Scope, db: HasDatabase) -> RequestCycle | None:
    """Return the request cycle that a middleware further out has opened on the database of ``db``, or None."""
    cycles: dict[Any, RequestCycle] | None = scope.get(KEY)
    return cycles.get(core_of(db)) if cycles else None


def _serves(scope: Scope, environ: Mapping[str, Any]) -> bool:
    """Return True if a WSGI app that is called with ``environ`` is mounted in the ASGI app that serves ``scope``.

    a2wsgi passes the scope on.  Starlette's own `WSGIMiddleware` does not: there the method and the path must be
    those of the request, the environ as it makes it and no test client, and the endpoint none that may call a WSGI
    app for reasons of its own.
    """
    passed_on = environ.get("asgi.scope")
    if passed_on is not None:
        return passed_on.get(KEY) is scope[KEY]
    if environ["REQUEST_METHOD"] != scope.get("method") or not environ.get("wsgi.multiprocess"):
        return False
    path = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin1").decode(errors="replace")
    endpoint = scope.get("endpoint")
    return path.endswith(scope["path"]) and (endpoint is None or hasattr(endpoint, "app"))


def _startup_failed(error: Exception) -> Message:
    """Return the message that a server may log; that of any other error can contain the password of a URL."""
    is_ours = isinstance(error, ConfigurationError)
    reason = str(error) if is_ours else f"The function that names the database failed: {type(error).__name__}"
    return {"type": "lifespan.startup.failed", "message": reason}
