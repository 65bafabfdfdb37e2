"""Starlette's own promises: lifespans, mounted apps, several plugins, and one plugin on several apps."""

import asyncio
import contextvars
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import trio
from fastapi import APIRouter, FastAPI
from sqlalchemy import MetaData, create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Host, Mount, Route, Router

from session_plugin import AsyncDatabase, ConfigurationError, Database, NoScopeError, ScopeClosedError, read_only
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.starlette import AsyncSessionPlugin, SessionPlugin

from .apps import StarletteHarness
from .asgi_site import Site, stores
from .contract import Contract, on
from .harness import Base, Store, add_orphan, count, insert

store = stores(["postgresql+asyncpg"])
file_store = stores(["sqlite+aiosqlite"])


@on(StarletteHarness)
class TestContract(Contract):
    """The contract on Starlette."""


# -- lifespan --------------------------------------------------------------------------------------


class Lifespan:
    """The server's side of the lifespan protocol, up to the message that ends each phase."""

    def __init__(self, app: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self._app = app
        self.to_app: asyncio.Queue[Any] = asyncio.Queue()
        self._replied: asyncio.Queue[Any] = asyncio.Queue()

    async def __aenter__(self) -> Any:
        self.task = asyncio.create_task(self._run())
        await self.request("startup")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if not self.task.done():
            await self.request("shutdown")
        await asyncio.wait([self.task], timeout=5)

    async def request(self, phase: str) -> None:
        await self.to_app.put({"type": f"lifespan.{phase}"})
        await asyncio.wait_for(self._replied.get(), 5)

    async def _run(self) -> None:
        try:
            await self._app({"type": "lifespan", "state": {}}, self.to_app.get, self._send)
        finally:
            await self._replied.put(None)

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        await self._replied.put(None)

    @property
    def types(self) -> list[str]:
        return [message["type"].removeprefix("lifespan.") for message in self.sent]


def disposals(engine: Any) -> list[str]:
    """Return a list that grows by one entry whenever ``engine`` is disposed of."""
    from sqlalchemy import event

    log: list[str] = []
    event.listen(engine, "engine_disposed", lambda engine: log.append("disposed"))
    return log


@pytest.mark.parametrize("fails", [None, "startup", "shutdown"])
def test_lifespan_is_kept_and_engines_are_disposed(store: Store, fails: str | None) -> None:
    """The user's lifespan runs and can use the database.

    The plugin disposes of its engines however the lifespan ends, before the server is notified.
    """
    db = AsyncSessionPlugin(store.url)
    other = AsyncSessionPlugin(store.url)
    log: list[Any] = []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, Any]]:
        async with db.session_scope() as session:
            log.append(await session.run_sync(count))
        if fails == "startup":
            raise KeyError
        yield {}
        async with db.session_scope() as session:
            log.append(await session.run_sync(count))
        if fails == "shutdown":
            raise KeyError

    app = Starlette(lifespan=lifespan)
    db.init_app(app)
    other.init_app(app)
    disposed = [disposals(plugin.engine.sync_engine) for plugin in (db, other)]

    async def scenario() -> list[str]:
        async with Lifespan(app) as server:
            if fails != "startup":
                assert disposed == [[], []]
        if fails:
            assert isinstance(server.task.exception(), KeyError)
        return server.types

    expected = {None: ["startup.complete", "shutdown.complete"], "startup": ["startup.failed"]}
    assert asyncio.run(scenario()) == expected.get(fails, ["startup.complete", "shutdown.failed"])
    assert disposed == [["disposed"] * 2] * 2
    assert log == [0] * (1 if fails == "startup" else 2)


def test_middlewares_of_one_database_dispose_as_one(file_store: Store) -> None:
    """An app that is wrapped twice disposes of its engines as often as one that is wrapped once."""
    db = AsyncDatabase(file_store.url)
    disposed = disposals(db.engine.sync_engine)
    app: Any = Starlette()
    counts: list[int] = []

    async def scenario() -> None:
        async with Lifespan(app):
            pass

    for _ in range(2):
        app = SessionScopeMiddleware(app, db)
        disposed.clear()
        asyncio.run(scenario())
        counts.append(len(disposed))
    assert counts == [2, 2]


