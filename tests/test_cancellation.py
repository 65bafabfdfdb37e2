"""A request that is cancelled at any await, or whose client disconnects after any byte, does all of its work or none.

`Stepped` finds the awaits: it drives a coroutine by hand and interrupts it at its n-th suspension, for every n
until the coroutine ends without an interruption.
"""

import asyncio
import gc
import socket
import struct
import warnings
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import anyio
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Request
from flask import Flask, Response, request, stream_with_context
from sqlalchemy import select
from starlette.responses import JSONResponse, StreamingResponse

from session_plugin import AsyncDatabase
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.database.interface import core_of
from session_plugin.flask import SessionPlugin as FlaskPlugin
from session_plugin.scope.current import find
from session_plugin.starlette import AsyncSessionPlugin, SessionPlugin

from .asgi_site import ASYNC_DRIVERS, Site, stores
from .harness import POOL, Store, insert, wait_for
from .wsgi_site import Site as WSGISite

store = stores(ASYNC_DRIVERS)
file_store = stores(["sqlite+pysqlite"])

HTTP = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b"", "http_version": "1.1"}
START = {"type": "http.response.start", "status": 200, "headers": []}
PART = {"type": "http.response.body", "body": b"part", "more_body": True}
LAST = {"type": "http.response.body", "body": b""}


class Stepped:
    """Awaits ``work``, and calls ``call`` at its suspension number ``at``.

    The call happens while the coroutine waits or, with ``on_arrival``, when the awaited result has just arrived, so
    that the interruption takes the place of the result.
    """

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, call: Callable[[], Any], *, on_arrival: bool) -> None:
        self.work, self.at, self.call, self.on_arrival = work, at, call, on_arrival
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[[], Any] = lambda: self.work.send(None)  # noqa: E731
        while True:
            try:
                waited_for = step()
            except StopIteration as end:
                return end.value
            if self.suspensions == self.at:
                self._interrupt(waited_for)
            self.suspensions += 1
            try:
                result = yield waited_for
            except BaseException as error:
                step = lambda error=error: self.work.throw(error)  # type: ignore[misc] # noqa: E731
            else:
                step = lambda result=result: self.work.send(result)  # type: ignore[misc] # noqa: E731

    def _interrupt(self, waited_for: Any) -> None:
        if self.on_arrival and waited_for is not None:
            waited_for.add_done_callback(lambda _: self.call())
        else:
            asyncio.get_running_loop().call_soon(self.call)

    @property
    def ended_undisturbed(self) -> bool:
        return self.suspensions <= self.at


def native(task: asyncio.Task[Any], scope: anyio.CancelScope) -> None:
    task.cancel()


def by_anyio(task: asyncio.Task[Any], scope: anyio.CancelScope) -> None:
    scope.cancel()


def twice(task: asyncio.Task[Any], scope: anyio.CancelScope) -> None:
    scope.cancel()
    task.cancel()


def everything(task: asyncio.Task[Any], scope: anyio.CancelScope) -> None:
    """Cancel all tasks, including the one that sends COMMIT, as an event loop does when it ends."""
    for other in asyncio.all_tasks() - testers:
        other.cancel()


testers: set[asyncio.Task[Any]] = set()


class Case:
    """A request that writes at every stage, and the conditions that must hold at any time."""

    def __init__(self, store: Store, make: Callable[["Case"], None]) -> None:
        self.store = store
        self.db: Any = None
        self.app: Any = None
        self.sent: list[str] = []
        self.hooks: list[str] = []
        self.wrong: list[str] = []
        make(self)

    @property
    def pool(self) -> Any:
        return getattr(self.db.engine, "sync_engine", self.db.engine).pool

    async def receive(self) -> Any:
        return await asyncio.get_running_loop().create_future()

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)
        kind = "start" if message["type"].endswith("start") else "part" if message.get("more_body") else "last"
        self.sent.append(kind)
        must = {"a", "b", "late"} if kind == "last" and self.streams else {"a", "b"}
        if not must <= set(self.store.names()):
            self.wrong.append(f"{kind} was sent while {self.store.names()} was durable")

    streams = True

    async def serve(self) -> None:
        await self.app(dict(HTTP), self.receive, self.send)

    async def connect(self) -> None:
        """Open a pooled connection, because the driver's connecting is not part of a request."""
        block = self.db.database.session_scope()
        if core_of(self.db).is_async:
            async with block as session:
                await session.execute(select(1))
        else:
            with block as session:
                session.execute(select(1))

    def check(self, when: str) -> None:
        """Check that the work is complete or absent, and that no connection and no transaction is left open."""
        assert wait_for(lambda: self.pool.checkedout() == 0 and not self.store.open_transactions()), when
        names = self.store.names()
        assert names in WHOLE, f"{when}: {names}"
        assert self.wrong == [], when
        assert find(core_of(self.db)) is None

    def check_hooks(self, when: str) -> None:
        names = self.store.names()
        assert self.hooks.count("commit") == ("a" in names), f"{when}: {names} and {self.hooks}"


