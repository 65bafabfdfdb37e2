"""Each call that ends a unit of work fails in turn, in each kind of adapter.

A row of the table defines what fails and the expected result; a column is a kind of adapter on one of its drivers.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import pytest
from fastapi import Depends, FastAPI
from flask import Flask, got_request_exception, stream_with_context
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from session_plugin import AsyncDatabase, Database, PolicyError
from session_plugin.asgi import SessionScopeMiddleware as ASGIMiddleware
from session_plugin.database.interface import core_of
from session_plugin.flask import SessionPlugin as FlaskPlugin
from session_plugin.scope.current import find
from session_plugin.starlette import AsyncSessionPlugin, SessionPlugin
from session_plugin.wsgi import SessionScopeMiddleware as WSGIMiddleware

from .conftest import make_store
from .harness import Store, add, add_orphan, check_foreign_keys, count, insert, wait_for
from .wsgi_site import Server as WSGIServer

POOL = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}


class Broken(Exception):
    """Raised by the part that fails."""


# -- the parts that fail ---------------------------------------------------------------------------


def nothing(world: "World", session: Session) -> None:
    insert("tea")(session)


def idle(world: "World", session: Session) -> None:
    pass


def early(world: "World", session: Session) -> None:
    insert("early")(session)


def flush(world: "World", session: Session) -> None:
    insert("tea")(session)
    session.expunge_all()
    add("tea")(session)


def flush_listener(world: "World", session: Session) -> None:
    insert("tea")(session)
    add("milk")(session)
    event.listen(session, "before_flush", breaks, once=True)


def commit(world: "World", session: Session) -> None:
    insert("tea")(session)
    add_orphan(session)


def commit_listener(world: "World", session: Session) -> None:
    insert("tea")(session)
    world.on_engine("commit", breaks)


def rollback(world: "World", session: Session) -> None:
    insert("tea")(session)
    world.on_engine("rollback", breaks)
    raise Broken


def rollback_after_commit(world: "World", session: Session) -> None:
    commit_listener(world, session)
    world.on_engine("rollback", breaks)


def on_commit_hook(world: "World", session: Session) -> None:
    insert("tea")(session)
    world.db.on_commit(breaks)


def on_rollback_hook(world: "World", session: Session) -> None:
    world.db.on_rollback(breaks)
    commit(world, session)


def policy_that_raises(world: "World", session: Session) -> None:
    world.db.use(breaks)
    insert("tea")(session)


def policy_of_nonsense(world: "World", session: Session) -> None:
    world.db.use(lambda outcome: True)
    insert("tea")(session)


def pool_at_the_work(world: "World", session: Session) -> None:
    world.exhaust()
    insert("tea")(session)


def pool_at_the_flush(world: "World", session: Session) -> None:
    world.exhaust()
    add("tea")(session)


def killed_before_the_flush(world: "World", session: Session) -> None:
    insert("milk")(session)
    add("tea")(session)
    world.kill(world.pid(session))


def killed_at_commit(world: "World", session: Session) -> None:
    insert("tea")(session)
    pid = world.pid(session)
    world.on_engine("commit", lambda connection: world.kill(pid))


def killed_at_rollback(world: "World", session: Session) -> None:
    insert("tea")(session)
    world.kill(world.pid(session))
    raise Broken


def breaks(*args: Any) -> Any:
    raise Broken("broken")


@dataclass
class Row:
    """A part that fails, and the expected result.

    Attributes:
        part: does the work and makes the part fail.
        error: the exception that the unit of work ends with, or None for a success.
        logged: the level of session_plugin's log record, and a part of its message.
        server: whether the failure requires a database server.
    """

    part: Callable[["World", Session], None]
    error: type[BaseException] | None = None
    logged: tuple[int, str] | None = None
    server: bool = False


OK = None
WARNING, ERROR = logging.WARNING, logging.ERROR
TABLE = [
    Row(nothing),
    Row(flush, IntegrityError),
    Row(flush_listener, Broken),
    Row(commit, IntegrityError),
    Row(commit_listener, Broken),
    Row(rollback, Broken, (WARNING, "ROLLBACK failed")),
    Row(rollback_after_commit, Broken),
    Row(on_commit_hook, OK, (ERROR, "The hook breaks failed")),
    Row(on_rollback_hook, IntegrityError, (ERROR, "The hook breaks failed")),
    Row(policy_that_raises, PolicyError),
    Row(policy_of_nonsense, PolicyError),
    Row(pool_at_the_work, PoolTimeout),
    Row(pool_at_the_flush, PoolTimeout),
    Row(killed_before_the_flush, DBAPIError, server=True),
    Row(killed_at_commit, DBAPIError, (ERROR, "outcome of COMMIT is unknown"), server=True),
    Row(killed_at_rollback, Broken, (WARNING, "ROLLBACK failed"), server=True),
]


# -- the columns -----------------------------------------------------------------------------------

START = {"type": "http.response.start", "status": 201, "headers": []}
Part: TypeAlias = Callable[["World", Session], None]


class World:
    """One kind of adapter on one driver; `ask` makes a request and records the response.

    Attributes:
        status: the status that the client receives; 500 if the app failed before anything was sent.
        complete: whether the response ended normally.
        error: the exception that the app or the unit of work raised.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.part, self.late_part = nothing, idle
        self.status, self.complete, self.error = 0, False, None
        self.runner = asyncio.Runner()
        self.repairs: list[Callable[[], Any]] = []
        self.db: Any = None
        self.build(store.url)
        self.is_async = core_of(self.db).is_async
        if store.backend == "sqlite":
            event.listen(self.engine, "connect", check_foreign_keys)

    def build(self, url: str) -> None:
        """Create the app."""
        raise NotImplementedError

    def serve(self) -> None:
        """Serve one request."""
        raise NotImplementedError

    def ask(self, part: Part, late_part: Part) -> None:
        self.repair()
        self.store.clear()
        self.part, self.late_part = part, late_part
        self.status, self.complete, self.error = 0, False, None
        try:
            self.serve()
        except Exception as error:
            self.error = error
        self.status = self.status or 500

    @property
    def engine(self) -> Any:
        return getattr(self.db.engine, "sync_engine", self.db.engine)

    def work(self, session: Session) -> None:
        self.part(self, session)

    def late_work(self, session: Session) -> None:
        self.late_part(self, session)

    def on_engine(self, name: str, call: Callable[..., None]) -> None:
        event.listen(self.engine, name, call)
        self.repairs.append(lambda: event.remove(self.engine, name, call))

    def exhaust(self) -> None:
        """Check out the only connection of the pool."""
        self.repairs.append(self.engine.connect().close)

    def repair(self) -> None:
        for call in self.repairs:
            if self.is_async:
                self.runner.run(greenlet_spawn(call))
            else:
                call()
        self.repairs.clear()

    def pid(self, session: Session) -> Any:
        return session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar()

    def kill(self, pid: Any) -> None:
        with self.store.engine.connect() as connection:
            assert connection.scalar(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    def close(self) -> None:
        disposed = self.db.dispose()
        if disposed is not None:
            self.runner.run(disposed)
        self.runner.close()


class ScopeWorld(World):
    """A session_scope() block outside of any request; it has no late work."""

    def build(self, url: str) -> None:
        self.db = Database(url, **POOL)

    def serve(self) -> None:
        with self.db.session_scope() as session:
            self.work(session)
        self.status, self.complete = 201, True


class AsyncScopeWorld(World):
    def build(self, url: str) -> None:
        self.db = AsyncDatabase(url, **POOL)

    def serve(self) -> None:
        async def block() -> None:
            async with self.db.session_scope() as session:
                await session.run_sync(self.work)

        self.runner.run(block())
        self.status, self.complete = 201, True


class WSGIWorld(World):
    app: Any

    def build(self, url: str) -> None:
        self.db = Database(url, **POOL)

        def app(environ: Any, start_response: Any) -> Any:
            self.work(self.db.session)
            start_response("201 Created", [])
            yield b"part"
            self.late_work(self.db.session)
            yield b"part"

        self.app = WSGIMiddleware(app, self.db)

    def serve(self) -> None:
        server = WSGIServer(self.store).serve(self.app)
        self.status, self.complete = server.status, server.complete
        if server.error is not None:
            raise server.error


class FlaskWorld(WSGIWorld):
    def note(self, app: Flask, exception: Exception) -> None:
        self.error = exception

    def build(self, url: str) -> None:
        self.app = app = Flask(__name__)
        app.logger.disabled = True
        got_request_exception.connect(self.note, app)
        self.db = db = FlaskPlugin(url, **POOL)
        db.init_app(app)

        @app.post("/")
        def endpoint() -> Any:
            self.work(db.session)
            return app.response_class(stream_with_context(body()), 201)

        def body() -> Any:
            yield b"part"
            self.late_work(db.session)
            yield b"part"

        @app.errorhandler(IntegrityError)
        def conflict(error: Exception) -> Any:
            self.error = error
            return {"rows": count(db.session)}, 409


class ASGIWorld(World):
    app: Any

    def build(self, url: str) -> None:
        self.db = db = AsyncDatabase(url, **POOL)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await db.session.run_sync(self.work)
            await send(START)
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
            await db.session.run_sync(self.late_work)
            await send({"type": "http.response.body", "body": b"part"})

        self.app = ASGIMiddleware(app, db)

    def serve(self) -> None:
        async def receive() -> Any:
            return await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                self.complete = not message.get("more_body", False)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        self.runner.run(self.app(scope, receive, send))


class FastAPIWorld(ASGIWorld):
    plugin_class: Any = AsyncSessionPlugin

    def build(self, url: str) -> None:
        self.db = db = self.plugin_class(url, **POOL)
        self.app = app = FastAPI()
        db.init_app(app)

        async def run(work: Any, session: Any) -> Any:
            return await session.run_sync(work) if self.is_async else await run_in_threadpool(work, session)

        @app.post("/")
        async def endpoint(session: Annotated[Any, Depends(db.get_session)]) -> Any:
            await run(self.work, session)
            return StreamingResponse(body(session), 201)

        async def body(session: Any) -> Any:
            yield b"part"
            await run(self.late_work, session)
            yield b"part"

        @app.exception_handler(IntegrityError)
        async def conflict(request: Any, error: Exception) -> Any:
            self.error = error
            return JSONResponse({"rows": await run(count, db.session)}, 409)


class SyncFastAPIWorld(FastAPIWorld):
    plugin_class = SessionPlugin


COLUMNS: list[tuple[type[World], str]] = [
    (ScopeWorld, "sqlite+pysqlite"),
    (ScopeWorld, "postgresql+psycopg"),
    (AsyncScopeWorld, "sqlite+aiosqlite"),
    (AsyncScopeWorld, "postgresql+psycopg_async"),
    (AsyncScopeWorld, "postgresql+asyncpg"),
    (WSGIWorld, "postgresql+psycopg"),
    (FlaskWorld, "sqlite+pysqlite"),
    (FlaskWorld, "postgresql+psycopg"),
    (ASGIWorld, "postgresql+psycopg_async"),
    (ASGIWorld, "postgresql+asyncpg"),
    (FastAPIWorld, "sqlite+aiosqlite"),
    (FastAPIWorld, "postgresql+asyncpg"),
    (SyncFastAPIWorld, "postgresql+psycopg"),
]


def cells(*, late: bool) -> list[Any]:
    """All combinations of rows and columns; a block has no late work, and SQLite has no server to end a connection."""
    return [
        pytest.param((column, driver), row, id=f"{column.__name__}-{driver}-{row.part.__name__}")
        for column, driver in COLUMNS
        for row in TABLE
        if not (row.server and driver.startswith("sqlite"))
        if not (late and column in (ScopeWorld, AsyncScopeWorld))
    ]


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world_class, driver = request.param
    world = world_class(make_store(request, driver))
    yield world
    world.close()
    world.store.engine.dispose()


@pytest.mark.parametrize(("world", "row"), cells(late=False), indirect=["world"])
def test_a_part_fails(world: "World", row: Row, caplog: pytest.LogCaptureFixture) -> None:
    """After a failure, response, database and log are as the row says, and the next request succeeds."""
    world.ask(row.part, idle)
    assert isinstance(world.error, row.error or type(None))
    handled = row.error is IntegrityError and isinstance(world, FlaskWorld | FastAPIWorld)
    assert world.status == (201 if row.error is None else 409 if handled else 500)
    assert world.store.names() == ([] if row.error else ["tea"])
    check_log(row, caplog)
    check_whole(world)


@pytest.mark.parametrize(("world", "row"), cells(late=True), indirect=["world"])
def test_a_part_of_late_work_fails(world: "World", row: Row) -> None:
    """A failure while the body is streamed cuts off the response; the work before the stream stays committed."""
    world.ask(early, row.part)
    assert (world.status, world.complete) == (201, row.error is None)
    assert world.store.names() == (["early"] if row.error else ["early", "tea"])
    check_whole(world)


def check_log(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    ours = [
        record for record in caplog.records if record.name == "session_plugin" and record.levelno >= logging.WARNING
    ]
    messages = [(record.levelno, record.getMessage()) for record in ours if "journal mode" not in record.getMessage()]
    if row.logged is None:
        assert messages == []
    else:
        [(level, message)] = messages
        assert level == row.logged[0]
        assert row.logged[1] in message


def check_whole(world: World) -> None:
    world.repair()
    assert world.engine.pool.checkedout() == 0
    assert wait_for(lambda: not world.store.open_transactions())
    assert find(core_of(world.db)) is None
    world.ask(nothing, idle)
    assert (world.status, world.complete, world.error) == (201, True, None)
    assert world.store.names() == ["tea"]
