"""Errors that the adapters do not see: what is saved, and what the log says.

The app turns an exception into a success itself, or something changes the response after the COMMIT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, HTTPException, WebSocket
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from flask import Flask
from sqlalchemy import event
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Mount, Route
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from session_plugin import Database, Decision
from session_plugin.flask import SessionPlugin
from session_plugin.wsgi import SessionScopeMiddleware

from .asgi_site import Site as AsgiSite
from .asgi_site import stores
from .contract import logged
from .harness import POOL, Store, add, add_orphan, check_foreign_keys, insert, wait_for
from .wsgi_site import TEXT, Server, Site, module_store, store

__all__ = ["module_store", "store"]

async_store = stores(["sqlite+aiosqlite", "postgresql+asyncpg"])
file_store = stores(["sqlite+aiosqlite"])

BY_SERVER = "status 500 of the server, or nothing"


def warning(committed: int, received: str) -> str:
    return (
        f"POST /: its work was committed under status {committed}, and the client receives {received}. A middleware or "
        "an exception replaced the response after the COMMIT. If such a response must save nothing, decide that "
        "before: move the middleware inside, or call db.doom() or choose a policy in the endpoint. If it is meant to "
        "be saved, call commit() there."
    )


# -- an exception that the app turns into a success ------------------------------------------------


class AppError(Exception):
    """What the apps of this module raise."""


@pytest.mark.parametrize("dooms", [False, True])
def test_a_route_class_that_makes_a_success_of_an_exception(async_store: Store, dooms: bool) -> None:
    """Nothing shows that the endpoint failed, so its work is saved unless the route class calls doom()."""
    site = AsgiSite(async_store)

    class Caught(APIRoute):
        def get_route_handler(self) -> Any:
            inner = super().get_route_handler()

            async def handler(request: Any) -> Any:
                try:
                    return await inner(request)
                except AppError as error:
                    if dooms:
                        site.db.doom(type(error).__name__)
                    async with site.db.session_scope(new=True) as session:
                        await session.run_sync(insert("log"))
                    return JSONResponse({"ok": False})

            return handler

    router = APIRouter(route_class=Caught)

    @router.post("/")
    async def fails() -> None:
        await site.db.session.run_sync(add("half"))  # not flushed: SQLite has one writer at a time
        raise AppError

    site.app.include_router(router)
    with site.running():
        assert site.get(method="POST").status == 200
    assert async_store.names() == (["log"] if dooms else ["half", "log"])


def test_an_exception_handler_that_makes_a_success_of_an_exception(async_store: Store) -> None:
    """The exception is seen on its way to the handler, so its work is rolled back without a doom()."""
    site = AsgiSite(async_store)

    @site.app.post("/")
    async def fails() -> None:
        await site.db.session.run_sync(insert("half"))
        raise AppError

    @site.app.exception_handler(AppError)
    async def handle(request: Any, error: Exception) -> Any:
        return JSONResponse({"ok": False})

    with site.running():
        assert site.get(method="POST").status == 200
    assert async_store.names() == []


# -- where a response can be replaced before the COMMIT --------------------------------------------


def test_a_route_class_replaces_a_response_before_the_commit(async_store: Store) -> None:
    """What a route class makes of the response counts, and so does an exception that it raises then."""
    site = AsgiSite(async_store)

    class Refusing(APIRoute):
        def get_route_handler(self) -> Any:
            inner = super().get_route_handler()

            async def handler(request: Any) -> Any:
                await inner(request)
                if request.headers["kind"] == "raise":
                    raise HTTPException(403)
                return JSONResponse({}, 403)

            return handler

    router = APIRouter(route_class=Refusing)

    @router.post("/", status_code=201)
    async def create() -> None:
        await site.db.session.run_sync(insert("tea"))

    site.app.include_router(router)
    with site.running():
        for kind in ("raise", "return"):
            assert site.get(method="POST", kind=kind).status == 403
    assert async_store.names() == []


class Refuses(BaseHTTPMiddleware):
    """A middleware that replaces each response."""

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        await call_next(request)
        return JSONResponse({}, 403)


@pytest.mark.parametrize("where", ["route", "mount", "app"])
def test_where_a_middleware_of_starlette_is_inside(
    async_store: Store, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The middleware of a route, or of a mount of routes, runs before the COMMIT, and that of the app after it."""
    refuses = [Middleware(Refuses)]

    async def create(request: Any) -> Any:
        await site.db.session.run_sync(insert("tea"))
        return JSONResponse({}, 201)

    def route(**options: Any) -> Route:
        return Route("/", create, methods=["POST"], **options)

    app = {
        "route": lambda: Starlette(routes=[route(middleware=refuses)]),
        "mount": lambda: Starlette(routes=[Mount("/", routes=[route()], middleware=refuses)]),
        "app": lambda: Starlette(routes=[route()], middleware=refuses),
    }[where]()
    site = AsgiSite(async_store, app)
    with site.running():
        assert site.get(method="POST").status == 403
    assert async_store.names() == (["tea"] if where == "app" else [])
    assert logged(caplog, "WARNING") == ([warning(201, "status 403")] if where == "app" else [])