WHOLE = ([], ["a", "b"], ["a", "b", "late"], ["a", "b", "background"], ["a", "b", "background", "late"])


def work(case: Case) -> Callable[[Any], None]:
    def do(session: Any) -> None:
        insert("a")(session)
        case.db.on_commit(case.hooks.append, "commit")
        insert("b")(session)

    return do


def plain_app(case: Case) -> None:
    """A plain app inside two layers of the middleware."""
    case.db = AsyncDatabase(case.store.url, **POOL)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = case.db.session
        await session.run_sync(work(case))
        await send(START)
        await send(PART)
        await session.run_sync(insert("late"))
        await send(LAST)
        await session.run_sync(insert("background"))

    case.app = SessionScopeMiddleware(SessionScopeMiddleware(app, case.db), case.db)


def fastapi_app(case: Case) -> None:
    """A FastAPI app with a dependency, a streamed response and a background task."""
    case.db = AsyncSessionPlugin(case.store.url, **POOL)
    case.app = app = FastAPI()

    @app.post("/")
    async def endpoint(background: BackgroundTasks, session: Annotated[Any, Depends(case.db.get_session)]) -> Any:
        await session.run_sync(work(case))
        background.add_task(session.run_sync, insert("background"))
        return StreamingResponse(body(session), background=background)

    async def body(session: Any) -> Any:
        yield b"part"
        await session.run_sync(insert("late"))

    case.db.init_app(app)


def sync_fastapi_app(case: Case) -> None:
    """A FastAPI app with a sync session, which uses permits and ends in a worker thread."""
    case.streams = False
    url = case.store.url.replace("aiosqlite", "pysqlite").replace("asyncpg", "psycopg")
    case.db = SessionPlugin(url, **POOL)
    case.app = app = FastAPI()

    @app.post("/")
    async def endpoint(background: BackgroundTasks, session: Annotated[Any, Depends(case.db.get_session)]) -> Any:
        insert("a")(session)
        case.db.on_commit(case.hooks.append, "commit")
        await asyncio.sleep(0)
        insert("b")(session)
        background.add_task(insert("background"), session)
        return JSONResponse({}, background=background)

    case.db.init_app(app)


def job(case: Case) -> None:
    """Two nested session_scope() blocks without an app."""
    case.db = AsyncDatabase(case.store.url, **POOL)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with case.db.session_scope() as session:
            await session.run_sync(work(case))
            async with case.db.session_scope():
                await asyncio.sleep(0)
        await send(START)

    case.app = app


CLOSED_BY_SQLALCHEMY = "AsyncAdapt_aiosqlite_connection._terminate_graceful_close"
"""If cancelled again, SQLAlchemy drops the task that closes an aiosqlite connection and stops its thread."""


def cases() -> Iterator[Any]:
    makers = {
        "sqlite+aiosqlite": [plain_app],
        "postgresql+psycopg": [plain_app, sync_fastapi_app],
        "postgresql+asyncpg": [plain_app, fastapi_app, job],
    }
    for driver, made in makers.items():
        for make in made:
            for cancel in [native, by_anyio, twice, everything]:
                yield pytest.param(driver, make, cancel, id=f"{driver}-{make.__name__}-{cancel.__name__}")


