"""Background callables: each is a unit of work of its own, wherever the framework keeps them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from flask import Flask, g, stream_with_context
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.background import BackgroundTasks as StarletteBackgroundTasks
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.routing import Mount, Route

from session_plugin import AsyncDatabase, read_only
from session_plugin.flask import SessionPlugin as FlaskSessionPlugin
from session_plugin.starlette import AsyncSessionPlugin

from .asgi_site import Gate, Site, stores
from .harness import POOL, Store, add_orphan, count, insert, wait_for
from .wsgi_site import Site as WSGISite
from .wsgi_site import new_environ

store = stores(["sqlite+aiosqlite", "postgresql+asyncpg"])
server_store = stores(["postgresql+asyncpg", "postgresql+psycopg"])
file_store = stores(["sqlite+aiosqlite"])
sync_file_store = stores(["sqlite+pysqlite"])
flask_store = stores(["sqlite+pysqlite", "postgresql+psycopg", "mariadb+pymysql"])
sync_store = stores(["sqlite+pysqlite", "postgresql+psycopg"])


class Tasks:
    """Tasks that leave a trace: the first two are kept, and the third fails."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.held: list[int] = []
        self.ended = threading.Event()

    async def add(self, name: str) -> None:
        self.held.append(self.site.sync_engine.pool.checkedout())
        await self.site.db.session.run_sync(insert(name))

    async def fail(self) -> None:
        try:
            await self.add("lost")
            raise RuntimeError("boom")
        finally:
            self.ended.set()

    def put(self, tasks: Any) -> Any:
        tasks.add_task(self.add, "first")
        tasks.add_task(self.add, "second")
        tasks.add_task(self.fail)
        return tasks

    def check(self, *others: str) -> None:
        assert self.ended.wait(10)
        self.site.settle_down()
        assert self.site.store.names() == ["first", *others, "second"]
        assert self.held == [0, 0, 0]


@contextmanager
def running(site: Site) -> Iterator[Tasks]:
    with site.running():
        yield Tasks(site)


class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request: Any, call_next: Any) -> Any:
        return await call_next(request)


class Lines(StreamingResponse):
    """A response with a method of its own that sends, as those of SSE libraries have."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.lines(send)
        if self.background is not None:
            await self.background()

    async def lines(self, send: Any) -> None:
        async def send_line(message: Any) -> None:
            await send(message)

        await send_line({"type": "http.response.start", "status": 200, "headers": []})
        await send_line({"type": "http.response.body", "body": b"line"})


class Delegating(Response):
    """A response that sends by another one, and runs its own tasks."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("inner")(scope, receive, send)
        if self.background is not None:
            await self.background()


def body() -> Any:
    yield b"a"
    yield b"b"


RESPONSES: dict[str, Callable[..., Any]] = {
    "plain": lambda tasks: PlainTextResponse("", background=tasks),
    "json": lambda tasks: JSONResponse({}, background=tasks),
    "stream": lambda tasks: StreamingResponse(body(), background=tasks),
    "file": lambda tasks: FileResponse(__file__, background=tasks),
    "own": lambda tasks: Lines(body(), background=tasks),
    "delegating": lambda tasks: Delegating(background=tasks),
    "chained": lambda tasks: JSONResponse({}, background=BackgroundTask(tasks)),
    "nested": lambda tasks: JSONResponse({}, background=StarletteBackgroundTasks([tasks])),
}


@pytest.mark.parametrize("behind", [None, Passing, GZipMiddleware])
@pytest.mark.parametrize("response", RESPONSES)
def test_kinds_of_responses(store: Store, response: str, behind: Any) -> None:
    """Each task of every kind of response is a unit of work, also behind a middleware and in an included router."""
    site = Site(store)
    router = APIRouter()

    @router.get("/")
    async def endpoint() -> Any:
        await site.db.session.run_sync(insert("request"))
        return RESPONSES[response](tasks.put(StarletteBackgroundTasks()))

    site.app.include_router(router)
    if behind is not None:
        site.app.add_middleware(behind)
    with running(site) as tasks:
        assert site.get().status == 200
        tasks.check("request")


