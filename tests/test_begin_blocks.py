"""Blocks of ``session.begin()`` and ``begin_nested()`` that are held around a request, as many apps do."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from contextvars import copy_context
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from flask import Flask, g, stream_with_context
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from session_plugin import AsyncDatabase, Outcome, TransactionAbortedError
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.fastapi import AsyncSessionPlugin, SessionPlugin
from session_plugin.flask import SessionPlugin as FlaskSessionPlugin
from session_plugin.scope.begin_blocks import leave_blocks

from .asgi_site import stores
from .drivers import ASYNC
from .harness import Parent, Store, add, count, insert
from .units import Units, on
from .wsgi_site import Server

store = stores(["sqlite+pysqlite", "postgresql+psycopg", "sqlite+aiosqlite", "postgresql+asyncpg"])
sync_store = stores(["sqlite+pysqlite", "postgresql+psycopg"])
async_store = stores(["sqlite+aiosqlite", "postgresql+asyncpg"])
HOW = pytest.mark.parametrize("how", ["begin", "begin_nested", "both"])


class Shop:
    """A FastAPI app with a dependency that holds the blocks around an endpoint, and does ``after`` inside them."""

    def __init__(self, store: Store, how: str = "begin", after: Callable[[Any], Any] = lambda session: None) -> None:
        store.clear()
        self.is_async = store.driver in ASYNC
        self.db: Any = (AsyncSessionPlugin if self.is_async else SessionPlugin)(store.url)
        self.app = FastAPI()
        self.db.init_app(self.app)
        self.left = 0

        async def aheld(session: Annotated[Any, Depends(self.db.get_session)]) -> AsyncIterator[Any]:
            outer, inner = blocks(session, how)
            async with outer:
                if inner is None:
                    yield session
                else:
                    async with inner():
                        yield session
                after(session)
            self.left += 1

        def held(session: Annotated[Any, Depends(self.db.get_session)]) -> Iterator[Any]:
            outer, inner = blocks(session, how)
            with outer:
                if inner is None:
                    yield session
                else:
                    with inner():
                        yield session
                after(session)
            self.left += 1

        self.held: Any = aheld if self.is_async else held

    async def run(self, work: Any) -> Any:
        return await self.db.session.run_sync(work) if self.is_async else work(self.db.session)

    def get(self) -> httpx.Response:
        """Send one request; the dependency must have left its blocks."""

        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                response = await client.get("/")
            assert self.db.engine.pool.checkedout() == 0
            if self.is_async:
                await self.db.dispose()
            return response

        response = asyncio.run(main())
        if not self.is_async:
            self.db.dispose()
        return response


def blocks(session: Any, how: str) -> tuple[Any, Any]:
    return (session.begin(), session.begin_nested) if how == "both" else (getattr(session, how)(), None)


@HOW
@pytest.mark.parametrize("status", [200, 409])
def test_late_work_while_a_dependency_holds_a_block(store: Store, status: int, how: str) -> None:
    """A streamed body and a background task use the session after the response has ended the block's transaction."""
    shop = Shop(store, how)
    writes = status == 200 or shop.is_async
    seen: list[int] = []

    @shop.app.get("/")
    async def endpoint(session: Annotated[Any, Depends(shop.held)], tasks: BackgroundTasks) -> Any:
        await shop.run(insert("request"))

        async def stream() -> AsyncIterator[str]:
            yield str(await shop.run(count))
            if writes:
                await shop.run(insert("stream"))

        async def task() -> None:
            seen.append(await shop.run(count))
            if writes:
                await shop.run(add("task"))

        tasks.add_task(task)
        return StreamingResponse(stream(), status)

    response = shop.get()
    kept = ["request"] if status == 200 else []
    streamed = ["stream"] if status == 200 else []  # the stream of an error response is rolled back too
    assert (response.status_code, response.text, shop.left) == (status, str(len(kept)), 1)
    assert seen == [len(kept) + len(streamed)]
    assert store.names() == [*kept, *streamed, *(["task"] if writes else [])]


