"""Sentry's integrations, with the real client and a transport that keeps events in memory.

The integrations patch the frameworks permanently, so `test_neighbours_sentry` runs these tests in a separate process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sentry_sdk
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import JSONResponse
from flask import Flask, request
from sentry_sdk.integrations.asgi import SentryAsgiMiddleware
from sentry_sdk.integrations.dedupe import DedupeIntegration
from sentry_sdk.integrations.fastapi import FastApiIntegration
from sentry_sdk.integrations.flask import FlaskIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.integrations.sqlalchemy import SqlalchemyIntegration
from sentry_sdk.integrations.starlette import StarletteIntegration
from sentry_sdk.integrations.wsgi import SentryWsgiMiddleware
from sqlalchemy.exc import IntegrityError

import session_plugin.asgi
import session_plugin.flask
import session_plugin.wsgi
from session_plugin import AsyncDatabase, Database

from . import asgi_site, wsgi_site
from .conftest import make_store
from .harness import POOL, Store, add, add_orphan, wait_for
from .wsgi_site import module_store

__all__ = ["module_store"]

INTEGRATIONS = [
    LoggingIntegration(),
    DedupeIntegration(),
    StarletteIntegration(),
    FastApiIntegration(),
    FlaskIntegration(),
    SqlalchemyIntegration(),
]
WHERE = ["automatic", "inside too"]


class Kept(sentry_sdk.Transport):
    """A transport that keeps events instead of sending them."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.events += [item.payload.json for item in envelope.items if item.type in ("event", "transaction")]

    @property
    def errors(self) -> list[str]:
        """The exception type of each event; fails if an exception of session_plugin is part of its chain."""
        chains = [event["exception"]["values"] for event in self.events if "exception" in event]
        assert not [each for chain in chains for each in chain if (each["module"] or "").startswith("session_plugin")]
        return [chain[-1]["type"] for chain in chains]

    def statements(self, transaction: str) -> list[str]:
        def traced() -> list[Any]:
            return [
                event["spans"] for event in self.events if event.get("transaction") == transaction and "spans" in event
            ]

        (found,) = wait_for(traced)
        return [span["description"].split()[0] for span in found if span["op"] == "db"]


@pytest.fixture
def sentry() -> Iterator[Kept]:
    transport = Kept()
    sentry_sdk.init(
        "http://key@127.0.0.1/1",
        transport=transport,
        traces_sample_rate=1.0,
        auto_enabling_integrations=False,
        default_integrations=False,
        integrations=INTEGRATIONS,
        auto_session_tracking=False,
    )
    yield transport
    sentry_sdk.get_client().close()
    sentry_sdk.get_global_scope().set_client(None)


@pytest.fixture(params=["postgresql+asyncpg", "sqlite+pysqlite"], scope="module")
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    store = make_store(request, request.param)
    yield store
    store.engine.dispose()


def fastapi_site(store: Store, **options: Any) -> asgi_site.Site:
    """An app whose paths are named after what their endpoint does."""
    app = FastAPI(**options)
    is_async = store.driver.endswith("asyncpg")
    site = asgi_site.Site(store, app, sync=not is_async)
    db = site.db

    def work(name: str) -> Any:
        if name == "raised":
            raise ValueError(name)
        (add_orphan if name == "orphan" else add(name))(getattr(db.session, "sync_session", db.session))

    async def work_async(name: str) -> Any:
        await db.session.run_sync(lambda session: work(name))

    def hook() -> None:
        raise ValueError("hook")

    def post(name: str, tasks: BackgroundTasks, late: str = "") -> None:
        work(name)
        if late:
            tasks.add_task(work, late)
        if name == "hook":
            db.on_commit(hook)

    async def post_async(name: str, tasks: BackgroundTasks, late: str = "") -> None:
        await work_async(name)
        if late:
            tasks.add_task(work_async, late)
        if name == "hook":
            db.on_commit(hook)

    app.post("/{name}", status_code=201)(post_async if is_async else post)
    return site


