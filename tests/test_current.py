"""Which unit of work is current: the innermost one whose block is really around the running code."""

import asyncio
import ctypes
import gc
import os
import sys
import threading
import unittest
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Annotated, Any
from weakref import ref

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from flask import Flask, Response
from greenlet import greenlet
from sqlalchemy import text
from starlette.requests import HTTPConnection

from session_plugin import AsyncDatabase, Database, NoScopeError, ScopeClosedError
from session_plugin.database.forks import forget_current_units
from session_plugin.database.interface import core_of
from session_plugin.fastapi import AsyncSessionPlugin, SessionPlugin
from session_plugin.flask import SessionPlugin as FlaskPlugin
from session_plugin.scope import current
from session_plugin.scope.current import entered_databases, entered_units
from session_plugin.wsgi import SessionScopeMiddleware as WSGIMiddleware

from .asgi_site import stores
from .harness import Parent, Store

file_store = stores(["sqlite+pysqlite", "postgresql+psycopg"])
async_store = stores(["postgresql+asyncpg"])


@pytest.fixture
def db() -> Iterator[Database[Any]]:
    db = Database("sqlite://")
    yield db
    db.dispose()
    assert not current.held


@pytest.fixture
def adb() -> Iterator[AsyncDatabase[Any]]:
    yield AsyncDatabase("sqlite+aiosqlite://")
    assert not current.held


def has_session(db: Any) -> bool:
    return hasattr(db, "session")


# -- generators ------------------------------------------------------------------------------------


def test_a_generator_does_not_take_over_its_consumer(db: Database[Any]) -> None:
    """Inside it `db.session` is its own; in the loop, kept, closed or abandoned, it is the consumer's."""
    inside: list[bool] = []

    def reader() -> Iterator[int]:
        with db.session_scope(new=True) as own:
            for number in range(2):
                inside.append(db.session is own)
                yield number
            with db.session_scope() as joined:
                inside.append(joined is own)

    with db.session_scope() as outer:
        for _ in reader():
            assert db.session is outer
            with db.session_scope() as joined:
                assert joined is outer
        assert db.session is outer
        kept, abandoned = reader(), reader()
        next(kept)
        next(abandoned)
        assert db.session is outer
        kept.close()
        del abandoned
        assert db.session is outer
        assert len(inside) == 5
        assert all(inside)


def test_without_a_unit_of_work_a_consumer_has_none(db: Database[Any]) -> None:
    """A batch that reads from a generator and saves each row in a block of its own saves each row."""

    def reader() -> Iterator[int]:
        with db.session_scope():
            yield from range(2)

    sessions = []
    for _ in reader():
        assert not has_session(db)
        with db.session_scope() as session:
            sessions.append(session)
            assert db.session is session
    assert len(set(map(id, sessions))) == 2


def test_nested_generators(db: Database[Any]) -> None:
    """Of generators inside one another the nearest on the stack counts, also through `yield from`."""
    seen: list[bool] = []

    def inner() -> Iterator[int]:
        with db.session_scope(new=True) as own:
            yield 1
            seen.append(db.session is own)
            yield 2
            seen.append(db.session is own)

    def delegating() -> Iterator[int]:
        yield from inner()
        seen.append(not has_session(db))

    def outer() -> Iterator[int]:
        with db.session_scope(new=True) as own:
            for number in inner():
                seen.append(db.session is own)
                yield number
                seen.append(db.session is own)

    for _ in outer():
        seen.append(not has_session(db))
    for _ in delegating():
        seen.append(not has_session(db))
    assert len(seen) == 13
    assert all(seen)


def test_the_nearest_block_counts_in_whatever_order_blocks_were_entered(db: Database[Any]) -> None:
    """A generator that goes on inside a later block is further in than that block."""
    other = Database("sqlite://")
    seen: list[bool] = []

    def reader() -> Iterator[None]:
        with db.session_scope(new=True) as own:
            yield
            seen.append(db.session is own)
            with db.session_scope(new=True) as further_in:
                seen.append(db.session is further_in)
                with other.session_scope(new=True):
                    seen.append(db.session is further_in)
            seen.append(db.session is own)
            seen.append(other.session is beside)
            yield

    going_on = reader()
    next(going_on)
    with other.session_scope() as beside, db.session_scope() as later:
        assert db.session is later
        next(going_on)
        assert db.session is later
        going_on.close()
        assert db.session is later
        assert next(entered_databases()) is core_of(db)
    assert len(seen) == 5
    assert all(seen)
    assert list(entered_databases()) == []
    other.dispose()