@pytest.mark.parametrize("returned", ["model", "response", "stream"])
def test_parameter(store: Store, returned: str) -> None:
    """FastAPI's parameter, which a dependency shares, and to which a hook and a stream add."""
    site = Site(store)

    async def dependency(background: BackgroundTasks) -> None:
        background.add_task(tasks.add, "first")

    @site.app.get("/", dependencies=[Depends(dependency)])
    async def endpoint(background: BackgroundTasks) -> Any:
        await site.db.session.run_sync(insert("request"))
        if returned == "stream":
            return StreamingResponse(adding(background))
        site.db.on_commit(background.add_task, tasks.add, "second")
        site.db.on_commit(background.add_task, tasks.fail)
        return {} if returned == "model" else PlainTextResponse("")

    async def adding(background: BackgroundTasks) -> Any:
        yield b"a"
        background.add_task(tasks.add, "second")
        background.add_task(tasks.fail)

    with running(site) as tasks:
        assert site.get().status == 200
        tasks.check("request")


def test_a_task_keeps_what_it_shows(file_store: Store) -> None:
    """Its function and arguments can be looked at, and one that a task adds is a unit of work too."""
    site = Site(file_store)
    seen: list[Any] = []

    @site.app.get("/")
    async def endpoint(background: BackgroundTasks) -> None:
        async def look() -> None:
            seen.extend((task.func, task.args, task.kwargs, task.is_async) for task in background.tasks)
            tasks.put(background)

        background.add_task(look)
        background.add_task(seen.append, 1)

    with running(site) as tasks:
        assert site.get().status == 200
        tasks.check()
    assert [entry[1:] for entry in seen[:2]] == [((), {}, True), ((1,), {}, False)]
    assert seen[1][0] == seen.append
    assert seen[2] == 1


@pytest.mark.parametrize("single", [True, False])
def test_a_task_without_a_session_of_the_request(store: Store, single: bool) -> None:
    """Tasks of an endpoint that used no session, one by one; also one task by itself, and any awaitable callable."""
    site = Site(store)

    async def endpoint(request: Any) -> Any:
        task = BackgroundTask(tasks.add, "first") if single else lambda: tasks.add("first")
        return JSONResponse({}, background=task)  # type: ignore[arg-type]

    site.app = Starlette(routes=[Route("/", endpoint)])
    with running(site) as tasks:
        assert site.get().status == 200
        assert wait_for(store.names) == ["first"]
        site.settle_down()


def test_tasks_of_middlewares_and_handlers(store: Store) -> None:
    """A response that a middleware or an error handler makes, or gives tasks to, in a mounted app too."""
    site = Site(store, Starlette())

    def giving(path: str) -> Any:
        async def dispatch(request: Any, call_next: Any) -> Any:
            response = await call_next(request)
            if request.url.path == path:
                response.background = tasks.put(StarletteBackgroundTasks())
            return response

        return dispatch

    async def given(request: Any) -> Any:
        return JSONResponse({})

    async def raising(request: Any) -> Any:
        await site.db.session.run_sync(insert("discarded"))
        raise LookupError

    async def handler(request: Any, error: Exception) -> Any:
        return JSONResponse({}, 409, background=tasks.put(StarletteBackgroundTasks()))

    routes = [Route("/given", given), Route("/raising", raising)]
    inner = Starlette(routes=routes, exception_handlers={LookupError: handler})
    inner.add_middleware(BaseHTTPMiddleware, dispatch=giving("/in/given"))
    site.app = Starlette(routes=[*routes, Mount("/in", inner)], exception_handlers={LookupError: handler})
    site.app.add_middleware(BaseHTTPMiddleware, dispatch=giving("/given"))
    with site.running():
        for path in ("/given", "/in/given", "/raising", "/in/raising"):
            store.clear()
            tasks = Tasks(site)
            assert site.get(path).status == (200 if path.endswith("given") else 409)
            tasks.check()