def test_engines_that_the_user_created_are_not_disposed(store: Store) -> None:
    """The user is responsible for disposing of engines that they created themselves, sync and async."""
    engine = create_engine(store.url.replace("asyncpg", "psycopg"))
    async_engine = create_async_engine(store.url)
    app = Starlette()
    SessionPlugin(engine).init_app(app)
    AsyncSessionPlugin(async_engine).init_app(app)
    disposed = [disposals(engine), disposals(async_engine.sync_engine)]

    async def scenario() -> None:
        async with Lifespan(app) as server:
            pass
        assert server.types == ["startup.complete", "shutdown.complete"]

    asyncio.run(scenario())
    assert disposed == [[], []]


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (f"nonsense://user:{SECRET}@host/db", "nonsense://user:***@host/db"),
        (f"user:{SECRET}@host", "cannot be read"),
        (f"postgresql://host:{SECRET}/db", "cannot be read"),
        (f"postgresql+psycopg2cffi://user:{SECRET}@host/db", "***"),
        (None, "No database is configured"),
        (KeyError(SECRET), "KeyError"),
    ],
)
def test_a_late_source_that_cannot_work_fails_the_startup(source: Any, expected: str) -> None:
    """If a late source cannot work, the startup fails with a message to the server that does not show the password."""

    def late() -> Any:
        if isinstance(source, Exception):
            raise source
        return source

    db = SessionPlugin(late)
    app = Starlette()
    db.init_app(app)

    async def scenario() -> list[dict[str, Any]]:
        async with Lifespan(app) as server:
            pass
        assert server.task.exception() is not None
        assert server.to_app.empty()
        return server.sent

    [message] = asyncio.run(scenario())
    assert message["type"] == "lifespan.startup.failed"
    assert expected in message["message"]
    assert SECRET not in message["message"]


@pytest.mark.parametrize("plugin_class", [SessionPlugin, AsyncSessionPlugin])
def test_another_event_loop_than_asyncio_fails_the_startup(plugin_class: Any) -> None:
    """On an event loop other than asyncio the startup fails, instead of every request."""
    app = Starlette()
    plugin_class("sqlite+aiosqlite://" if plugin_class is AsyncSessionPlugin else "sqlite://").init_app(app)
    sent: list[Any] = []

    async def receive() -> Any:
        await trio.lowlevel.checkpoint()
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(ConfigurationError, match="needs asyncio"):
        trio.run(app, {"type": "lifespan", "state": {}}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]


@pytest.mark.parametrize("plugin_class", [SessionPlugin, AsyncSessionPlugin])
def test_a_request_on_another_event_loop_than_asyncio(plugin_class: Any) -> None:
    """Where no lifespan runs, as in httpx's transport on anyio's trio backend, the request says what to do."""
    db = plugin_class("sqlite+aiosqlite://" if plugin_class is AsyncSessionPlugin else "sqlite://")

    async def endpoint(request: Any) -> PlainTextResponse:
        await db.get_session(request)
        return PlainTextResponse("never")

    def endpoint_in_a_thread(request: Any) -> PlainTextResponse:
        return PlainTextResponse(str(db.session))

    app = Starlette(routes=[Route("/", endpoint), Route("/thread", endpoint_in_a_thread)])
    db.init_app(app)

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            for path in ("/", "/thread"):
                with pytest.raises(ConfigurationError, match=r"let the fixture anyio_backend return \"asyncio\""):
                    await client.get(path)

    trio.run(main)


def test_units_of_work_on_trio() -> None:
    """A sync database needs no event loop outside requests; an async one says that it does."""
    db, async_db = Database("sqlite://"), AsyncDatabase("sqlite+aiosqlite://", metadata=MetaData())

    async def main() -> None:
        with db.session_scope() as session:
            assert session.scalar(text("SELECT 42")) == 42
        for use in (async_db.session_scope().__aenter__, async_db.create_all, async_db.isolated().__aenter__):
            with pytest.raises(ConfigurationError, match="anyio_backend"):
                await use()

    trio.run(main)
    db.dispose()


def test_init_app_twice_or_too_late() -> None:
    """`init_app()` raises an error that says what to do if it is called twice or too late."""
    db = SessionPlugin("sqlite://")
    app = Starlette()
    db.init_app(app)
    with pytest.raises(ConfigurationError, match="Call it once"):
        db.init_app(app)
    app.middleware_stack = app.build_middleware_stack()
    with pytest.raises(ConfigurationError, match="where you create the app"):
        SessionPlugin("sqlite://").init_app(app)