def test_a_block_in_what_a_generator_calls_is_further_in(db: Database[Any]) -> None:
    """Of the helper's block and the generator's, that of the helper counts while it runs."""
    seen: list[bool] = []

    def helper() -> None:
        with db.session_scope(new=True) as session:
            seen.append(db.session is session)

    def reader() -> Iterator[None]:
        with db.session_scope(new=True) as own:
            helper()
            seen.append(db.session is own)
            yield

    for _ in reader():
        pass
    assert seen == [True, True]


def test_what_the_running_code_is_inside(db: Database[Any]) -> None:
    """The databases, the innermost first; a unit of work beside the innermost one, or closed, is not around."""
    other = Database("sqlite://")
    assert not current.is_session_open()
    with other.session_scope() as _, db.session_scope() as _:
        inner = current.find(core_of(db))
        outer = current.find(core_of(other))
        assert inner is not None and outer is not None
        assert [*dict.fromkeys(entered_databases())] == [core_of(db), core_of(other)]
        assert current.is_session_open()
        assert current.is_inside(inner) and current.is_inside(outer)
    context = copy_context()
    with db.session_scope():
        assert not current.is_inside(inner)
        kept = copy_context()

        def reader() -> Iterator[Any]:
            with other.session_scope(new=True):
                yield next(entered_databases())

        assert [*reader()] == [core_of(other)]
    assert not current.is_session_open()
    with pytest.raises(ScopeClosedError):
        kept.run(lambda: db.session)
    with pytest.raises(NoScopeError):
        context.run(lambda: db.session)
    other.dispose()


def test_a_generator_that_ends_inside_a_later_block_leaves_it_open(db: Database[Any]) -> None:
    """Blocks are left in any order: what is entered stays the current one until it is left itself."""
    with db.session_scope() as outer:
        with ExitStack() as first, ExitStack() as second:
            first.enter_context(db.session_scope(new=True))
            later = second.enter_context(db.session_scope(new=True))
            first.close()
            assert db.session is later
        assert db.session is outer
    assert not has_session(db)


def test_the_generator_finds_its_own_in_any_thread_and_context(db: Database[Any]) -> None:
    """Its steps may run in threads and in copied contexts; a thread of the consumer inherits the consumer's."""

    def reader() -> Iterator[bool]:
        with db.session_scope(new=True) as own:
            yield True
            yield db.session is own

    with db.session_scope() as outer:
        running = reader()
        seen: list[Any] = []
        steps = [lambda: seen.append(next(running)), lambda: seen.append(db.session is outer)]
        for step in [steps[0], steps[1], steps[0]]:
            thread = threading.Thread(target=copy_context().run, args=(step,))
            thread.start()
            thread.join(10)
        assert seen == [True, True, True]
        running.close()


def test_an_async_generator_does_not_take_over_its_consumer(adb: AsyncDatabase[Any]) -> None:
    """Nor the tasks that its consumer starts; inside it, and in SQLAlchemy's greenlet there, its own counts."""

    async def main() -> None:
        inside: list[bool] = []

        async def reader() -> AsyncIterator[int]:
            async with adb.session_scope(new=True) as own:
                for number in range(2):
                    inside.append(adb.session is own)
                    inside.append(await own.run_sync(lambda _: adb.session is own))
                    yield number

        async def handle() -> Any:
            async with adb.session_scope() as session:
                return session

        async with adb.session_scope() as outer:
            tasks = []
            async for _ in reader():
                assert adb.session is outer
                tasks.append(asyncio.create_task(handle()))
            assert await asyncio.gather(*tasks) == [outer, outer]
            kept = reader()
            await anext(kept)
            assert adb.session is outer
            await kept.aclose()  # type: ignore[attr-defined]
            assert adb.session is outer
        async for _ in reader():
            assert not has_session(adb)
        assert len(inside) == 10
        assert all(inside)
        await adb.dispose()

    asyncio.run(main())