def test_two_databases(store: Store, file_store: Store) -> None:
    """Each task is a unit of work on each of them."""
    site = Site(store)
    other = AsyncSessionPlugin(file_store.url)
    file_store.clear()

    async def both(name: str) -> None:
        await tasks.add(name)
        await other.session.run_sync(insert(name))
        if name == "lost":
            tasks.ended.set()
            raise RuntimeError("boom")

    @site.app.get("/")
    async def endpoint(background: BackgroundTasks) -> None:
        for name in ("first", "second", "lost"):
            background.add_task(both, name)

    other.init_app(site.app)
    with running(site) as tasks:
        assert site.get().status == 200
        tasks.check()
        assert file_store.names() == ["first", "second"]


def test_responses_and_tasks_that_requests_share(server_store: Store) -> None:
    """A task, or a whole response, that serves two requests at once ends the work of its own one only."""
    site = Site(server_store)
    gates = {"a": Gate(), "b": Gate()}
    names = iter(("a", "b"))
    held: list[str] = []

    async def task() -> None:
        name = next(names)
        await site.db.session.run_sync(insert(name))
        held.append(name)
        await asyncio.to_thread(gates[name].pass_through)
        if name == "a":
            raise RuntimeError("boom")

    shared = JSONResponse({}, background=StarletteBackgroundTasks([BackgroundTask(task)]))

    @site.app.get("/")
    async def endpoint() -> Any:
        return shared

    @site.app.get("/single")
    async def single() -> Any:
        return JSONResponse({}, background=shared.background)

    with site.running():
        assert site.get().status == 200
        assert gates["a"].reached.wait(10)
        assert site.get("/single").status == 200
        assert gates["b"].reached.wait(10)
        gates["b"].opened.set()
        assert wait_for(server_store.names) == ["b"]
        gates["a"].opened.set()
        site.settle_down()
        assert server_store.names() == ["b"]


def test_tasks_that_run_at_once_share_a_transaction(store: Store) -> None:
    """A framework of one's own may gather them; then the first to end does not end the work of the others."""
    site = Site(store)

    class Gathered(StarletteBackgroundTasks):
        async def __call__(self) -> None:
            await asyncio.gather(*[task() for task in self.tasks])

    async def first() -> None:
        await site.db.session.run_sync(insert("first"))
        begun.set()

    async def second() -> None:
        await begun.wait()
        await asyncio.sleep(0)
        assert site.db.session.in_transaction()
        await site.db.session.run_sync(insert("second"))

    @site.app.get("/")
    async def endpoint() -> Any:
        nonlocal begun
        begun = asyncio.Event()
        return JSONResponse({}, background=Gathered([BackgroundTask(first), BackgroundTask(second)]))

    begun: Any = None
    with site.running():
        assert site.get().status == 200
        assert wait_for(store.names) == ["first", "second"]


@pytest.mark.parametrize("last_fails", [True, False])
def test_one_of_several_tasks_at_once_fails(store: Store, last_fails: bool) -> None:
    """What they did together is rolled back or saved as the last one to end says."""
    site = Site(store)

    class Gathered(StarletteBackgroundTasks):
        async def __call__(self) -> None:
            at_once.extend(asyncio.ensure_future(task()) for task in self.tasks)
            await asyncio.gather(*at_once, return_exceptions=True)

    async def first() -> None:
        await site.db.session.run_sync(insert("first"))
        begun.set()
        await asyncio.wait(at_once[1:])
        if last_fails:
            raise LookupError

    async def second() -> None:
        await begun.wait()
        raise RuntimeError("boom")

    @site.app.get("/")
    async def endpoint() -> Any:
        nonlocal begun
        begun = asyncio.Event()
        return JSONResponse({}, background=Gathered([BackgroundTask(first), BackgroundTask(second)]))

    at_once: list[asyncio.Future[Any]] = []
    begun: Any = None
    with site.running():
        assert site.get().status == 200
        site.settle_down()
        assert wait_for(lambda: not site._server.server_state.tasks)
        assert store.names() == ([] if last_fails else ["first"])