def test_other_connection_types_pass(file_store: Store) -> None:
    """Connection types other than request, WebSocket and lifespan are passed to the app unchanged."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    db = Database("sqlite://")
    pool = db.engine.pool
    asyncio.run(SessionScopeMiddleware(app, db)({"type": "mqtt"}, None, None))  # type: ignore[arg-type]
    assert seen == ["mqtt"]
    assert db.engine.pool is pool


# -- several plugins, several apps -----------------------------------------------------------------


def test_a_sync_plugin_beside_an_async_one(store: Store) -> None:
    """A sync and an async plugin each have a session and settle separately, both before the response.

    If either commit fails, the client receives the error handler's response.
    """
    site = Site(store, Starlette())
    sync = SessionPlugin(store.url.replace("asyncpg", "psycopg"), pool_size=5, max_overflow=0)

    async def both(request: Any) -> Any:
        session = await sync.get_session()
        await asyncio.to_thread(insert("sync"), session)
        await site.db.session.run_sync(insert("async"))
        if request.path_params["case"] == "sync refused":
            await asyncio.to_thread(add_orphan, session)
        if request.path_params["case"] == "async doomed":
            site.db.doom()
        return JSONResponse({})

    async def conflict(request: Any, error: Exception) -> Any:
        return JSONResponse({"rows": await site.db.session.run_sync(count)}, 409)

    site.app.router.routes.append(Route("/{case}", both))
    site.app.add_exception_handler(IntegrityError, conflict)
    site.db.init_app(site.app)
    sync.init_app(site.app)
    with site.running():
        assert site.get("/kept").status == 200
        assert store.names() == ["async", "sync"]
        store.clear()
        assert site.get("/async%20doomed").status == 200
        assert store.names() == ["sync"]
        store.clear()
        assert site.get("/sync%20refused").status == 409
        assert "sync" not in store.names()
        assert sync.engine.pool.checkedout() == 0


def client_of(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def test_one_plugin_on_several_apps(tmp_path: Any) -> None:
    """One plugin on several apps uses a separate database for each app.

    This includes an app that is mounted in both, and a request that one app sends to the other.
    """
    db = AsyncSessionPlugin(metadata=Base.metadata)

    async def add(request: Any) -> Any:
        await db.session.run_sync(insert(request.path_params["name"]))
        return JSONResponse({})

    async def ask(request: Any) -> Any:
        own = await db.session.run_sync(count)
        async with client_of(apps[0]) as client:
            await client.get(f"/shared/{request.path_params['name']}")
        return JSONResponse([own, await db.session.run_sync(count)])

    shared = Starlette(routes=[Route("/{name}", add)])
    shared.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
    apps = [Starlette(routes=[Mount("/shared", shared), Route("/ask/{name}", ask)]) for _ in range(2)]
    for number, app in enumerate(apps):
        db.init_app(app, f"sqlite+aiosqlite:///{tmp_path}/{number}.db")

    async def scenario() -> None:
        for app in apps:
            await db.database_for(app).create_all()
        with pytest.raises(NoScopeError, match="database_for"):
            db.session  # noqa: B018
        with pytest.raises(ConfigurationError, match="init_app"):
            db.database_for(shared)
        for number, app in enumerate(apps):
            async with client_of(app) as client:
                assert (await client.get(f"/shared/{number}")).status_code == 200
        async with client_of(apps[1]) as client:
            assert (await client.get("/ask/2")).json() == [1, 1]
        counts = []
        for app in apps:
            async with db.database_for(app).session_scope() as session:
                counts.append(await session.run_sync(count))
            await db.database_for(app).dispose()
        assert counts == [2, 1]

    asyncio.run(scenario())


class Named:
    """A mount's own middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@pytest.mark.parametrize("where", ["mount", "router", "middleware", "host", "router with an app"])
def test_mounted_apps_handle_their_own_errors(file_store: Store, where: str) -> None:
    """A mounted app's own error handlers handle a failed commit; work whose error they handle is rolled back."""
    site = Site(file_store, Starlette())

    async def refused(request: Any) -> Any:
        await site.db.session.run_sync(add_orphan)
        return JSONResponse({})

    async def handled(request: Any) -> Any:
        await site.db.session.run_sync(insert("lost"))
        raise KeyError

    async def handle(request: Any, error: Exception) -> Any:
        return JSONResponse({"rows": await site.db.session.run_sync(count)})

    handlers: Any = {IntegrityError: handle, KeyError: handle}
    inner = Starlette(
        routes=[Route("/refused", refused), Route("/handled", handled)],
        exception_handlers=handlers,
    )
    routes = {
        "mount": [Mount("/in", inner)],
        "router": [Mount("/in", routes=[Mount("/", inner)])],
        "middleware": [Mount("/in", inner, middleware=[Middleware(Named)])],
        "host": [Host("127.0.0.1", Router([Mount("/in", inner)]))],
        "router with an app": [Mount("/in", Router([Mount("/", inner)], middleware=[Middleware(Named)]))],
    }
    site.app.router.routes.extend(routes[where])
    with site.running():
        for path in ("/in/refused", "/in/handled"):
            reply = site.get(path)
            assert (path, reply.status, reply.json) == (path, 200, {"rows": 0})
        assert file_store.names() == []