def test_an_abandoned_generator_keeps_nothing(db: Database[Any]) -> None:
    """A generator that nobody closes and that is part of a cycle ends with the garbage collector's next pass."""

    def reader() -> Iterator[Any]:
        with db.session_scope(new=True):
            me = yield
            yield me

    abandoned: Any = reader()
    next(abandoned)
    abandoned.send(abandoned)
    assert current.held
    del abandoned
    gc.collect()
    assert not current.held


def test_a_block_that_is_entered_by_hand_and_dropped_ends_at_once(db: Database[Any]) -> None:
    """It is in no cycle, so its connection does not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        block: Any = db.session_scope()
        session = ref(block.__enter__())
        session().execute(text("SELECT 1"))
        del block
        assert session() is None
    finally:
        gc.enable()


def test_a_block_that_a_helper_has_entered(db: Database[Any], adb: AsyncDatabase[Any]) -> None:
    """It is around what follows, in threads and tasks that inherit the context too, although the helper returned."""

    async def main() -> None:
        async def aenter() -> Any:
            return await stack.enter_async_context(adb.session_scope())

        async def current_session() -> Any:
            return adb.session

        async with AsyncExitStack() as stack:
            session = await aenter()
            assert adb.session is session
            assert await asyncio.create_task(current_session()) is session

    def enter() -> Any:
        return stack.enter_context(db.session_scope())

    with ExitStack() as stack:
        session = enter()
        assert db.session is session
        seen: list[Any] = []
        thread = threading.Thread(target=copy_context().run, args=(lambda: seen.append(db.session),))
        thread.start()
        thread.join(10)
        assert seen == [session]
    asyncio.run(main())


def test_a_unit_of_work_knows_where_its_block_was_opened(db: Database[Any], adb: AsyncDatabase[Any]) -> None:
    """The line that enters the block, also by an ExitStack; what is inside contextlib is no place of the app's."""

    def check(line: int) -> None:
        assert str(current.find_open()) == f"session_scope() at {__file__}:{line}"

    def here() -> int:
        return sys._getframe(1).f_lineno

    async def acheck() -> None:
        line = here() + 1
        async with adb.session_scope():
            check(line)
        async with AsyncExitStack() as stack:
            line = here() + 1
            await stack.enter_async_context(adb.session_scope())
            check(line)

    line = here() + 1
    with db.session_scope():
        check(line)
    with ExitStack() as stack:
        line = here() + 1
        stack.enter_context(db.session_scope())
        check(line)
    asyncio.run(acheck())


# -- context managers ------------------------------------------------------------------------------


def test_a_context_manager_is_around_the_body_of_its_with(db: Database[Any]) -> None:
    """Nested, by an ExitStack, as a decorator, in a class of one's own: its block is around the body."""

    @contextmanager
    def inner() -> Iterator[Any]:
        with db.session_scope(new=True) as session:
            yield session

    @contextmanager
    def outer() -> Iterator[Any]:
        with inner() as session:
            assert db.session is session
            yield session
            assert db.session is session

    class Owner:
        def __enter__(self) -> Any:
            self.block = outer()
            return self.block.__enter__()

        def __exit__(self, *exc_info: Any) -> None:
            self.block.__exit__(*exc_info)

    @outer()
    def decorated() -> bool:
        return has_session(db)

    with outer() as session:
        assert db.session is session
        with inner() as further_in:
            assert db.session is further_in
        assert db.session is session
    with ExitStack() as stack:
        session = stack.enter_context(outer())
        assert db.session is session
    with Owner() as session:
        assert db.session is session
    assert decorated()
    assert not has_session(db)


def test_a_context_manager_inside_a_generator(db: Database[Any]) -> None:
    """The generator that uses it holds its block: the consumer is outside."""

    @contextmanager
    def block() -> Iterator[Any]:
        with db.session_scope() as session:
            yield session

    def reader() -> Iterator[bool]:
        with block() as own:
            yield True
            yield db.session is own

    for each in reader():
        assert each
        assert not has_session(db)