@pytest.mark.parametrize("how", ["raises", "refused"])
def test_the_log_of_a_task_whose_work_is_lost(file_store: Store, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """An ERROR: no response can say it any more."""
    site = Site(file_store)

    async def task() -> None:
        await site.db.session.run_sync(insert("lost") if how == "raises" else add_orphan)
        if how == "raises":
            raise LookupError

    @site.app.get("/")
    async def endpoint() -> Any:
        return JSONResponse({}, background=BackgroundTask(task))

    with site.running():
        assert site.get().status == 200
        assert wait_for(lambda: not site._server.server_state.tasks)
    errors = [record.getMessage() for record in caplog.records if record.name == "session_plugin"]
    expected = {"raises": "its work is discarded (LookupError", "refused": "the work after the response was not saved"}
    assert [level for name, level, _ in caplog.record_tuples if name == "session_plugin"] == [logging.ERROR]
    assert expected[how] in errors[0]
    assert file_store.names() == []


def test_a_task_after_its_request(file_store: Store) -> None:
    """It is called as it is, where no request is; so is a response that no Starlette class sends."""
    site = Site(file_store)
    ran: list[int] = []

    async def append() -> None:
        ran.append(1)

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    shared = BackgroundTask(append)
    response = JSONResponse({}, background=shared)
    site.app.mount("/plain", plain)

    @site.app.get("/")
    async def endpoint() -> Any:
        return response

    with site.running():
        assert (site.get("/plain/").status, site.get().status) == (200, 200)
        assert wait_for(lambda: ran == [1])
    asyncio.run(response.background())  # type: ignore[arg-type, misc]
    assert ran == [1, 1]


def test_what_a_task_chooses_ends_with_it(store: Store) -> None:
    """Its policy, its doom() and its hooks are its own; what the request chose holds for each."""
    site = Site(store)
    seen: list[Any] = []

    async def doomed() -> None:
        await site.db.session.run_sync(insert("doomed"))
        site.db.on_commit(seen.append, "never")
        site.db.on_rollback(seen.append, "doomed")
        site.db.doom("a dry run")

    async def reading() -> None:
        site.db.use(read_only)
        seen.append(await site.db.session.run_sync(count))

    async def writing() -> None:
        await site.db.session.run_sync(insert("written"))
        site.db.on_commit(lambda: seen.append(store.names()))

    async def last() -> None:
        seen.append("last")

    @site.app.get("/")
    async def endpoint(background: BackgroundTasks) -> None:
        for task in (doomed, reading, writing, last):
            background.add_task(task)

    @site.app.get("/doomed")
    async def dry(background: BackgroundTasks) -> None:
        site.db.doom("a dry run")
        background.add_task(writing)
        background.add_task(last)

    with site.running():
        assert site.get().status == 200
        assert wait_for(lambda: "last" in seen)
        site.settle_down()
        assert seen == ["doomed", 0, ["written"], "last"]
        seen.clear()
        store.clear()
        assert site.get("/doomed").status == 200
        assert wait_for(lambda: "last" in seen)
        site.settle_down()
    assert (seen, store.names()) == (["last"], [])


def test_a_task_calls_another_app_on_the_same_database(server_store: Store) -> None:
    """The tasks of a request inside a task end their own work only."""
    database = AsyncDatabase(server_store.url)
    site = Site(server_store)
    site.db = AsyncSessionPlugin(database)
    inner = FastAPI()
    inner_db: Any = AsyncSessionPlugin(database)
    inner_db.init_app(inner)
    names = iter(("inner 1", "inner 2"))

    async def inner_task() -> None:
        await inner_db.session.run_sync(insert(next(names)))

    @inner.get("/")
    async def inner_endpoint(background: BackgroundTasks) -> None:
        background.add_task(inner_task)

    async def call() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(inner), base_url="http://inner") as client:
            await client.get("/")

    async def calling() -> None:
        await call()
        await site.db.session.run_sync(insert("outer"))
        await call()
        assert site.db.session.in_transaction()
        raise RuntimeError("boom")

    @site.app.get("/")
    async def endpoint(background: BackgroundTasks) -> None:
        background.add_task(calling)

    with site.running():
        assert site.get().status == 200
        assert wait_for(lambda: server_store.names() == ["inner 1", "inner 2"])
        site.settle_down()
        assert server_store.names() == ["inner 1", "inner 2"]