def test_rebuilding_the_stack_does_not_add_layers(file_store: Store) -> None:
    """If instrumentation rebuilds an app's middleware stack, each plugin still has exactly one layer in it."""
    from session_plugin.starlette.settling import SettlingMiddleware

    app = Starlette()
    SessionPlugin("sqlite://").init_app(app)
    AsyncSessionPlugin(file_store.url).init_app(app)
    for _ in range(3):
        app.build_middleware_stack()
    assert len(list(SettlingMiddleware.databases_of(app.router.middleware_stack))) == 2


def test_policy_of_a_mounted_apps_endpoint(store: Store) -> None:
    """`@db.policy` on an endpoint applies wherever the endpoint is mounted."""
    site = Site(store, Starlette())

    @site.db.policy(read_only)
    async def endpoint(request: Any) -> Any:
        return JSONResponse((await site.db.session.execute(text("SHOW transaction_read_only"))).scalar())

    site.app.router.routes.append(Mount("/in", Starlette(routes=[Route("/", endpoint)])))
    with site.running():
        assert site.get("/in/").json == "on"


def test_policy_above_the_route(store: Store) -> None:
    """The policy may be set after the route has taken the function, also where that one has a second route."""
    site, other = Site(store), FastAPI()
    router = APIRouter()
    decorated: list[Any] = []

    async def shared() -> Any:
        return (await site.db.session.execute(text("SHOW transaction_read_only"))).scalar()

    for app in (site.app, router, other):
        kept = site.db.policy(read_only)(app.get("/kept")(of(shared)))
        decorated.append(kept)  # as a module keeps it by name
        site.db.policy(read_only)(app.get("/dropped")(of(shared)))
        plain = of(shared)
        app.get("/plain")(plain)
        app.get("/decorated")(site.db.policy(read_only)(plain))
    site.app.include_router(router, prefix="/router")
    site.app.mount("/mounted", other)
    with site.running():
        for prefix in ("", "/router", "/mounted"):
            paths = ("/kept", "/dropped", "/plain", "/decorated", "/plain")
            assert [site.get(prefix + path).json for path in paths] == ["on", "on", "off", "on", "off"]


def of(function: Any) -> Any:
    async def endpoint() -> Any:
        return await function()

    return endpoint


def test_an_app_without_exception_handling(file_store: Store) -> None:
    """An app whose middleware stack consists of its router only still settles before the response is sent."""

    class Bare(Starlette):
        def build_middleware_stack(self) -> Any:
            return self.router

    site = Site(file_store, Bare())

    async def refused(request: Any) -> Any:
        await site.db.session.run_sync(add_orphan)
        return JSONResponse({})

    site.app.router.routes.append(Route("/", refused))
    with site.running():
        assert site.get("/").status == 500
        assert file_store.names() == []


@pytest.mark.parametrize("fails", [False, True])
def test_an_engine_made_in_the_lifespan(fails: bool) -> None:
    """A function that names the database is called once the app's own startup is complete, which may make the engine.

    If it fails, the startup fails: the server receives that once, and without a secret.
    """
    made: list[Any] = []
    db = AsyncSessionPlugin(lambda: made[0])

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        if not fails:
            made.append(create_async_engine("sqlite+aiosqlite://"))
        yield
        await made[0].dispose()

    app = Starlette(lifespan=lifespan)
    db.init_app(app)

    async def scenario() -> list[Any]:
        async with Lifespan(app) as server:
            if not fails:
                async with db.session_scope() as session:
                    assert await session.scalar(text("SELECT 1")) == 1
        assert (server.task.exception() is not None) is fails
        return [message.get("message") for message in server.sent]

    failed = ["The function that names the database failed: IndexError"]
    assert asyncio.run(scenario()) == (failed if fails else [None, None])


@pytest.mark.parametrize("kind", [SessionPlugin, AsyncSessionPlugin])
def test_the_session_of_a_request_that_is_passed(kind: Any) -> None:
    """`get_session(request)` in an endpoint of Starlette returns the session of that request."""
    db = kind("sqlite://" if kind is SessionPlugin else "sqlite+aiosqlite://")

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(await db.get_session(request) is db.session))

    app = Starlette(routes=[Route("/", endpoint)])
    db.init_app(app)

    async def scenario() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            return (await client.get("/")).text

    assert asyncio.run(scenario()) == "True"


def test_the_session_of_a_unit_of_work_that_has_ended() -> None:
    """`get_session()` raises where the unit of work that the code has inherited is closed."""
    db, app = AsyncSessionPlugin("sqlite+aiosqlite://"), Starlette()
    db.init_app(app)

    async def scenario() -> None:
        async with db.session_scope():
            context = contextvars.copy_context()
        with pytest.raises(ScopeClosedError):
            await asyncio.create_task(db.get_session(), context=context)
        await db.dispose()

    asyncio.run(scenario())