def test_a_context_manager_that_delegates(db: Database[Any]) -> None:
    """With `yield from` the inner generator is in the place of the outer one; a loop over it only consumes it."""

    def provider() -> Iterator[Any]:
        with db.session_scope(new=True) as session:
            yield session

    @contextmanager
    def delegating() -> Iterator[Any]:
        yield from provider()

    @contextmanager
    def consuming() -> Iterator[Any]:
        for session in provider():  # noqa: UP028
            yield session

    with db.session_scope() as outer:
        with delegating() as session:
            assert db.session is session
            assert session is not outer
        with consuming():
            assert db.session is outer
        assert db.session is outer


def test_a_coroutine_that_an_async_context_manager_decorates(adb: AsyncDatabase[Any]) -> None:
    """The block is around the whole coroutine, also where that is the main function of a task."""

    @asynccontextmanager
    async def block() -> AsyncIterator[Any]:
        async with adb.session_scope(new=True) as session:
            yield session

    @block()
    async def decorated() -> Any:
        session = adb.session
        await asyncio.sleep(0)
        assert adb.session is session
        return session

    async def main() -> None:
        async with adb.session_scope() as outer:
            sessions = [await decorated(), await asyncio.create_task(decorated())]
            sessions += await asyncio.gather(decorated(), decorated())
            assert adb.session is outer
            assert outer not in sessions
        await adb.dispose()

    asyncio.run(decorated())
    asyncio.run(main())


def test_an_async_context_manager_is_around_its_body_and_the_tasks_started_there(adb: AsyncDatabase[Any]) -> None:
    """Tasks and threads inherit it, as they inherit the block of a session_scope()."""

    async def main() -> None:
        @asynccontextmanager
        async def block() -> AsyncIterator[Any]:
            async with adb.session_scope(new=True) as session:
                yield session

        async def current() -> Any:
            return adb.session

        def current_here() -> Any:
            return adb.session

        async with block() as session:
            assert adb.session is session
            assert await asyncio.create_task(current()) is session
            assert await asyncio.to_thread(current_here) is session
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(block())
            assert adb.session is session
            assert await asyncio.create_task(current()) is session
        assert not has_session(adb)
        await adb.dispose()

    asyncio.run(main())


def test_a_thread_inherits_the_context_manager_of_a_thread_that_waits(db: Database[Any]) -> None:
    """As long as the function that entered it has not returned."""

    @contextmanager
    def block() -> Iterator[Any]:
        with db.session_scope() as session:
            yield session

    seen: list[Any] = []
    with ExitStack() as stack:

        def use() -> None:
            with block() as session:
                thread = threading.Thread(target=copy_context().run, args=(lambda: seen.append(db.session is session),))
                thread.start()
                thread.join(10)

        def enter() -> None:
            stack.enter_context(block())
            contexts.append(copy_context())

        use()
        contexts: list[Any] = []
        enter()
        thread = threading.Thread(target=contexts[0].run, args=(lambda: seen.append(has_session(db)),))
        thread.start()
        thread.join(10)
        ended: list[Any] = []
        thread = threading.Thread(target=lambda: ended.append((enter(), copy_context())))
        thread.start()
        thread.join(10)
        seen.append(ended[0][1].run(has_session, db))  # nothing shows whether a thread that has ended was in a greenlet
    assert seen == [True, False, True]


def test_a_context_manager_entered_by_a_helper_that_has_returned(adb: AsyncDatabase[Any]) -> None:
    """As svcs and FastAPI enter the generators of their users: only these are inside."""

    async def main() -> None:
        inside: list[bool] = []

        @asynccontextmanager
        async def provide() -> AsyncIterator[Any]:
            async with adb.session_scope(new=True) as own:
                yield own
                inside.append(adb.session is own)

        async def get(suspend: bool) -> Any:
            manager = provide()
            session = await manager.__aenter__()
            if suspend:
                await asyncio.sleep(0)
            return manager, session

        def current_here() -> bool:
            return adb.session is outer

        async with adb.session_scope() as outer:
            for suspend in (True, False):
                manager, _ = await get(suspend)
                assert adb.session is outer
                assert await asyncio.to_thread(current_here)
                await manager.__aexit__(None, None, None)
                assert adb.session is outer
        assert inside == [True, True]
        await adb.dispose()

    asyncio.run(main())