# -- a response that has not ended ---------------------------------------------------------------------


@pytest.mark.parametrize("reads", [True, False])
def test_tasks_after_a_client_that_left(store: Store, reads: bool) -> None:
    """What the stream had begun is rolled back, and each task saves its own work."""
    site = Site(store)
    gate = Gate()

    async def stream() -> Any:
        yield b"a"
        await site.db.session.run_sync(count if reads else insert("half"))
        await asyncio.to_thread(gate.pass_through)
        while True:
            yield b"b"
            await asyncio.sleep(0.01)

    @site.app.get("/")
    async def endpoint() -> Any:
        return OldStreaming(stream(), background=tasks.put(StarletteBackgroundTasks()))

    with running(site) as tasks:
        with site.connect() as connection:
            connection.request("GET", "/")
            assert gate.reached.wait(10)
            connection.sock.close()
        gate.opened.set()
        tasks.check()


class OldStreaming(StreamingResponse):
    """Runs its tasks although the client left, as Starlette does for servers of ASGI 2.3 and older."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__({**scope, "asgi": {"spec_version": "2.0"}}, receive, send)


class Holding:
    """Sends the whole response only when the app has returned, its background tasks included."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        held: list[Any] = []

        async def hold(message: Any) -> None:
            held.append(message)

        await self.app(scope, receive, hold if scope["type"] == "http" else send)
        for message in held:
            await send(message)


@pytest.mark.parametrize("streams", [True, False])
def test_tasks_behind_a_middleware_that_holds_the_response(store: Store, streams: bool) -> None:
    """They are units of work, unless the body has left work that is settled with the response: they add to that."""
    site = Site(store)

    async def stream() -> Any:
        yield b"a"
        if streams:
            await site.db.session.run_sync(insert("streamed"))

    @site.app.get("/")
    async def endpoint() -> Any:
        return StreamingResponse(stream(), background=background)

    site.app.add_middleware(Holding)
    with running(site) as tasks:
        background = StarletteBackgroundTasks([BackgroundTask(tasks.add, "first"), BackgroundTask(tasks.add, "second")])
        assert site.get().status == 200
        site.settle_down()
        assert store.names() == ["first", "second", *(["streamed"] if streams else [])]
        assert tasks.held == ([1, 1] if streams else [0, 0])


def test_a_stream_that_runs_its_tasks_itself(store: Store) -> None:
    """Inside the response they are part of it."""
    site = Site(store)

    @site.app.get("/")
    async def endpoint() -> Any:
        async def stream() -> Any:
            yield b"a"
            await site.db.session.run_sync(insert("streamed"))
            await response.background()
            raise RuntimeError("boom")

        response: Any = StreamingResponse(stream(), background=BackgroundTask(tasks.add, "part of it"))
        return response

    with running(site) as tasks:
        assert not site.get().complete
        site.settle_down()
        assert store.names() == []


# -- rolled back, and background tasks all the same ----------------------------------------------------