@contextmanager
def nothing_in_the_garbage() -> Iterator[None]:
    """Check that the objects in the block are garbage-collected without a warning."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize(("store", "make", "cancel"), [*cases()], indirect=["store"])
def test_cancelled_at_every_await(store: Store, make: Callable[[Case], None], cancel: Callable[..., None]) -> None:
    """A request that is cancelled at any await does all of its work or none, and leaves nothing open."""
    case = Case(store, make)
    seen: set[tuple[str, ...]] = set()
    complaints: list[Any] = []

    async def cancelled_at(at: int, on_arrival: bool) -> bool:
        await case.connect()
        store.clear()
        case.sent.clear()
        case.hooks.clear()

        async def served() -> None:
            with scope:
                await stepped

        scope = anyio.CancelScope()
        stepped = Stepped(case.serve(), at, lambda: cancel(task, scope), on_arrival=on_arrival)
        task = asyncio.create_task(served())
        await asyncio.wait([task], timeout=20)
        assert task.done()
        when = f"{cancel.__name__} at await {at}, {on_arrival=}"
        if not task.cancelled() and task.exception() is not None:
            raise AssertionError(when) from task.exception()
        case.check(when)
        if cancel is not everything:
            case.check_hooks(when)
        seen.add(tuple(store.names()))
        return stepped.ended_undisturbed

    async def scenario() -> None:
        testers.update(asyncio.all_tasks())
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        for on_arrival in (False, True):
            at = 0
            while not await cancelled_at(at, on_arrival):
                at += 1
        disposed = case.db.dispose()
        if disposed is not None:
            await disposed

    with nothing_in_the_garbage():
        asyncio.run(asyncio.wait_for(scenario(), 60))
    assert [complaint for complaint in complaints if CLOSED_BY_SQLALCHEMY not in repr(complaint)] == []
    assert () in seen and len(seen) > 1


# -- a client that leaves --------------------------------------------------------------------------


def asgi_site(store: Store) -> Any:
    """An app whose endpoint and body run in threads, because waiting for SQLite's lock would block the event loop."""
    site = Site(store, sync=True)

    async def read(request: Request) -> None:
        await request.body()

    @site.app.post("/{name}", dependencies=[Depends(read)])
    def endpoint(name: str, session: Annotated[Any, Depends(site.db.get_session)]) -> Any:
        insert(f"{name} early")(session)
        return StreamingResponse(body(name, session))

    def body(name: str, session: Any) -> Any:
        yield b"part"
        insert(f"{name} late")(session)
        yield b"part"

    return site.running()


def wsgi_site(store: Store) -> Any:
    app = Flask(__name__)
    db = FlaskPlugin(store.url, **POOL)
    db.init_app(app)
    store.clear()

    @app.post("/<name>")
    def endpoint(name: str) -> Any:
        request.get_data()
        insert(f"{name} early")(db.session)
        return Response(stream_with_context(body(name)))

    def body(name: str) -> Any:
        yield b"part"
        insert(f"{name} late")(db.session)
        yield b"part"

    site = WSGISite(store, app, db)
    site.start()
    return site.checked()


def leave(port: int, name: str, sends: int, reads: int, *, reset: bool) -> tuple[int, bytes]:
    """Send and read so many bytes, then disconnect; return the number of unsent bytes, and what was read."""
    message = f"POST /{name} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(message[:sends])
        read = b""
        while len(read) < reads and (chunk := client.recv(reads - len(read))):
            read += chunk
    return len(message) - sends, read


@pytest.mark.parametrize("serve", [asgi_site, wsgi_site])
def test_a_disconnect_after_any_byte(file_store: Store, serve: Callable[[Store], Any]) -> None:
    """A client that disconnects after any byte of the request or the response leaves no work half-done."""
    responses: dict[str, bytes] = {}
    with serve(file_store) as site:
        sends, missing = 0, 1
        while missing:
            missing, responses[f"sent-{sends}"] = leave(site.port, f"sent-{sends}", sends, 0, reset=sends % 2 == 0)
            sends += 1
        reads, complete = 0, False
        while not complete:
            name = f"read-{reads}"
            _, responses[name] = leave(site.port, name, 1000, reads, reset=reads % 2 == 0)
            complete = len(responses[name]) < reads
            reads += 1
    names = file_store.names()
    for name, read in responses.items():
        durable = [kept.rpartition(" ")[2] for kept in names if kept.startswith(f"{name} ")]
        assert durable in ([], ["early"], ["early", "late"]), name
        assert not read.startswith(b"HTTP/1.1 200") or durable, name
    assert durable == ["early", "late"]