def test_a_greenlet_inside_the_body(db: Database[Any]) -> None:
    """Code in a greenlet that was started in the body is inside it."""

    @contextmanager
    def block() -> Iterator[Any]:
        with db.session_scope() as session:
            yield session

    with block() as session:
        context = copy_context()
        assert greenlet(lambda: context.run(lambda: db.session)).switch() is session


@pytest.fixture
def fixture_session(db: Database[Any]) -> Iterator[Any]:
    with db.session_scope() as session:
        yield session


def test_a_fixture_is_around_its_tests(db: Database[Any], fixture_session: Any) -> None:
    assert db.session is fixture_session


@pytest.fixture
def delegated_session(db: Database[Any]) -> Iterator[Any]:
    def provider() -> Iterator[Any]:
        with db.session_scope() as session:
            yield session

    yield from provider()


def test_a_fixture_that_delegates_is_around_its_tests(db: Database[Any], delegated_session: Any) -> None:
    assert db.session is delegated_session


class Block:
    """A database, and context managers of an app."""

    db: Database[Any]
    adb: AsyncDatabase[Any]

    @contextmanager
    def block(self) -> Iterator[Any]:
        with self.db.session_scope() as session:
            yield session

    @asynccontextmanager
    async def ablock(self) -> AsyncIterator[Any]:
        async with self.adb.session_scope() as session:
            yield session


def test_a_context_that_a_unittest_enters_is_around_the_test(db: Database[Any], adb: AsyncDatabase[Any]) -> None:
    """By `enterContext()` and its like, and by an `ExitStack` of `setUp()`."""

    class Case(Block, unittest.TestCase):
        def setUp(self) -> None:
            self.session = self.enterContext(self.block())

        def test(self) -> None:
            assert self.db.session is self.session

    class StackCase(Case):
        def setUp(self) -> None:
            stack = ExitStack()
            self.session = stack.enter_context(self.block())
            self.addCleanup(stack.close)

    class AsyncCase(Block, unittest.IsolatedAsyncioTestCase):
        async def asyncSetUp(self) -> None:
            self.session = await self.enterAsyncContext(self.ablock())

        async def test(self) -> None:
            assert self.adb.session is self.session

    for case in (Case("test"), StackCase("test"), AsyncCase("test")):
        case.db, case.adb = db, adb
        result = case.run()
        assert result is not None
        assert result.wasSuccessful(), result.errors


# -- requests --------------------------------------------------------------------------------------


def get(app: Any, db: Any, *paths: str) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            responses = [await client.get(path) for path in paths]
        disposed = db.dispose()
        if disposed is not None:
            await disposed
        return responses

    return asyncio.run(main())


@pytest.mark.parametrize("endpoint_is_async", [True, False])
@pytest.mark.parametrize(
    ("plugin", "dependency_is_async"), [(SessionPlugin, True), (SessionPlugin, False), (AsyncSessionPlugin, True)]
)
def test_a_yield_dependency_does_not_take_over_the_request(
    plugin: Any, dependency_is_async: bool, endpoint_is_async: bool
) -> None:
    """`Depends(db.get_session)`, `db.session` and a joining block mean the request's, whatever is resolved before."""
    is_async = plugin is AsyncSessionPlugin
    db = plugin("sqlite+aiosqlite://" if is_async else "sqlite://")
    app = FastAPI()
    db.init_app(app)
    inside: list[bool] = []

    async def asked(request: Request) -> Any:
        return await db.get_session(request)

    async def audit() -> AsyncIterator[Any]:
        if is_async:
            async with db.session_scope(new=True) as session:
                inside.append(db.session is session)
                yield session
                inside.append(db.session is session)
        else:
            with db.session_scope(new=True) as session:
                inside.append(db.session is session)
                yield session
                inside.append(db.session is session)

    def audit_in_threads() -> Iterator[Any]:
        with db.session_scope(new=True) as session:
            inside.append(db.session is session)
            yield session
            inside.append(db.session is session)

    First = Annotated[Any, Depends(asked)]
    Audit = Annotated[Any, Depends(audit if dependency_is_async else audit_in_threads)]
    Requests = Annotated[Any, Depends(db.get_session)]

    def check(first: Any, audit: Any, session: Any) -> list[bool]:
        return [first is session, session is not audit, db.session is session]

    @app.get("/async")
    async def endpoint(first: First, audit: Audit, session: Requests) -> Any:
        joined = []
        if is_async:
            async with db.session_scope() as inner:
                joined.append(inner is session)
        return check(first, audit, session) + joined

    @app.get("/sync")
    def endpoint_in_a_thread(first: First, audit: Audit, session: Requests) -> Any:
        return check(first, audit, session)

    answer, schema = get(app, db, "/async" if endpoint_is_async else "/sync", "/openapi.json")
    assert set(answer.json()) == {True}
    assert inside == [True, True]
    assert "connection" not in schema.text