def test_tasks_of_a_response_that_rolled_back(file_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """They run, and the log warns of them; those of on_commit() do not run, and nothing warns of others."""
    site = Site(file_store)
    ran: list[str] = []

    @site.app.get("/{how}")
    async def endpoint(how: str, background: BackgroundTasks) -> Any:
        await site.db.session.run_sync(count if how == "read" else insert(how))
        if how == "hook":
            site.db.on_commit(background.add_task, ran.append, how)
        elif how != "none":
            background.add_task(ran.append, how)
        if how == "raised":
            raise LookupError
        task = BackgroundTask(ran.append, how) if how == "single" else None
        return JSONResponse({}, 201 if how == "kept" else 409, background=task)

    @site.app.exception_handler(LookupError)
    async def handler(request: Any, error: Exception) -> Any:
        return JSONResponse({}, 409, background=BackgroundTask(ran.append, "handler"))

    def warned(how: str) -> list[str]:
        caplog.clear()
        ran.clear()
        site.get(f"/{how}")
        assert wait_for(lambda: not site._server.server_state.tasks)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        return [*ran, *warnings]

    with site.running():
        for how in ("added", "single"):
            name, warning = warned(how)
            assert name == how
            assert warning.startswith(f"GET /{how}: its work was rolled back")
            assert "db.on_commit(tasks.add_task, ...)" in warning
        assert [warned(how) for how in ("hook", "none", "read", "kept", "raised")] == [
            [], [], ["read"], ["kept"], ["handler"],
        ]  # fmt: skip


# -- sync databases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_thread", [True, False])
def test_sync_tasks(sync_store: Store, in_thread: bool) -> None:
    """With a sync database too, in a thread and on the event loop; a request whose task waits holds no connection."""
    site = Site(sync_store, sync=True, pool_size=1)
    held: list[int] = []

    def add(name: str) -> None:
        held.append(site.sync_engine.pool.checkedout())
        insert(name)(site.db.session)

    def orphan() -> None:
        add_orphan(site.db.session)

    async def add_on_the_loop(name: str) -> None:
        add(name)

    @site.app.get("/")
    def endpoint(background: BackgroundTasks) -> None:
        insert("request")(site.db.session)
        for name in ("first", "second"):
            background.add_task(add if in_thread else add_on_the_loop, name)
        background.add_task(orphan)
        background.add_task(add, "never")

    with site.running():
        assert site.get().status == 200
        assert wait_for(lambda: sync_store.names() == ["first", "request", "second"])
        site.settle_down()
    assert (held, sync_store.names()) == ([0, 0], ["first", "request", "second"])


# -- Flask ---------------------------------------------------------------------------------------------


@pytest.fixture
def flask_site(flask_store: Store) -> Iterator[WSGISite]:
    flask_store.clear()
    app = Flask(__name__)
    app.logger.disabled = True
    db = FlaskSessionPlugin(flask_store.url, **POOL)
    db.init_app(app)
    with WSGISite(flask_store, app, db).checked() as site:
        yield site


class Calls:
    """Functions for call_on_close() that leave a trace: the first two are kept, and the third fails."""

    def __init__(self, site: WSGISite) -> None:
        self.db = site.db
        self.held: list[int] = []

    def add(self, name: str) -> None:
        self.held.append(self.db.engine.pool.checkedout())
        insert(name)(self.db.session)

    def fail(self) -> None:
        self.add("lost")
        raise RuntimeError("boom")

    def put(self, response: Any) -> Any:
        response.call_on_close(partial(self.add, "first"))
        response.call_on_close(partial(self.add, "second"))
        response.call_on_close(self.fail)
        return response


def stream_of(db: Any) -> Any:
    def stream() -> Iterator[bytes]:
        yield b"a"
        insert("streamed")(db.session)

    return stream_with_context(stream())


@pytest.mark.parametrize("kind", ["whole", "stream", "unused", "handler", "refused", "hook", "late"])
def test_functions_called_on_close(flask_site: WSGISite, kind: str) -> None:
    """Each is a unit of work, whatever made the response and whenever it was added."""
    site, app, db, calls = flask_site, flask_site.app, flask_site.db, Calls(flask_site)
    app.register_error_handler(LookupError, lambda error: calls.put(app.response_class("", 409)))
    for error in (IntegrityError, OperationalError):
        app.register_error_handler(error, lambda error: calls.put(app.response_class("", 409)))

    @app.post("/")
    def view() -> Any:
        if kind == "unused":
            return calls.put(app.response_class(""))
        insert("request")(db.session)
        if kind == "handler":
            raise LookupError
        if kind == "refused":
            add_orphan(db.session)
        if kind in ("whole", "stream"):
            return calls.put(app.response_class(stream_of(db) if kind == "stream" else ""))
        response = app.response_class(adding() if kind == "late" else "")
        if kind == "hook":
            db.on_commit(calls.put, response)
        if kind == "late":
            g.response = response
        return response

    @stream_with_context
    def adding() -> Iterator[bytes]:
        calls.put(g.response)
        yield b"a"

    others = {"stream": ["request", "second", "streamed"], "whole": ["request", "second"]}
    others |= {"hook": others["whole"], "late": others["whole"]}
    assert site.ask("/").status == (409 if kind in ("handler", "refused") else 200)
    assert wait_for(lambda: len(calls.held) == 3)
    site.settle_down()
    assert site.store.names() == ["first", *others.get(kind, ["second"])]
    assert calls.held == [0, 0, 0]


def test_functions_called_after_a_response_was_cut_short(flask_site: WSGISite) -> None:
    """What the generator's end did is rolled back, and each function saves its own work."""
    app, db, calls = flask_site.app, flask_site.db, Calls(flask_site)

    def stream() -> Iterator[bytes]:
        try:
            yield b"a"
            yield b"b"
        finally:
            insert("half")(db.session)

    @app.post("/")
    def view() -> Any:
        insert("request")(db.session)
        return calls.put(app.response_class(stream()))

    body = iter(app(new_environ(), lambda *args: None))
    assert next(body) == b"a"
    with pytest.raises(RuntimeError, match="boom"):
        body.close()  # type: ignore[attr-defined]
    assert flask_site.store.names() == ["first", "request", "second"]
    assert calls.held == [0, 0, 0]


def test_the_tail_of_a_generator_that_fails_at_commit(flask_site: WSGISite) -> None:
    """What follows a full Content-Length is settled first; the functions run although that fails."""
    app, db, calls = flask_site.app, flask_site.db, Calls(flask_site)

    def stream() -> Iterator[bytes]:
        try:
            yield b"a"
        finally:
            add_orphan(db.session)

    @app.post("/")
    def view() -> Any:
        response = app.response_class(stream(), headers={"Content-Length": "1"})
        response.call_on_close(partial(calls.add, "first"))
        return response

    body = iter(app(new_environ(), lambda *args: None))
    assert next(body) == b"a"
    with pytest.raises((IntegrityError, OperationalError)):
        body.close()  # type: ignore[attr-defined]
    assert flask_site.store.names() == ["first"]
    assert calls.held == [0]


def test_functions_of_two_databases(flask_site: WSGISite, sync_file_store: Store) -> None:
    """Each is a unit of work on each of them."""
    app, calls = flask_site.app, Calls(flask_site)
    other = FlaskSessionPlugin(sync_file_store.url)
    other.init_app(app)
    sync_file_store.clear()

    def both(name: str) -> None:
        calls.add(name)
        insert(name)(other.session)
        if name == "lost":
            raise RuntimeError("boom")

    @app.post("/")
    def view() -> Any:
        response = app.response_class("")
        for name in ("first", "lost"):
            response.call_on_close(partial(both, name))
        return response

    assert flask_site.ask("/").status == 200
    assert wait_for(lambda: len(calls.held) == 2)
    flask_site.settle_down()
    with app.app_context():
        other.dispose()
    assert flask_site.store.names() == sync_file_store.names() == ["first"]


def test_a_response_that_requests_share(flask_site: WSGISite) -> None:
    """Its functions end the work of the request that runs them, or of none."""
    app, db = flask_site.app, flask_site.db
    shared = app.response_class("")
    names = iter(("first", "second"))
    shared.call_on_close(lambda: insert(next(names))(db.session))
    app.post("/")(lambda: shared)
    bodies = [app(new_environ(), lambda *args: None) for _ in range(2)]
    for body in bodies:
        assert b"".join(body) == b""
        body.close()
    assert flask_site.store.names() == ["first", "second"]
