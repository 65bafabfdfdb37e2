"""A WSGI app that is mounted in an ASGI app with the same database: one request, one session."""

import asyncio
import http.client
import importlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import a2wsgi
import pytest
from fastapi import FastAPI, Request
from flask import Flask, Response, stream_with_context
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse

from session_plugin import Database
from session_plugin.asgi import SessionScopeMiddleware as ASGIMiddleware
from session_plugin.fastapi import SessionPlugin
from session_plugin.flask import SessionPlugin as FlaskPlugin
from session_plugin.wsgi import SessionScopeMiddleware as WSGIMiddleware

from .apps import lifespan
from .asgi_site import SYNC_DRIVERS, Site, stores
from .harness import Store, add_orphan, insert, wait_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and used
    starlettes = importlib.import_module("starlette.middleware.wsgi").WSGIMiddleware

BRIDGES = [a2wsgi.WSGIMiddleware, starlettes]
POOL_OF_ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 3}


store = stores(SYNC_DRIVERS)


@pytest.fixture(params=BRIDGES, ids=["a2wsgi", "starlette"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def site(store: Store, bridge: Any) -> Iterator[Site]:
    """A FastAPI app whose middleware uses the session before the Flask app that is mounted in it; one connection."""
    site = Site(store, sync=True, **POOL_OF_ONE)
    site.db.init_app(site.app)

    @site.app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        if "user" in request.headers:
            await run_in_threadpool(lambda: insert("user")(site.db.session))
        return await call_next(request)

    yield site


@pytest.fixture
def flask(site: Site, bridge: Any) -> Flask:
    flask = Flask(__name__)
    flask.logger.disabled = True
    site.plugin = FlaskPlugin(site.db.database)  # type: ignore[attr-defined]
    site.plugin.init_app(flask)  # type: ignore[attr-defined]
    flask.register_error_handler(IntegrityError, lambda error: ("conflict", 409))
    site.app.mount("/old", bridge(flask))
    return flask


def test_one_session(site: Site, flask: Flask, store: Store) -> None:
    """The view has the session of the middlewares around it, and one commit saves the work of both."""
    seen: list[Any] = []

    @site.app.middleware("http")
    async def note(request: Request, call_next: Any) -> Any:
        seen.append(site.db.session)
        response = await call_next(request)
        seen.append(site.db.session)
        seen.append(store.names())
        return response

    @flask.post("/<int:status>")
    def view(status: int) -> Any:
        session = site.plugin.session  # type: ignore[attr-defined]
        insert("view")(session)
        seen.append(session)
        return "", status

    with site.running():
        assert site.get("/old/201", "POST", user="1").status == 201
        assert seen[0] is seen[1] is seen[2]
        assert seen[3] == store.names() == ["user", "view"]
        store.clear()
        assert site.get("/old/409", "POST", user="1").status == 409
        assert store.names() == []
        assert site.get("/old/201", "POST").status == 201
        assert store.names() == ["view"]


def test_a_failed_commit(site: Site, flask: Flask, store: Store) -> None:
    """The mounted app's own handlers see it, and nothing is saved, of the outer app neither."""

    @flask.post("/orphan")
    def orphan() -> Any:
        add_orphan(site.plugin.session)  # type: ignore[attr-defined]
        return "", 201

    @flask.post("/broken")
    def broken() -> Any:
        insert("broken")(site.plugin.session)  # type: ignore[attr-defined]
        raise ValueError

    with site.running():
        reply = site.get("/old/orphan", "POST", user="1")
        assert (reply.status, reply.body) == (409, b"conflict")
        assert site.get("/old/broken", "POST", user="1").status == 500
        assert store.names() == []


@pytest.mark.parametrize("fails", [None, "orphan", "raised"])
def test_a_stream(site: Site, flask: Flask, store: Store, fails: str | None) -> None:
    """What the stream does is committed before its last byte, beside the layers outside; a failure cuts it off."""
    started, go_on = threading.Event(), threading.Event()

    @flask.post("/stream")
    def stream() -> Any:
        session = site.plugin.session  # type: ignore[attr-defined]
        insert("before")(session)

        def chunks() -> Iterator[str]:
            insert("late")(session)
            yield "one"
            started.set()
            assert go_on.wait(10)
            if fails == "raised":
                raise ValueError
            (add_orphan if fails else insert("later"))(session)
            yield "two"

        return Response(stream_with_context(chunks()), 201)

    with site.running(), site.connect() as connection:
        connection.request("POST", "/old/stream", headers={"user": "1"})
        response = connection.getresponse()
        assert response.status == 201
        assert started.wait(10)
        assert store.names() == ["before", "user"]
        go_on.set()
        if fails is None:
            assert response.read() == b"onetwo"
            assert store.names() == ["before", "late", "later", "user"]
        else:
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                response.read()
            assert wait_for(lambda: site.db.engine.pool.checkedout() == 0)
            assert store.names() == ["before", "user"]


@pytest.mark.parametrize("fails", ["status", "orphan"])
def test_a_middleware_beside_a_stream(site: Site, flask: Flask, store: Store, fails: str) -> None:
    """What a middleware does once the response has begun is settled before the first byte, and by its own outcome."""
    go_on, ended = threading.Event(), threading.Event()

    @site.app.middleware("http")
    async def log(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        session = site.db.session
        if fails == "orphan":
            await run_in_threadpool(add_orphan, session)
            event.listen(session, "before_commit", lambda _: go_on.set(), once=True)
            return response
        await run_in_threadpool(insert("log"), session)
        go_on.set()
        await run_in_threadpool(ended.wait, 10)
        await run_in_threadpool(insert("more"), session)
        return PlainTextResponse("conflict", 409)

    @flask.post("/stream")
    def stream() -> Any:
        insert("view")(site.plugin.session)  # type: ignore[attr-defined]

        def chunks() -> Iterator[str]:
            yield "one"
            go_on.wait(3)
            ended.set()

        return Response(chunks(), 201)

    with site.running():
        assert site.get("/old/stream", "POST").status == (409 if fails == "status" else 500)
        assert store.names() == ["view"]


def test_a_middleware_that_does_not_wait(site: Site, flask: Flask, store: Store) -> None:
    """An error that is sent while the view still runs is true: the view saves nothing."""
    begun, go_on = threading.Event(), threading.Event()

    class Impatient:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
                return

            async def ignore(message: Any) -> None:
                pass

            task = asyncio.create_task(self.app(scope, receive, ignore))
            assert await run_in_threadpool(begun.wait, 10)
            await PlainTextResponse("late", 504)(scope, receive, send)
            go_on.set()
            await asyncio.wait([task])
            task.exception()

    @flask.post("/slow")
    def slow() -> Any:
        insert("one")(site.plugin.session)  # type: ignore[attr-defined]
        begun.set()
        assert go_on.wait(10)
        insert("two")(site.plugin.session)  # type: ignore[attr-defined]
        return "", 201

    site.app.add_middleware(Impatient)
    with site.running():
        assert site.get("/old/slow", "POST").status == 504
    assert store.names() == []


def test_what_follows_the_response(store: Store) -> None:
    """A function that the response calls when it is closed is a transaction of its own, beside the layers outside."""
    site = Site(store, sync=True, **POOL_OF_ONE)
    site.db.init_app(site.app)
    flask, plugin = Flask(__name__), FlaskPlugin(site.db.database)
    plugin.init_app(flask)
    site.app.mount("/old", a2wsgi.WSGIMiddleware(flask))

    @flask.post("/")
    def view() -> Any:
        response = Response(iter(["body"]))
        response.call_on_close(lambda: insert("late")(plugin.session))
        insert("view")(plugin.session)
        return response

    with site.running():
        assert site.get("/old/", "POST").body == b"body"
        assert wait_for(lambda: store.names() == ["late", "view"])


def test_plain_middlewares(store: Store, bridge: Any) -> None:
    """The middlewares for WSGI and ASGI alone: a failed commit is raised outside of both."""
    db = Database(store.url, **POOL_OF_ONE)
    sessions: list[Any] = []

    def wsgi_app(environ: Any, start_response: Any) -> Any:
        sessions.append(db.session)
        (add_orphan if environ["PATH_INFO"] == "/orphan" else insert(environ["PATH_INFO"]))(db.session)
        start_response("201 Created", [])
        if environ["PATH_INFO"] == "/stream":
            return (insert(name)(db.session) or name.encode() for name in ("one", "two"))
        return [b"body"]

    mounted = bridge(WSGIMiddleware(wsgi_app, db))

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        sessions.append(db.session)
        await mounted(scope, receive, send)

    site = Site(store, ASGIMiddleware(asgi_app, db))
    site.db, initialised = SessionPlugin(db), FastAPI()
    site.db.init_app(initialised)
    with site.running():
        assert site.get("/plain", "POST").body == b"body"
        assert sessions[0] is sessions[1]
        assert site.get("/stream", "POST").body == b"onetwo"
        assert store.names() == ["/plain", "/stream", "one", "two"]
        assert site.get("/orphan", "POST").status == 500
        assert store.names() == ["/plain", "/stream", "one", "two"]


# -- what is not mounted ---------------------------------------------------------------------------


def test_a_client_in_an_endpoint(store: Store) -> None:
    """An endpoint that calls a WSGI app by a test client, under its own path too, makes another request of it."""
    site = Site(store, sync=True)
    site.db.init_app(site.app)
    flask, plugin = Flask(__name__), FlaskPlugin(site.db.database)
    plugin.init_app(flask)
    sessions: list[Any] = []

    @flask.post("/old")
    def view() -> Any:
        sessions.append(plugin.session)
        return "", 201

    @site.app.post("/old")
    def endpoint() -> Any:
        environ = {"wsgi.multiprocess": True}
        sessions.append(site.db.session)
        assert flask.test_client().post("/old", environ_overrides=environ).status_code == 201
        assert flask.test_client().post("/old").status_code == 201
        return PlainTextResponse("", 201)

    with site.running():
        assert site.get("/old", "POST").status == 201
    assert len({id(session) for session in sessions}) == 3


def test_a_client_in_a_mounted_view(site: Site, flask: Flask) -> None:
    """What a mounted view asks of its own app by a test client is another request."""
    sessions: list[Any] = []

    @flask.post("/outer")
    def outer() -> Any:
        sessions.append(site.plugin.session)  # type: ignore[attr-defined]
        environ = {"wsgi.multiprocess": True}
        return "", flask.test_client().post("/inner", base_url="http://x/old", environ_overrides=environ).status_code

    @flask.post("/inner")
    def inner() -> Any:
        sessions.append(site.plugin.session)  # type: ignore[attr-defined]
        return "", 201

    with site.running():
        assert site.get("/old/outer", "POST").status == 201
    assert sessions[0] is not sessions[1]


def test_a_session_scope_around_the_mounted_app(site: Site, flask: Flask, store: Store, bridge: Any) -> None:
    """A unit of work that a middleware opens is not the request's, and the mounted app does not settle it."""
    inner = bridge(flask)

    async def in_a_scope(scope: Any, receive: Any, send: Any) -> None:
        with site.db.session_scope(new=True):
            await inner(scope, receive, send)

    site.app.mount("/scoped", in_a_scope)
    sessions: list[Any] = []

    @flask.post("/view")
    def view() -> Any:
        sessions.append(site.plugin.session)  # type: ignore[attr-defined]
        insert("view")(sessions[-1])
        return "", 201

    with site.running():
        assert site.get("/scoped/view", "POST").status == 201
        assert store.names() == ["view"]