def test_get_session_is_that_of_the_websocket() -> None:
    """FastAPI passes the connection of a WebSocket too; called by hand it needs none."""
    db = AsyncSessionPlugin("sqlite+aiosqlite://")
    app = FastAPI()
    db.init_app(app)
    seen: list[bool] = []

    async def audit() -> AsyncIterator[Any]:
        async with db.session_scope(new=True) as session:
            yield session

    @app.websocket("/")
    async def endpoint(
        socket: WebSocket, audit: Annotated[Any, Depends(audit)], session: Annotated[Any, Depends(db.get_session)]
    ) -> None:
        seen.append(session is not audit)
        seen.append(await db.get_session() is session)
        await socket.accept()
        async with db.session_scope() as own:
            seen.append(await db.get_session() is own)
        await socket.close()

    async def main() -> None:
        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            pass

        scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}
        await app(scope, receive, send)
        await db.dispose()

    asyncio.run(main())
    assert seen == [True, True, True]


def test_get_session_of_a_connection_that_came_another_way(db: Database[Any]) -> None:
    """A connection that has no unit of work on this database does not matter."""
    plugin = AsyncSessionPlugin("sqlite+aiosqlite://")
    plugin.init_app(FastAPI())
    with pytest.raises(NoScopeError):
        asyncio.run(plugin.get_session(HTTPConnection({"type": "http"})))


@pytest.mark.parametrize("body_is_async", [True, False])
def test_the_generator_of_a_response_finds_its_own(body_is_async: bool) -> None:
    """Also a plain generator, each of whose steps Starlette runs in a thread and a copied context."""
    db = SessionPlugin("sqlite://")
    app = FastAPI()
    db.init_app(app)

    def body() -> Iterator[str]:
        with db.session_scope(new=True) as own:
            for _ in range(3):
                yield f"{db.session is own} "

    async def abody() -> AsyncIterator[str]:
        with db.session_scope(new=True) as own:
            for _ in range(3):
                yield f"{db.session is own} "

    @app.get("/")
    async def endpoint() -> Any:
        return StreamingResponse(abody() if body_is_async else body())

    assert get(app, db, "/")[0].text == "True True True "


def test_a_generator_in_flask() -> None:
    """A reader in a view and the generator of the response: each its own, and the view the request's."""
    db = FlaskPlugin("sqlite://")
    app = Flask(__name__)
    db.init_app(app)

    def reader() -> Iterator[str]:
        with db.session_scope(new=True) as own:
            for _ in range(2):
                yield f"{db.session is own} "

    @app.get("/")
    def view() -> Any:
        session, kept = db.session, reader()
        next(kept)
        assert db.session is session
        for _ in reader():
            assert db.session is session
        kept.close()
        return Response(reader())

    assert app.test_client().get("/").text == "True True "


# -- forks -----------------------------------------------------------------------------------------


