"""What FastAPI adds to the promises: dependencies, response models, streams and exit stacks."""

import asyncio
import contextvars
import sys
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response, Security, WebSocket
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from session_plugin import AsyncDatabase, ConfigurationError, ScopeClosedError
from session_plugin.database.interface import core_of
from session_plugin.fastapi import AsyncSessionPlugin
from session_plugin.scope.opening import open_unit_of_work

from .apps import AsyncFastAPIHarness, SyncFastAPIHarness
from .asgi_site import ASYNC_DRIVERS, SYNC_DRIVERS, Gate, Site, stores
from .contract import Contract, on
from .harness import Store, add_orphan, count, insert, wait_for

async_store = stores(ASYNC_DRIVERS)
sync_store = stores(SYNC_DRIVERS)
file_store = stores(["sqlite+aiosqlite"])


@on(AsyncFastAPIHarness)
class TestAsyncContract(Contract):
    """The promises of the contract."""


@on(SyncFastAPIHarness)
class TestSyncContract(Contract):
    """The promises of the contract."""


# -- 1: one session for each request ---------------------------------------------------------------


def test_one_request_has_one_session(file_store: Store) -> None:
    """All ways to access the session return the same one within a request, and a different one in the next request."""
    site = Site(file_store)
    app, db = site.app, site.db
    seen: list[Any] = []

    def note(session: Any = None) -> None:
        seen.append(db.session if session is None else session)

    class Early(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            note()
            response = await call_next(request)
            note()
            return response

    app.add_middleware(Early)
    db.init_app(app)
    app.add_middleware(Early)
    SessionDep = Annotated[AsyncSession, Depends(db.get_session)]

    async def sub(session: SessionDep) -> None:
        note(session)

    def sub_in_a_thread() -> None:
        note()

    router = APIRouter(dependencies=[Depends(sub), Depends(sub_in_a_thread)])

    @router.get("/")
    async def endpoint(
        session: SessionDep,
        again: Annotated[AsyncSession, Depends(db.get_session, use_cache=False)],
        secured: Annotated[AsyncSession, Security(db.get_session, scopes=["orders"])],
        background: BackgroundTasks,
    ) -> Any:
        for each in (session, again, secured, None):
            note(each)
        background.add_task(note)

        async def body() -> Any:
            note()
            yield b"body"
            await asyncio.to_thread(note)

        return StreamingResponse(body(), background=background)

    app.include_router(router, prefix="/orders")
    mounted = FastAPI()
    mounted.add_middleware(Early)
    mounted.get("/")(note_of(note))
    app.mount("/mounted", mounted)
    with site.running():
        assert site.get("/orders/").body == b"body"
        assert wait_for(lambda: len(seen) == 13)
        first = set(seen)
        seen.clear()
        assert site.get("/mounted/").status == 200
    assert len(first) == 1
    assert len(seen) == 7
    assert len(set(seen)) == 1
    assert first.isdisjoint(seen)


def note_of(note: Callable[[], None]) -> Any:
    async def endpoint() -> None:
        note()

    return endpoint


def test_dependency_override_replaces_the_session(file_store: Store) -> None:
    """An override of `get_session` replaces the session like any dependency, and no session is created."""
    site = Site(file_store)
    made: list[Any] = []

    @site.app.get("/")
    async def endpoint(session: Annotated[Any, Depends(site.db.get_session)]) -> Any:
        made.append(site.db._unit_of_work().has_session)
        return {"session": session}

    site.app.dependency_overrides[site.db.get_session] = lambda: "fake"
    with site.running():
        assert site.get().json == {"session": "fake"}
    assert made == [False]


def test_head_and_options(file_store: Store) -> None:
    """HEAD and OPTIONS requests commit what they write."""
    site = Site(file_store)

    @site.app.api_route("/", methods=["HEAD", "OPTIONS"])
    async def endpoint(session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> Any:
        names = await session.run_sync(count)
        await session.run_sync(insert(f"row {names}"))

    with site.running():
        assert (site.get(method="HEAD").status, site.get(method="OPTIONS").status) == (200, 200)
        assert file_store.names() == ["row 0", "row 1"]


def test_middleware_that_responds_itself(file_store: Store) -> None:
    """The response of a middleware that does not call the app decides: its 401 rolls back, and its 200 commits."""
    site = Site(file_store)

    @site.app.middleware("http")
    async def auth(request: Any, call_next: Any) -> Any:
        await site.db.session.run_sync(insert(request.url.path))
        return JSONResponse({}, 401 if request.url.path == "/no" else 200)

    with site.running():
        assert (site.get("/no").status, site.get("/yes").status) == (401, 200)
        assert file_store.names() == ["/yes"]


# -- 3: a failed commit is an error response -------------------------------------------------------


def refusing_endpoints(site: Site, ran: list[str]) -> None:
    """Add an endpoint for each kind of response; the COMMIT of each one fails."""
    app, db, file = site.app, site.db, __file__

    async def dependency(background: BackgroundTasks) -> AsyncSession:
        session: AsyncSession = await db.get_session()
        await session.run_sync(add_orphan)
        db.on_commit(ran.append, "hook")
        background.add_task(ran.append, "background")
        return session

    Failing = Annotated[AsyncSession, Depends(dependency)]

    @app.get("/json")
    async def plain(session: Failing) -> Any:
        return {"padding": "x" * 2000}

    @app.get("/file")
    async def file_response(session: Failing, background: BackgroundTasks) -> Any:
        return FileResponse(file, background=background)

    @app.get("/stream")
    async def stream(session: Failing, background: BackgroundTasks) -> Any:
        return StreamingResponse(iter([b"x" * 2000] * 3), background=background)

    @app.get("/group")
    async def group(session: Failing, background: BackgroundTasks) -> Any:
        class Grouped(JSONResponse):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(super().__call__(scope, receive, send))

        return Grouped({}, background=background)


class Swallowing:
    """A user's middleware that sends a success response for every exception inside it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception:
            await JSONResponse({"swallowed": True})(scope, receive, send)


PASSING = BaseHTTPMiddleware, {"dispatch": lambda request, call_next: call_next(request)}
MIDDLEWARES: dict[str, list[Any]] = {
    "none": [],
    "BaseHTTPMiddleware": [PASSING],
    "GZip": [(GZipMiddleware, {})],
    "all": [(Swallowing, {}), PASSING, (GZipMiddleware, {}), PASSING],
}
WAYS = ["json", "file", "stream", "group"]


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
@pytest.mark.parametrize("handled", [IntegrityError, SQLAlchemyError])
def test_failed_commit_calls_the_apps_error_handler(
    async_store: Store, middlewares: str, handled: type[Exception]
) -> None:
    """The error handler for a failed commit or a base class responds, with CORS headers; no hook or task runs."""
    site = Site(async_store)
    ran: list[str] = []
    for middleware, options in MIDDLEWARES[middlewares]:
        site.app.add_middleware(middleware, **options)
    site.app.add_middleware(CORSMiddleware, allow_origins=["*"])
    refusing_endpoints(site, ran)

    @site.app.exception_handler(handled)
    async def conflict(request: Any, error: Exception) -> Any:
        return JSONResponse({"rows": await site.db.session.run_sync(count)}, 409)

    with site.running():
        for way in WAYS:
            reply = site.get(f"/{way}", Origin="http://elsewhere")
            assert (way, reply.status, reply.json) == (way, 409, {"rows": 0})
            assert site.headers["access-control-allow-origin"] == "*"
        assert async_store.names() == []
    assert ran == []


@pytest.mark.parametrize("middlewares", ["none", "BaseHTTPMiddleware", "GZip"])
def test_failed_commit_without_a_handler_is_a_500(file_store: Store, middlewares: str) -> None:
    """A failed commit without an error handler is a 500, and the app's handler for `Exception` can query."""
    site = Site(file_store)
    ran: list[str] = []
    for middleware, options in MIDDLEWARES[middlewares]:
        site.app.add_middleware(middleware, **options)
    refusing_endpoints(site, ran)

    @site.app.exception_handler(Exception)
    async def crashed(request: Any, error: Exception) -> Any:
        return JSONResponse({"error": type(error).__name__, "rows": await site.db.session.run_sync(count)}, 500)

    with site.running():
        for way in WAYS:
            reply = site.get(f"/{way}")
            assert (way, reply.status, reply.json) == (way, 500, {"error": "IntegrityError", "rows": 0})
    assert ran == []


# -- 5: handled exceptions -------------------------------------------------------------------------


class Oops(Exception):
    pass


def handling_app(site: Site, app: Any) -> Any:
    """An app whose error handlers respond to each exception with a success."""

    @app.get("/{name}")
    async def endpoint(name: str) -> Any:
        await site.db.session.run_sync(insert(name))
        if name == "redirect":
            raise HTTPException(302, headers={"Location": "/elsewhere"})
        if name == "not-modified":
            raise HTTPException(304)
        raise {"oops": Oops, "value": ValueError, "key": KeyError, "type": TypeError}[name]()

    @app.exception_handler(Oops)
    async def streamed(request: Any, error: Exception) -> Any:
        return StreamingResponse(iter([b"fine"]))

    @app.exception_handler(ValueError)
    def in_a_thread(request: Any, error: Exception) -> Any:
        return JSONResponse({})

    class Callable_:
        async def __call__(self, request: Any, error: Exception) -> Any:
            return JSONResponse({})

    app.add_exception_handler(KeyError, Callable_())

    @app.exception_handler(TypeError)
    async def queried(request: Any, error: Exception) -> Any:
        return JSONResponse(await site.db.session.run_sync(count))

    return app


MOUNTS: dict[str, Callable[[Site], None]] = {
    "the app": lambda site: handling_app(site, site.app),
    "mounted": lambda site: site.app.mount("", handling_app(site, FastAPI())),
    "mounted in a mounted app": lambda site: mount_twice(site),
}


def mount_twice(site: Site) -> None:
    outer = FastAPI()
    outer.add_middleware(PASSING[0], **PASSING[1])
    outer.mount("/in", handling_app(site, FastAPI()))
    site.app.mount("", outer)


@pytest.mark.parametrize("where", MOUNTS)
def test_an_exception_handled_as_a_success_rolls_back(file_store: Store, where: str) -> None:
    """An exception rolls back whatever its error handler returns, also in mounted apps; a redirect commits."""
    site = Site(file_store)
    MOUNTS[where](site)
    check_handled_errors(site, "/in" if " in " in where else "")


def check_handled_errors(site: Site, prefix: str) -> None:
    with site.running():
        for name in ("oops", "value", "key", "type"):
            assert (name, site.get(f"{prefix}/{name}").status) == (name, 200)
        assert site.store.names() == []
        assert site.get(f"{prefix}/redirect").status == 302
        assert site.get(f"{prefix}/not-modified").status == 304
        assert site.store.names() == ["not-modified", "redirect"]


def test_a_redirect_that_a_handler_turns_into_an_error_rolls_back(file_store: Store) -> None:
    """A raised redirect rolls back if the error handler turns it into an error response."""
    site = Site(file_store)

    @site.app.exception_handler(HTTPException)
    async def strict(request: Any, error: Exception) -> Any:
        return JSONResponse({}, 400)

    @site.app.get("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> Any:
        await session.run_sync(insert("lost"))
        raise HTTPException(302)

    with site.running():
        assert site.get().status == 400
        assert file_store.names() == []


# -- 7 and 8: late work ----------------------------------------------------------------------------


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
def test_a_stream_queries_beside_any_middleware(async_store: Store, middlewares: str) -> None:
    """A stream keeps its own transaction while a middleware runs in another task."""
    site = Site(async_store)
    for middleware, options in MIDDLEWARES[middlewares]:
        site.app.add_middleware(middleware, **options)

    @site.app.get("/{case}")
    async def stream(case: str, session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> Any:
        async def body() -> Any:
            for number in range(3):
                await session.run_sync(insert(f"{case} {number}"))
                yield b"x" * 1000
            if case == "cut":
                raise Oops
            if case == "refused":
                await session.run_sync(add_orphan)

        async def failing_at_once() -> Any:
            await session.run_sync(insert("lost"))
            raise Oops
            yield b""

        return StreamingResponse(failing_at_once() if case == "at once" else body())

    with site.running():
        replies = [site.get(f"/{case}") for case in ("kept", "cut", "refused", "at%20once")]
        assert [reply.complete and reply.status == 200 for reply in replies] == [True, False, False, False]
        assert async_store.names() == ["kept 0", "kept 1", "kept 2"]


@pytest.mark.parametrize("case", ["kept", "refused"])
def test_work_of_a_middleware_after_the_response_is_ready(async_store: Store, case: str) -> None:
    """Work of a middleware after call_next() is settled before the first byte, and separately from the app's work."""
    site = Site(async_store)
    held: list[int] = []

    @site.app.middleware("http")
    async def audit(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        await site.db.session.run_sync(insert("audit"))
        await asyncio.sleep(0.05)  # meanwhile, the app sends its body
        await site.db.session.run_sync(insert("audit 2") if case == "kept" else add_orphan)
        return response

    @site.app.get("/json")
    async def plain(session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> Any:
        await session.run_sync(insert("early"))

    @site.app.get("/stream")
    async def stream() -> Any:
        async def body() -> Any:
            yield b"chunk"
            held.append(site.sync_engine.pool.checkedout())

        return StreamingResponse(body())

    with site.running():
        statuses = [site.get("/json").status, 200 if case == "refused" else site.get("/json").status]
        assert async_store.names() == (["audit", "audit 2", "early"] if case == "kept" else ["early"])
        async_store.clear()
        statuses.append(site.get("/stream").status)
    assert statuses[0] == statuses[2] == (200 if case == "kept" else 500)
    assert held == ([0] if case == "kept" else [])


def test_a_body_of_declared_length_ends_after_the_commit(async_store: Store) -> None:
    """The last byte of a body with a Content-Length is not sent before the stream's work is committed."""
    site = Site(async_store)

    @site.app.get("/{case}")
    async def download(case: str, session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> Any:
        async def body() -> Any:
            yield b"chunk"
            yield b"chunk"
            await session.run_sync(insert("audit") if case == "kept" else add_orphan)

        return StreamingResponse(body(), headers={"Content-Length": "10"})

    with site.running():
        kept, refused = site.get("/kept"), site.get("/refused")
        assert (kept.complete, kept.body, refused.complete) == (True, b"chunkchunk", False)
        assert async_store.names() == ["audit"]


@pytest.mark.parametrize("middlewares", ["none", "BaseHTTPMiddleware", "GZip"])
@pytest.mark.parametrize("reads_body", [False, True])
def test_a_disconnect_before_the_last_chunk_rolls_back(async_store: Store, middlewares: str, reads_body: bool) -> None:
    """A stream rolls back if the client disconnects before its end, whatever middleware is around the app."""
    site = Site(async_store)
    gate = Gate()
    for middleware, options in MIDDLEWARES[middlewares]:
        site.app.add_middleware(middleware, **options)

    @site.app.post("/")
    async def stream(request: Request, session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> Any:
        if reads_body:
            await request.body()

        class Deaf(StreamingResponse):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                await self.stream_response(send)

        async def body() -> Any:
            yield b"x" * 100_000
            await session.run_sync(insert("late"))
            await asyncio.to_thread(gate.pass_through)

        return Deaf(body())

    with site.running():
        with site.connect() as connection:
            connection.request("POST", "/", body=b"some body")
            connection.getresponse().read(5)
            assert gate.reached.wait(10)
        site.wait_until_left()
        gate.opened.set()
        site.settle_down()
        assert async_store.names() == []
        assert site.get(method="POST").complete
        assert async_store.names() == ["late"]


def test_the_check_for_a_disconnect_loses_no_message(file_store: Store) -> None:
    """A message that session_plugin receives when it checks for a disconnect is passed on to the app."""
    site = Site(file_store)
    read: list[Any] = []

    @site.app.post("/")
    async def endpoint(request: Request) -> Any:
        class Late(Response):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                await send({"type": "http.response.start", "status": 200})
                await site.db.session.run_sync(insert("late"))
                await send({"type": "http.response.body"})
                read.append(await receive())

        return Late()

    with site.running(), site.connect() as connection:
        connection.request("POST", "/", body=b"the body")
        assert connection.getresponse().read() == b""
        assert wait_for(lambda: read)
    assert read == [{"type": "http.request", "body": b"the body", "more_body": False}]
    assert file_store.names() == ["late"]


def test_background_tasks(async_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Each background task saves its own work; one that fails saves none, and the next ones do not run."""
    site = Site(async_store)

    def in_a_thread(name: str) -> None:
        asyncio.run_coroutine_threadsafe(site.db.session.run_sync(insert(name)), loops[0]).result(5)

    async def on_the_loop(name: str) -> None:
        assert site.sync_engine.pool.checkedout() == 0
        await site.db.session.run_sync(insert(name))
        if name == "2 bad":
            raise Oops("background")

    loops: list[asyncio.AbstractEventLoop] = []

    @site.app.get("/{names}")
    async def endpoint(names: str, background: BackgroundTasks) -> None:
        loops.append(asyncio.get_running_loop())
        for name in names.split(","):
            background.add_task(in_a_thread if name.startswith("3") else on_the_loop, name)

    with site.running():
        assert site.get("/1%20a,2%20b,3%20c").status == 200
        assert wait_for(lambda: async_store.names() == ["1 a", "2 b", "3 c"])
        site.settle_down()  # the connection may not be released yet when the rows are visible
        assert site.get("/1%20good,2%20bad,3%20never").status == 200
        assert wait_for(lambda: any("background" in str(record.exc_info) for record in caplog.records))
        site.settle_down()
        assert async_store.names() == ["1 a", "1 good", "2 b", "3 c"]


def test_work_that_outlives_its_request(async_store: Store) -> None:
    """A task that outlives its request cannot use the closed session, and session_scope() opens a new one."""
    site = Site(async_store)
    ended = asyncio.Event()
    outcome: list[Any] = []
    tasks = set()

    async def left_behind(session: AsyncSession) -> None:
        await ended.wait()
        for refused in (lambda: site.db.session.run_sync(count), lambda: session.run_sync(count)):
            with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
                await refused()
        async with site.db.session_scope() as fresh:
            await fresh.run_sync(insert("fresh"))
        outcome.append(fresh is not session)

    @site.app.get("/")
    async def endpoint(session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> None:
        await session.run_sync(insert("early"))
        tasks.add(asyncio.create_task(left_behind(session)))

    @site.app.get("/end")
    async def end() -> None:
        ended.set()

    with site.running():
        assert site.get().status == 200
        site.settle_down()
        site.get("/end")
        assert wait_for(lambda: outcome) == [True]
        assert async_store.names() == ["early", "fresh"]


# -- 2: no session, no connection and no transaction unless they are used --------------------------


def test_an_unused_session_checks_out_no_connection(sync_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that does not ask for the session creates none; one that does not use it checks out no connection."""
    site = Site(sync_store, sync=True)
    hops: list[Any] = []
    facts: list[Any] = []
    monkeypatch.setattr("session_plugin.scope.ending.in_thread", lambda *args, **options: hops.append(args))

    @site.app.get("/unasked")
    async def unasked() -> None:
        facts.append(site.db._unit_of_work().has_session)

    @site.app.get("/unused")
    async def unused(session: Annotated[Session, Depends(site.db.get_session)]) -> Any:
        facts.append(site.db._unit_of_work().has_session)
        facts.append(session.in_transaction())
        return StreamingResponse(iter([b"body"]))

    checkouts: list[Any] = []
    with site.running():
        event.listen(site.sync_engine, "checkout", lambda *args: checkouts.append(args))
        assert (site.get("/unasked").status, site.get("/unused").status) == (200, 200)
    assert (facts, hops, checkouts) == ([False, True, False], [], [])


# -- 13: WebSockets and server-sent events ---------------------------------------------------------


def test_websocket(async_store: Store) -> None:
    """The session of a handshake ends with the handshake; each message has its own scope, and no connection is held."""
    site = Site(async_store)
    held: list[int] = []

    @site.app.websocket("/{how}")
    async def chat(how: str, socket: WebSocket, session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> None:
        await session.run_sync(add_orphan if how == "refused" else insert(how))
        if how == "denied":
            await socket.close()
            return
        if how == "left":
            raise Oops
        await socket.accept()
        held.append(site.sync_engine.pool.checkedout())
        for late in (lambda: session.run_sync(count), lambda: site.db.session.run_sync(count)):
            with pytest.raises(ScopeClosedError, match=r"handshake.*session_scope\(\)"):
                await late()
        async for message in socket.iter_text():
            async with site.db.session_scope() as session:
                await session.run_sync(insert(message))
            held.append(site.sync_engine.pool.checkedout())
            await socket.send_text("saved")

    with site.running():
        url = f"ws://127.0.0.1:{site.port}"
        for how in ("refused", "denied", "left"):
            with pytest.raises(InvalidStatus):
                connect(f"{url}/{how}", proxy=None)
        assert async_store.names() == []
        with connect(f"{url}/accepted", proxy=None) as client:
            for message in ("one", "two"):
                client.send(message)
                assert client.recv(5) == "saved"
            assert async_store.names() == ["accepted", "one", "two"]
    assert held == [0, 0, 0]


def test_websocket_handler_can_query(async_store: Store) -> None:
    """After a failed flush in a handshake, the error handler can query, and its response is sent."""
    site = Site(async_store)

    @site.app.websocket("/")
    async def chat(socket: WebSocket) -> None:
        await site.db.session.run_sync(insert("twice"))
        await site.db.session.execute(text("INSERT INTO parent (name) VALUES ('twice')"))

    @site.app.exception_handler(IntegrityError)
    async def conflict(socket: WebSocket, error: Exception) -> None:
        rows = await site.db.session.run_sync(count)
        await socket.send_denial_response(JSONResponse(rows, 409))

    with site.running(), pytest.raises(InvalidStatus) as refusal:
        connect(f"ws://127.0.0.1:{site.port}/", proxy=None)
    assert (refusal.value.response.status_code, refusal.value.response.body) == (409, b"0")
    assert async_store.names() == []


@pytest.mark.parametrize("first_asked", ["dependency", "endpoint"])
def test_an_async_session_first_asked_for_in_a_thread(first_asked: str) -> None:
    """FastAPI runs sync dependencies and endpoints in threads, which have the event loop of the request."""
    db = AsyncSessionPlugin("sqlite+aiosqlite://")
    app = FastAPI()
    db.init_app(app)

    def repository() -> AsyncSession:
        return db.session

    if first_asked == "dependency":

        @app.get("/")
        async def query(session: Annotated[AsyncSession, Depends(repository)]) -> int:
            return await session.scalar(text("SELECT 1")) or 0
    else:

        @app.get("/")
        def query() -> int:
            return int(db.session.sync_session.is_active)

    async def scenario() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            response = await client.get("/")
        await db.dispose()
        return response.json()

    assert asyncio.run(scenario()) == 1


def test_an_async_session_in_a_thread_without_a_loop_raises() -> None:
    """A thread of one's own has no event loop; the error says so, instead of Python's `no running event loop`."""
    db = AsyncDatabase("sqlite+aiosqlite://")

    async def scenario() -> None:
        async with db.session_scope():
            context = contextvars.copy_context()
        unit = open_unit_of_work(core_of(db), origin="test")
        with pytest.raises(ConfigurationError, match="no asyncio event loop runs"):
            await asyncio.to_thread(lambda: context.run(lambda: unit.session))
        await db.dispose()

    asyncio.run(scenario())


def test_an_async_session_without_anyio_and_without_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the same where anyio is not in use."""
    monkeypatch.delitem(sys.modules, "anyio", raising=False)
    unit = open_unit_of_work(core_of(AsyncDatabase("sqlite+aiosqlite://")), origin="test")
    with pytest.raises(ConfigurationError, match="no asyncio event loop runs"):
        _ = unit.session
