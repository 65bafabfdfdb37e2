"""A session_scope() that joined a unit of work, in a task or a thread that runs beside it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from contextvars import copy_context
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from session_plugin import AsyncDatabase, Database, ScopeClosedError, TransactionAbortedError
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.fastapi import AsyncSessionPlugin, SessionPlugin
from session_plugin.scope.joined import _around
from session_plugin.wsgi import SessionScopeMiddleware as WSGIMiddleware

from .asgi_site import stores
from .harness import Parent, Store
from .proxy import Proxy

async_store = stores(["sqlite+aiosqlite", "postgresql+asyncpg"])
sync_store = stores(["sqlite+pysqlite", "postgresql+psycopg"])


class Beside:
    """A task that joins the unit of work in which it is started, and goes on when it is let."""

    def __init__(self, db: Any, *, flush: bool = True) -> None:
        self.db = db
        self.flush = flush
        self.joined = asyncio.Event()
        self.go_on = asyncio.Event()

    async def start(self) -> None:
        self.task = asyncio.create_task(self._work())
        await asyncio.wait_for(self.joined.wait(), 10)

    async def _work(self) -> str:
        async with self.db.session_scope() as session:
            session.add(Parent(name="beside"))
            if self.flush:
                await session.flush()
            self.joined.set()
            await asyncio.wait_for(self.go_on.wait(), 10)
        return "no error"

    async def result(self) -> str:
        self.go_on.set()
        return await self.task


async def respond(db: Any, beside: Beside, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await beside.start()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(SessionScopeMiddleware(app, db))
    async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
        assert (await client.get("/")).status_code == status


@pytest.mark.parametrize("flush", [True, False])
def test_a_task_whose_request_rolls_back_is_refused(async_store: Store, flush: bool) -> None:
    """A queue must not acknowledge a message whose work is gone."""
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        beside = Beside(db, flush=flush)
        await respond(db, beside, 409)
        with pytest.raises(TransactionAbortedError, match=r"status 409.*session_scope\(new=True\)"):
            await beside.result()
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == []


def test_a_task_whose_work_may_be_saved_receives_no_denial(postgresql: Any) -> None:
    """If the outcome of the COMMIT is unknown, the error does not say that the work is gone."""
    store = Store("postgresql+asyncpg", postgresql)
    store.clear()
    proxy = Proxy(store.url)

    async def main() -> None:
        db = AsyncDatabase(proxy.url)
        beside = Beside(db)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await beside.start()
            proxy.lose_answer_to(b"COMMIT")
            await send({"type": "http.response.start", "status": 201, "headers": []})

        transport = httpx.ASGITransport(SessionScopeMiddleware(app, db))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            with pytest.raises(DBAPIError):
                await client.get("/")
        with pytest.raises(TransactionAbortedError, match="may or may not be saved"):
            await beside.result()
        await db.dispose()

    asyncio.run(main())
    assert store.names() == ["beside"]
    proxy.close()
    store.engine.dispose()


def test_a_task_whose_work_the_request_has_committed_is_not_refused(async_store: Store) -> None:
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        beside = Beside(db)
        await respond(db, beside, 201)
        assert await beside.result() == "no error"
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == ["beside"]


@pytest.mark.parametrize("end", ["error", "doom", "refused"])
def test_a_task_whose_block_rolls_back_is_refused(async_store: Store, end: str) -> None:
    """By an error, by doom(), or because COMMIT was refused."""
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        beside = Beside(db)

        async def work() -> None:
            async with db.session_scope():
                await beside.start()
                if end == "error":
                    raise ValueError
                if end == "doom":
                    db.doom("dry run")

        with pytest.raises((ValueError, Exception)):
            await work()
        with pytest.raises(TransactionAbortedError, match="rolled back before the block ended"):
            await beside.result()
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == []


@pytest.mark.parametrize("flush", [True, False])
def test_a_task_whose_work_an_explicit_rollback_discards_is_refused(async_store: Store, flush: bool) -> None:
    """The code around it called `rollback()` and went on; a block that is around that call is left as ever."""

    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        beside = Beside(db, flush=flush)
        with pytest.raises(TransactionAbortedError, match="its transaction was rolled back"):
            async with db.session_scope() as session:
                await beside.start()
                async with db.session_scope():
                    await session.rollback()
                await beside.result()
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == []


def test_a_task_whose_work_close_discards_is_refused(async_store: Store) -> None:
    """Whatever ends the transaction without a COMMIT."""
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        beside = Beside(db)
        with pytest.raises(TransactionAbortedError, match="its transaction was rolled back"):
            async with db.session_scope() as session:
                await beside.start()
                await session.close()
                await beside.result()
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == []


def test_late_work_of_a_task_is_refused_and_not_saved(async_store: Store) -> None:
    """What it does once the request is settled belongs to nothing that would save it."""
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        settled, go_on = asyncio.Event(), asyncio.Event()

        async def late() -> None:
            async with db.session_scope() as session:
                started.set()
                await asyncio.wait_for(settled.wait(), 10)
                session.add(Parent(name="late"))
                await session.flush()

        started = asyncio.Event()
        tasks: list[asyncio.Task[None]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.create_task(late()))
            await asyncio.wait_for(started.wait(), 10)
            await send({"type": "http.response.start", "status": 201, "headers": []})
            settled.set()
            await asyncio.wait(tasks, timeout=10)
            await send({"type": "http.response.body", "body": b""})
            go_on.set()

        transport = httpx.ASGITransport(SessionScopeMiddleware(app, db))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            assert (await client.get("/")).status_code == 201
        with pytest.raises(ScopeClosedError, match="was settled before the block ended"):
            await tasks[0]
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == []


def test_a_thread_whose_request_rolls_back_is_refused(sync_store: Store) -> None:
    """In WSGI too, for a thread that was given the context."""
    sync_store.clear()
    db = Database(sync_store.url)
    joined, go_on = threading.Event(), threading.Event()
    raised: list[Any] = []

    def beside() -> None:
        try:
            with db.session_scope() as session:
                session.add(Parent(name="beside"))
                session.flush()
                joined.set()
                go_on.wait(10)
        except TransactionAbortedError as error:
            raised.append(error)

    def app(environ: Any, start_response: Any) -> Any:
        thread = threading.Thread(target=copy_context().run, args=(beside,))
        threads.append(thread)
        thread.start()
        joined.wait(10)
        start_response("409 Conflict", [])
        return [b""]

    threads: list[threading.Thread] = []
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/"}
    WSGIMiddleware(app, db)(environ, lambda *started: None)
    go_on.set()
    threads[0].join(10)
    assert len(raised) == 1
    assert sync_store.names() == []
    db.dispose()


def test_a_block_that_no_running_task_is_inside_hinders_no_commit(async_store: Store) -> None:
    """One that the same task, or one that has ended, has left open; and one that a task has left before it goes on."""
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        left, go_on = asyncio.Event(), asyncio.Event()

        async def leave() -> None:
            async with db.session_scope():
                pass
            left.set()
            await asyncio.wait_for(go_on.wait(), 10)

        async def enter() -> Any:
            block = db.session_scope()
            await block.__aenter__()
            return block

        async with db.session_scope() as session:
            session.add(Parent(name="saved"))
            blocks = [await enter(), await asyncio.create_task(enter())]
            task = asyncio.create_task(leave())
            await asyncio.wait_for(left.wait(), 10)
        go_on.set()
        await task
        for block in blocks:
            await block.__aexit__(None, None, None)
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == ["saved"]


def test_blocks_that_are_left_in_the_order_in_which_they_were_entered(async_store: Store) -> None:
    """The second one is still refused if its unit of work rolls back, and afterwards nothing keeps either of them."""
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url)
        joined, go_on = asyncio.Event(), asyncio.Event()

        async def beside() -> None:
            async with AsyncExitStack() as second:
                async with AsyncExitStack() as first:
                    await first.enter_async_context(db.session_scope())
                    await second.enter_async_context(db.session_scope())
                db.session.add(Parent(name="beside"))
                joined.set()
                await asyncio.wait_for(go_on.wait(), 10)

        async with db.session_scope() as session:
            async with db.session_scope():
                pass
            assert not [*_around()]
            task = asyncio.create_task(beside())
            await asyncio.wait_for(joined.wait(), 10)
            await session.rollback()
            go_on.set()
            with pytest.raises(TransactionAbortedError, match="its transaction was rolled back"):
                await task
            db.doom("over")
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == []


def test_a_thread_with_the_context_of_a_block_joins_it() -> None:
    """In sync code too, only that of a hook is for its own thread."""
    db = Database("sqlite://")
    joined: list[bool] = []

    def beside() -> None:
        with db.session_scope() as session:
            joined.append(session is outer)

    with db.session_scope() as outer:
        thread = threading.Thread(target=copy_context().run, args=(beside,))
        thread.start()
        thread.join(10)
    assert joined == [True]
    db.dispose()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_async", [True, False])
def test_a_block_around_the_response_is_left_as_ever(sync_store: Store, is_async: bool, stream: bool) -> None:
    """A dependency and a middleware that joined a request: the client of a 409 has been told by the response."""
    sync_store.clear()
    url = (
        sync_store.url.replace("pysqlite", "aiosqlite").replace("+psycopg", "+asyncpg") if is_async else sync_store.url
    )
    plugin = AsyncSessionPlugin if is_async else SessionPlugin
    db: Any = plugin(url)
    app = FastAPI()
    db.init_app(app)
    left: list[str] = []

    async def adependency() -> AsyncIterator[Any]:
        async with db.session_scope() as session:
            yield session
        left.append("dependency")

    def dependency() -> Iterator[Any]:
        with db.session_scope() as session:
            yield session
        left.append("dependency")

    class Around:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if is_async:
                async with db.session_scope():
                    await self.app(scope, receive, send)
            else:
                with db.session_scope():
                    await self.app(scope, receive, send)
            left.append("middleware")

    app.add_middleware(Around)

    def respond() -> Response:
        return StreamingResponse(iter([b"no"]), 409) if stream else Response(status_code=409)

    if is_async:

        @app.get("/")
        async def endpoint(session: Annotated[Any, Depends(adependency)]) -> Any:
            session.add(Parent(name="lost"))
            await session.flush()
            return respond()
    else:

        @app.get("/")
        def endpoint_in_a_thread(session: Annotated[Any, Depends(dependency)]) -> Any:
            session.add(Parent(name="lost"))
            session.flush()
            return respond()

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            assert (await client.get("/")).status_code == 409
        if is_async:
            await db.dispose()

    asyncio.run(main())
    assert sorted(left) == ["dependency", "middleware"]
    assert sync_store.names() == []
    if not is_async:
        db.dispose()


def test_nothing_joins_the_unit_of_work_of_a_hook(async_store: Store) -> None:
    """A task that a hook starts, as an in-process queue does, saves in one of its own; the hook's own code joins."""
    async_store.clear()

    async def main() -> None:
        db = AsyncDatabase(async_store.url, pool_size=3)
        beside = Beside(db)
        joined: list[bool] = []

        async def hook() -> None:
            hooks = db.session
            async with db.session_scope() as session:
                joined.append(session is hooks)
            await beside.start()
            joined.append(db.session is hooks)

        async with db.session_scope() as session:
            await session.execute(text("SELECT 1"))
            db.on_commit(hook)
        assert joined == [True, True]
        assert await beside.result() == "no error"
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == ["beside"]


def test_no_thread_joins_the_unit_of_work_of_a_sync_hook(sync_store: Store) -> None:
    sync_store.clear()
    db = Database(sync_store.url)
    joined: list[bool] = []

    def hook() -> None:
        hooks = db.session

        def beside() -> None:
            with db.session_scope() as session:
                joined.append(session is hooks)

        with db.session_scope() as session:
            joined.append(session is hooks)
        thread = threading.Thread(target=copy_context().run, args=(beside,))
        thread.start()
        thread.join(10)

    with db.session_scope():
        db.on_commit(hook)
    assert joined == [True, False]
    db.dispose()