def test_late_writes_after_a_block_that_was_rolled_back(sync_store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """A thread may be in the middle of such a block, so its second half is not saved, and the log says what to do."""
    shop = Shop(sync_store)
    raised: list[Exception] = []

    @shop.app.get("/")
    def endpoint(session: Annotated[Any, Depends(shop.held)], tasks: BackgroundTasks) -> Any:
        insert("request")(session)

        def explicit() -> None:
            add("explicit")(session)
            try:
                session.commit()
            except TransactionAbortedError as error:
                raised.append(error)
                session.rollback()

        tasks.add_task(explicit)
        tasks.add_task(insert("late"), session)
        return JSONResponse({}, 409, background=tasks)

    assert (shop.get().status_code, shop.left, sync_store.names()) == (409, 1, [])
    assert "remove session.begin()" in str(raised)
    [error] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "its work is discarded (doomed: a session.begin() block" in error
    assert "remove session.begin()" in error


@HOW
def test_an_error_response_that_only_read(store: Store, how: str) -> None:
    """The ROLLBACK behind it keeps the rows that were loaded, whatever blocks are held."""
    shop = Shop(store, how)
    with store.sessions.begin() as session:
        session.add(Parent(name="loaded"))

    @shop.app.get("/")
    async def endpoint(session: Annotated[Any, Depends(shop.held)]) -> Any:
        parent = await shop.run(lambda session: session.get(Parent, "loaded"))

        async def stream() -> AsyncIterator[str]:
            yield parent.name

        return StreamingResponse(stream(), 404)

    response = shop.get()
    assert (response.status_code, response.text, shop.left) == (404, "loaded", 1)


@pytest.mark.parametrize("how", ["begin", "begin_nested"])
def test_work_at_the_end_of_a_block_is_saved(store: Store, how: str) -> None:
    """What the dependency does before it leaves its block is committed at the end of the request."""
    shop = Shop(store, how, lambda session: session.add(Parent(name="audit")))

    @shop.app.get("/")
    async def endpoint(session: Annotated[Any, Depends(shop.held)]) -> None:
        session.add(Parent(name="request"))

    assert (shop.get().status_code, shop.left, store.names()) == (200, 1, ["audit", "request"])


def test_a_failed_commit_while_a_block_is_held(store: Store) -> None:
    """The handler of its error receives it and can query."""
    shop = Shop(store)
    with store.sessions.begin() as session:
        session.add(Parent(name="taken"))

    @shop.app.get("/")
    async def endpoint(session: Annotated[Any, Depends(shop.held)]) -> None:
        session.add(Parent(name="taken"))

    @shop.app.exception_handler(IntegrityError)
    async def handler(request: Any, error: Exception) -> Any:
        return JSONResponse(await shop.run(count), 409)

    response = shop.get()
    assert (response.status_code, response.json(), store.names()) == (409, 1, ["taken"])


def test_an_explicit_commit_while_a_block_is_held(store: Store) -> None:
    """As SQLAlchemy has it, the rest of the endpoint can do nothing more; the response and what follows it can."""
    shop = Shop(store)
    seen: list[Any] = []

    @shop.app.get("/")
    async def endpoint(session: Annotated[Any, Depends(shop.held)], tasks: BackgroundTasks) -> str:
        session.add(Parent(name="request"))
        await shop.run(lambda session: session.commit())
        with pytest.raises(InvalidRequestError, match="context manager"):
            await shop.run(count)

        async def task() -> None:
            seen.append(await shop.run(count))

        tasks.add_task(task)
        shop.db.on_commit(seen.append, "hook")
        return "ok"

    response = shop.get()
    assert (response.status_code, seen, store.names()) == (200, ["hook", 1], ["request"])


@pytest.mark.parametrize("how", ["begin", "begin_nested"])
def test_a_block_around_the_error_handlers(async_store: Store, how: str) -> None:
    """A middleware holds it: a handler can query once the work before the error has been rolled back."""
    shop = Shop(async_store)
    db = shop.db

    class Holding:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async with getattr(db.session, how)():
                await self.app(scope, receive, send)
            shop.left += 1

    shop.app.add_middleware(Holding)

    @shop.app.get("/")
    async def endpoint() -> None:
        await shop.run(insert("request"))
        raise LookupError

    @shop.app.exception_handler(LookupError)
    async def handler(request: Any, error: Exception) -> Any:
        async def stream() -> AsyncIterator[str]:
            yield str(await shop.run(count))

        async def task() -> None:
            await shop.run(insert("task"))

        await shop.run(insert("refused"))
        return StreamingResponse(stream(), 404, background=BackgroundTask(task))

    response = shop.get()
    assert (response.status_code, response.text, shop.left) == (404, "0", 1)
    assert async_store.names() == ["task"]


@HOW
@pytest.mark.parametrize("path", ["/ok", "/refused", "/raised"])
def test_flask_with_a_block_for_each_request(sync_store: Store, path: str, how: str) -> None:
    """It is entered before the view and left when the request is torn down."""
    sync_store.clear()
    app = Flask(__name__)
    db = FlaskSessionPlugin(sync_store.url)
    db.init_app(app)
    left: list[int] = []

    @app.before_request
    def enter() -> None:
        g.blocks = ExitStack()
        outer, inner = blocks(db.session, how)
        g.blocks.enter_context(outer)
        if inner is not None:
            g.blocks.enter_context(inner())

    @app.teardown_request
    def leave(error: BaseException | None) -> None:
        if "blocks" in g:  # stream_with_context() tears the request down twice
            g.pop("blocks").close()
            left.append(count(db.session))

    def stream() -> Iterator[str]:
        yield str(count(db.session))
        insert("stream")(db.session)

    def response(status: int) -> Any:
        late = app.response_class(stream_with_context(stream()), status)
        late.call_on_close(lambda: add("close")(db.session))
        return late

    @app.get("/<how>")
    def view(how: str) -> Any:
        insert("request")(db.session)
        if how == "raised":
            raise LookupError
        return response(200 if how == "ok" else 409)

    @app.errorhandler(LookupError)
    def handler(error: LookupError) -> Any:
        assert count(db.session) == 0
        insert("refused")(db.session)
        return response(404)

    kept = ["request"] if path == "/ok" else []
    server = Server(sync_store).serve(app, "GET", path)
    assert (server.complete, server.error, server.status) == (True, None, {"/ok": 200, "/refused": 409}.get(path, 404))
    assert server.sent[1][0] == str(len(kept)).encode()
    assert len(left) == 1
    assert sync_store.names() == ["close", *kept, *(["stream"] if kept else [])]  # that of an error is rolled back
    assert db.engine.pool.checkedout() == 0
    db.dispose()


@pytest.mark.parametrize("status", [200, 409])
def test_a_task_in_the_middle_of_a_block(async_store: Store, status: int) -> None:
    """The response ends its transaction: nothing of the rest is saved if the first half was rolled back."""
    async_store.clear()
    db = AsyncDatabase(async_store.url)

    async def main() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def work(session: Any) -> None:
            async with session.begin_nested():
                await session.run_sync(insert("first half"))
                begun.set()
                await go_on.wait()
                await session.run_sync(insert("second half"))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            task = asyncio.create_task(work(db.session))
            await begun.wait()
            await send({"type": "http.response.start", "status": status, "headers": []})
            go_on.set()
            await task
            await send({"type": "http.response.body", "body": b""})

        transport = httpx.ASGITransport(SessionScopeMiddleware(app, db))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            assert (await client.get("/")).status_code == status
        await db.dispose()

    asyncio.run(main())
    assert async_store.names() == (["first half", "second half"] if status == 200 else [])


@pytest.mark.parametrize("waits", [True, False])
@on("sqlite+pysqlite", "sqlite+aiosqlite")
def test_a_block_that_was_left_leaves_no_trace(units: Units, waits: bool) -> None:
    """Blocks in the work of a thread, all of them left: what follows an explicit rollback() is saved, hooks run."""
    ran: list[str] = []

    def work(session: Session) -> None:
        with session.begin():
            insert("first")(session)
        with session.begin_nested():
            insert("lost")(session)
        session.rollback()
        if waits:
            units.db.on_commit(ran.append, "commit")
            units.db.on_rollback(ran.append, "rollback")

    async def amain() -> None:
        async with units.db.session_scope() as session:
            await asyncio.create_task(session.run_sync(work))  # its context is a copy
            scope = units.db.scope
            await scope.asettle(Outcome())
            await session.run_sync(add("late"))

    def main() -> None:
        with units.db.session_scope() as session:
            copy_context().run(work, session)
            units.db.scope.settle(Outcome())
            add("late")(session)

    if units.is_async:
        units.runner.run(amain())
    else:
        main()
    assert (ran, units.store.names()) == (["commit"] if waits else [], ["first", "late"])


@on("sqlite+pysqlite")
def test_a_transaction_that_goes_on_is_not_left(units: Units) -> None:
    """Only a block whose transaction has ended is left."""
    with units.db.session_scope() as session, session.begin_nested():
        unit = units.db._unit_of_work()
        leave_blocks(unit, lost=True)
        assert unit.last_begun is session.get_nested_transaction()
        insert("kept")(session)
    assert units.store.names() == ["kept"]