def forked(work: Any) -> int:
    """Do ``work`` in a forked child, and return its exit code."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve_wsgi(db: Any, view: Any) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        view()
        start_response("200 OK", [])
        return [b""]

    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/"}
    WSGIMiddleware(app, db)(environ, lambda *started: None)


def serve_flask(database: Any, view: Any) -> None:
    db, app = FlaskPlugin(database), Flask(__name__)
    db.init_app(app)
    app.post("/")(lambda: (view(), "")[1])
    assert app.test_client().post("/").status_code == 200


def serve_fastapi(database: Any, view: Any, *, is_async: bool) -> None:
    db, app = (AsyncSessionPlugin if isinstance(database, AsyncDatabase) else SessionPlugin)(database), FastAPI()
    db.init_app(app)
    if is_async:

        @app.get("/")
        async def endpoint() -> None:
            view()
    else:

        @app.get("/")
        def endpoint_in_a_thread() -> None:
            view()

    assert get(app, db, "/")[0].status_code == 200


def serve_generator(database: Any, view: Any) -> None:
    def reader() -> Iterator[None]:
        with database.session_scope():
            view()
            yield

    list(reader())


SERVERS = {
    "wsgi": serve_wsgi,
    "flask": serve_flask,
    "fastapi, async def": partial(serve_fastapi, is_async=True),
    "fastapi, def": partial(serve_fastapi, is_async=False),
    "generator": serve_generator,
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_process_forked_in_a_request_that_has_not_used_its_session(
    file_store: Store, server: str, nested: bool
) -> None:
    """Its session_scope() joins nothing of the parent's, in which nothing is settled there: what it saves is saved."""
    file_store.clear()
    db = Database(file_store.url)

    def work() -> None:
        with pytest.raises((ScopeClosedError, NoScopeError)):
            _ = db.session
        with db.session_scope() as session:
            session.add(Parent(name="child"))

    def view() -> None:
        with db.session_scope(new=True) if nested else nullcontext():
            assert forked(work) == 0
        db.session.add(Parent(name="parent"))

    SERVERS[server](db, view)
    assert file_store.names() == ["child", "parent"]
    db.dispose()


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_forked_child_does_to_the_units_of_work_around_the_fork(
    file_store: Store, server: str, nested: bool
) -> None:
    """All that are open there end, with or without a session, in a request, in a block in it and in a generator."""
    file_store.clear()
    db = Database(file_store.url)

    def view() -> None:
        with db.session_scope(new=True) if nested else nullcontext():
            units = entered_units()
            assert [unit.closed for unit in units] == [False] * (1 + nested)
            forget_current_units()
            assert all(unit.closed for unit in units)
            with pytest.raises((ScopeClosedError, NoScopeError)):
                _ = db.session
            with db.session_scope() as session:
                session.add(Parent(name="child"))

    SERVERS[server](db, view)
    assert file_store.names() == ["child"]
    db.dispose()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
def test_a_process_forked_in_an_async_request_has_an_event_loop_of_its_own(async_store: Store, used: bool) -> None:
    """The parent's event loop does not exist in the child, which may use the database on its own."""
    async_store.clear()
    db = AsyncDatabase(async_store.url)

    async def save(name: str) -> None:
        async with db.session_scope() as session:
            session.add(Parent(name=name))

    app = FastAPI()
    plugin = AsyncSessionPlugin(db)
    plugin.init_app(app)

    @app.get("/")
    async def endpoint() -> None:
        if used:
            await db.session.execute(text("SELECT 1"))
        assert forked(lambda: asyncio.run(save("child"))) == 0
        await save("parent")

    assert get(app, db, "/")[0].status_code == 200
    assert async_store.names() == ["child", "parent"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("core_only", [False, True])
def test_a_process_that_c_code_forked_shares_no_connection(async_store: Store, core_only: bool) -> None:
    """uWSGI forks without the callbacks of `os`: children have connections of their own, and all of them."""
    url = async_store.url.replace("asyncpg", "psycopg")
    db = Database(url, pool_size=1, max_overflow=0, pool_timeout=5)
    app = FlaskPlugin(db)
    flask = Flask(__name__)
    app.init_app(flask)
    flask.get("/")(lambda: str(db.session.scalar(text("SELECT pg_backend_pid()"))))

    def backend() -> int:
        if core_only:
            with db.engine.connect() as connection:
                return int(connection.scalar(text("SELECT pg_backend_pid()")))
        response = flask.test_client().get("/")
        assert response.status_code == 200
        return int(response.text)

    parents = backend()
    with db.engine.connect() as held:  # its permit comes back in the parent only
        reading, writing = os.pipe()
        child = ctypes.CDLL(None).fork()
        if child == 0:
            try:
                os.write(writing, f"{backend()} {backend()}".encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            childs = pipe.read().split()
        os.waitpid(child, 0)
        assert held.scalar(text("SELECT pg_backend_pid()")) == parents
    assert len(childs) == 2
    assert childs[0] == childs[1] != str(parents)
    assert backend() == parents
    db.dispose()