def test_after_request_of_flask_is_inside(flask_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The status that a function of Flask's ``after_request`` sets counts."""

    @flask_site.app.after_request
    def refuse(response: Any) -> Any:
        response.status_code = 403
        return response

    assert flask_site.ask("/").status == 403
    assert flask_site.store.names() == []
    assert logged(caplog, "WARNING") == []


# -- what the log says -----------------------------------------------------------------------------


@pytest.fixture
def flask_site(store: Store) -> Iterator[Site]:
    app = Flask(__name__)
    db = SessionPlugin(store.url, **POOL)

    @app.post("/")
    def create() -> Any:
        insert("tea")(db.session)
        return {}, 201

    db.init_app(app)
    with Site(store, app, db).checked() as site:
        yield site


Replace = Callable[[Any, Any, Any, Any], Any]


async def dropping(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """A middleware that returns and sends nothing."""

    async def drop(message: Any) -> None:
        pass

    await app(scope, receive, drop)


async def raising(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """A middleware that raises after the app has responded."""
    await dropping(app, scope, receive, send)
    raise AppError


async def breaking_off(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """A middleware that raises once the client has the status."""

    async def send_start(message: Any) -> None:
        if message["type"] == "http.response.start":
            await send(message)

    await app(scope, receive, send_start)
    raise AppError


def replaced_site(store: Store, replace: Replace) -> AsgiSite:
    site = AsgiSite(store)

    class Replacing:
        def __init__(self, app: Any) -> None:
            self._app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:
                await replace(self._app, scope, receive, send)

    site.app.add_middleware(Replacing)

    @site.app.post("/", status_code=201)
    async def create() -> None:
        await site.db.session.run_sync(insert("tea"))

    return site


@pytest.mark.parametrize(
    ("replace", "expected"),
    [
        (dropping, [warning(201, BY_SERVER)]),
        (raising, [warning(201, "status 500")]),  # Starlette's own
        (breaking_off, []),  # the client has received 201, and sees that the body is incomplete
    ],
)
def test_what_an_asgi_middleware_does_after_the_commit(
    async_store: Store, replace: Replace, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One warning if the client receives an error status, the server's too; none if it has received the success."""
    site = replaced_site(async_store, replace)
    with site.running():
        assert site.get(method="POST").status == (500 if expected else 201)
    assert async_store.names() == ["tea"]
    assert logged(caplog, "WARNING") == expected


def test_work_of_a_middleware_that_cannot_be_committed(async_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """The work of the app was committed before, so the client receives an error for committed work."""

    async def auditing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def audit(message: Any) -> None:
            if message["type"] == "http.response.start":
                await site.db.session.run_sync(add_orphan)
            await send(message)

        await app(scope, receive, audit)

    site = replaced_site(async_store, auditing)
    with site.running():
        assert site.get(method="POST").status == 500
    assert async_store.names() == ["tea"]
    assert logged(caplog, "WARNING") == [warning(201, BY_SERVER)]


def test_a_stream_that_fails_while_a_middleware_holds_the_response(
    file_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """What was committed before the stream is named; what the stream did is rolled back."""

    async def holding(app: Any, scope: Any, receive: Any, send: Any) -> None:
        held: list[Any] = []

        async def hold(message: Any) -> None:
            held.append(message)

        await app(scope, receive, hold)

    async def body() -> Any:
        yield b"a"
        await site.db.session.run_sync(insert("streamed"))
        raise AppError

    site = replaced_site(file_store, holding)

    @site.app.post("/stream")
    async def stream() -> Any:
        await site.db.session.run_sync(insert("early"))
        return StreamingResponse(body())

    with site.running():
        assert site.get("/stream", "POST").status == 500
    assert file_store.names() == ["early"]
    (message,) = logged(caplog, "WARNING")
    assert message.startswith(
        "POST /stream: its work was committed under status 200, and the client receives status 500."
    )


def test_a_policy_that_commits_an_error_is_not_logged(async_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """What is committed under an error, or after an exception, is the user's decision, and the client has the error."""
    site = AsgiSite(async_store, policy=lambda outcome: Decision(True, "always"))

    @site.app.post("/")
    async def refuse() -> Any:
        await site.db.session.run_sync(insert("attempt"))
        return JSONResponse({}, 401)

    @site.app.post("/raise")
    async def fail() -> Any:
        await site.db.session.run_sync(insert("failure"))
        raise AppError

    with site.running():
        assert site.get(method="POST").status == 401
        assert site.get("/raise", "POST").status == 500
    assert async_store.names() == ["attempt", "failure"]
    assert logged(caplog, "WARNING") == []


def test_background_work_is_not_logged(file_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """What a background task saves after an error response is not the work of that response."""
    site = AsgiSite(file_store, Starlette())

    async def task() -> None:
        await site.db.session.run_sync(insert("late"))

    async def refuse(request: Any) -> Any:
        return JSONResponse({}, 404, background=BackgroundTask(task))

    site.app.router.add_route("/", refuse, methods=["POST"])
    with site.running():
        assert site.get(method="POST").status == 404
        assert wait_for(file_store.names) == ["late"]
    assert logged(caplog, "WARNING") == []


def test_a_handshake_is_not_logged(file_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A WebSocket that is accepted or refused has no response whose status could be replaced."""
    site = AsgiSite(file_store)

    @site.app.websocket("/accept")
    async def accept(websocket: WebSocket) -> None:
        await site.db.session.run_sync(insert("accepted"))
        await websocket.accept()
        await websocket.close()

    @site.app.websocket("/refuse")
    async def refuse(websocket: WebSocket) -> None:
        await site.db.session.run_sync(insert("lost"))
        await websocket.close()

    with site.running():
        with connect(f"ws://127.0.0.1:{site.port}/accept"):
            pass
        with pytest.raises(InvalidStatus), connect(f"ws://127.0.0.1:{site.port}/refuse"):
            pass
    assert file_store.names() == ["accepted"]
    assert logged(caplog, "WARNING") == []


def test_a_database_that_was_not_used_is_not_logged(file_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """If an app has two databases, there is a line for the one that has committed, and none for the other."""
    site = replaced_site(file_store, raising)
    unused = type(site.db)("sqlite+aiosqlite://")
    unused.init_app(site.app)
    with site.running():
        assert site.get(method="POST").status == 500
    assert logged(caplog, "WARNING") == [warning(201, "status 500")]


@pytest.mark.parametrize("fails", ["first", "second"])
def test_of_two_databases_the_one_that_has_committed_is_logged(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two databases commit one after the other: if the second fails, the work of the first is saved under an error."""
    both = {name: Store("sqlite+aiosqlite", tmp_path / f"{name}.db") for name in ("first", "second")}
    site = AsgiSite(both["first"])
    other = type(site.db)(both["second"].url)
    databases = {"first": site.db, "second": other}
    other.init_app(site.app)
    event.listen(other.engine.sync_engine, "connect", check_foreign_keys)

    @site.app.post("/", status_code=201)
    async def create() -> None:
        for name, db in databases.items():
            await db.session.run_sync(add_orphan if name == fails else insert(name))

    with site.running():
        assert site.get(method="POST").status == 500
    saved = [name for name, each in both.items() if each.names()]
    assert saved == ([] if fails == "first" else ["first"])
    assert logged(caplog, "WARNING") == [warning(201, "status 500")] * len(saved)
    for each in both.values():
        each.engine.dispose()


# -- WSGI ------------------------------------------------------------------------------------------


def test_a_middleware_of_flask_that_starts_an_error_and_raises(
    flask_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """The server gets the status that was started last, and an incomplete body."""
    inner = flask_site.app.wsgi_app.app  # inside the outermost layer

    def middleware(environ: Any, start_response: Any) -> Any:
        for _ in inner(environ, lambda *started: None):
            pass
        start_response("502 Bad Gateway", TEXT)
        raise AppError

    flask_site.app.wsgi_app.app = middleware
    server = Server(flask_site.store).serve(flask_site.app)
    assert (server.started[0], server.complete) == ("502 Bad Gateway", False)
    assert flask_site.store.names() == ["tea"]
    assert logged(caplog, "WARNING") == [warning(201, "status 502")]


@pytest.mark.parametrize("fails", ["first", "second"])
def test_of_two_databases_of_flask_the_one_that_has_committed_is_logged(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As above: the error response of the second is sent although the first has committed."""
    both = {name: Store("sqlite+pysqlite", tmp_path / f"{name}.db") for name in ("first", "second")}
    databases = {name: Database(each.url) for name, each in both.items()}
    app = Flask(__name__)
    app.logger.disabled = True
    plugins = {name: SessionPlugin(database) for name, database in databases.items()}
    for name, plugin in plugins.items():
        plugin.init_app(app)
        event.listen(databases[name].engine, "connect", check_foreign_keys)

    @app.post("/")
    def create() -> Any:
        for name, plugin in plugins.items():
            (add_orphan if name == fails else insert(name))(plugin.session)
        return {}, 201

    assert app.test_client().post("/").status_code == 500
    saved = [name for name, each in both.items() if each.names()]
    assert saved == ([] if fails == "first" else ["first"])
    assert logged(caplog, "WARNING") == [warning(201, "status 500")] * len(saved)
    for name, each in both.items():
        databases[name].dispose()
        each.engine.dispose()


def test_a_middleware_of_flask_that_does_not_start_the_response(
    flask_site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """A body without a status is an error of the server."""
    inner = flask_site.app.wsgi_app.app

    def middleware(environ: Any, start_response: Any) -> Any:
        return iter([*inner(environ, lambda *started: None)])

    flask_site.app.wsgi_app.app = middleware
    server = Server(flask_site.store).serve(flask_site.app)
    assert (server.status, type(server.error)) == (500, AssertionError)
    assert flask_site.store.names() == ["tea"]
    assert logged(caplog, "WARNING") == [warning(201, BY_SERVER)]


def test_a_teardown_function_of_flask_that_raises(flask_site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The client receives the success, cut short, and no error: there is nothing to warn of."""

    @flask_site.app.teardown_request
    def fail(error: Any) -> None:
        raise AppError

    reply = flask_site.ask("/")
    assert (reply.status, reply.complete, flask_site.store.names()) == (201, False, ["tea"])
    assert logged(caplog, "WARNING") == []


def test_bare_middlewares_settle_by_the_status_that_is_sent(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """What is inside `SessionScopeMiddleware` replaces a response before the COMMIT."""
    db = Database(store.url, **POOL)

    def app(environ: Any, start_response: Any) -> Any:
        insert("tea")(db.session)
        start_response("201 Created", TEXT)
        return [b"tea"]

    def middleware(environ: Any, start_response: Any) -> Any:
        body = app(environ, lambda *started: None)
        start_response("403 Forbidden", TEXT)
        return body

    with Site(store, SessionScopeMiddleware(middleware, db), db).checked() as site:
        assert site.ask("/").status == 403
    assert store.names() == []
    assert logged(caplog, "WARNING") == []