@pytest.mark.parametrize("where", WHERE)
def test_fastapi(where: str, store: Store, sentry: Kept) -> None:
    """In FastAPI, a failed commit is one event with the original exception, also after the response.

    A successful request is no event.
    """
    site = fastapi_site(store)
    if where == "inside too":
        site.app.add_middleware(SentryAsgiMiddleware)
    with site.running():
        assert site.get("/tea", "POST").status == 201
        assert sentry.errors == []
        assert "INSERT" in sentry.statements("/{name}")
        for path, status in (("/orphan", 500), ("/raised", 500), ("/a?late=orphan", 201), ("/b?late=raised", 201)):
            assert site.get(path, "POST").status == status
            site.settle_down()
            assert wait_for(lambda: sentry.errors), path
            assert (path, sentry.errors) == (path, ["ValueError" if "raised" in path else "IntegrityError"])
            sentry.events.clear()
        assert site.get("/hook", "POST").status == 201
        assert sentry.errors == ["ValueError"]
    assert store.names() == ["a", "b", "hook", "tea"]


@pytest.mark.parametrize("where", WHERE)
def test_handled_commit_failure_is_no_event(where: str, store: Store, sentry: Kept) -> None:
    """A failed commit that the app's error handler responds to is not an event."""
    site = fastapi_site(store, exception_handlers={IntegrityError: lambda request, error: JSONResponse({}, 409)})
    if where == "inside too":
        site.app.add_middleware(SentryAsgiMiddleware)
    with site.running():
        assert site.get("/orphan", "POST").status == 409
    assert sentry.errors == []


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("handled", [False, True])
def test_flask(where: str, handled: bool, module_store: Store, sentry: Kept) -> None:
    """In Flask, a failed commit is one event, unless the app's error handler responds to it."""
    app, db = Flask(__name__), session_plugin.flask.SessionPlugin(module_store.url, **POOL)
    module_store.clear()

    @app.post("/<name>")
    def view(name: str) -> Any:
        (add_orphan if name == "orphan" else add(name))(db.session)
        response = app.response_class("", 201)
        if late := request.args.get("late"):
            response.call_on_close(lambda: (add_orphan if late == "orphan" else add(late))(db.session))
        return response

    if handled:
        app.register_error_handler(IntegrityError, lambda error: ("conflict", 409))
    if where == "inside too":
        app.wsgi_app = SentryWsgiMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    db.init_app(app)
    with wsgi_site.Site(module_store, app, db).checked() as site:
        assert site.ask("/tea").status == 201
        assert sentry.errors == []
        assert "INSERT" in sentry.statements("view")
        assert site.ask("/orphan").status == (409 if handled else 500)
        assert sentry.errors == ([] if handled else ["IntegrityError"])
        sentry.events.clear()
        assert site.ask("/a?late=orphan").status == 201
        assert wait_for(lambda: sentry.errors) == ["IntegrityError"]
    assert module_store.names() == ["a", "tea"]


def test_any_wsgi_app(module_store: Store, sentry: Kept) -> None:
    """A failed commit is one event, with Sentry's WSGI middleware both around session_plugin's and inside it."""
    db = Database(module_store.url, **POOL)
    module_store.clear()

    def app(environ: Any, start_response: Any) -> Any:
        add_orphan(db.session)
        start_response("201 Created", wsgi_site.TEXT)
        return [b"created"]

    stack = SentryWsgiMiddleware(session_plugin.wsgi.SessionScopeMiddleware(SentryWsgiMiddleware(app), db))
    with wsgi_site.Site(module_store, stack, db).checked() as site:
        assert site.ask("/").status == 500
        assert sentry.errors == ["IntegrityError"]


def test_any_asgi_app(postgresql: Any, sentry: Kept) -> None:
    """A failed commit is one event under ASGI, although an exception of session_plugin unwinds the app."""
    store = Store("postgresql+asyncpg", postgresql)
    store.clear()
    db = AsyncDatabase(store.url)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await db.session.run_sync(add_orphan)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"created"})

    middleware = session_plugin.asgi.SessionScopeMiddleware
    stack = SentryAsgiMiddleware(middleware(SentryAsgiMiddleware(middleware(SentryAsgiMiddleware(app), db)), db))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(stack, raise_app_exceptions=False)) as client:
            try:
                return (await client.get("http://shop/")).status_code
            finally:
                await db.dispose()

    assert asyncio.run(ask()) == 500
    assert sentry.errors == ["IntegrityError"]
    store.engine.dispose()
