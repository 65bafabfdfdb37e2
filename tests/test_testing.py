"""The test kit: failures on request, counted statements, captured hooks, and a database for each worker."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from flask import Flask, Response, request
from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from session_plugin import Database, IsolationError, read_only_autocommit
from session_plugin.engines.backends import BACKENDS, Backend
from session_plugin.fastapi import AsyncSessionPlugin
from session_plugin.flask import SessionPlugin
from session_plugin.testing import (
    aleave_midstream,
    assert_queries,
    captured_hooks,
    exhausted_pool,
    fail_next_commit,
    kill_connection,
    leave_midstream,
    worker_database,
)

from .drivers import ASYNC, MARIADB, POSTGRESQL, SYNC
from .harness import Base, Parent, add, insert
from .test_isolation import SOME, Isolated
from .units import Units, on

HERE = Path(__file__)


# -- failures --------------------------------------------------------------------------------------


def test_the_next_commit_breaks_a_constraint(units: Units) -> None:
    """`fail_next_commit()` fails one commit of the app with the driver's own error.

    Commits of the test's session are not affected.
    """
    with Isolated(units) as isolated:
        fail_next_commit(units.db)
        isolated.see(lambda session: [insert("arranged")(session), session.commit()])
        with pytest.raises(IntegrityError) as raised:
            units.run(add("tea"))
        assert isinstance(raised.value.orig, Exception)
        units.run(add("coffee"))
        assert isolated.names() == ["arranged", "coffee"]


def test_the_next_commit_fails_to_serialize(units: Units) -> None:
    with Isolated(units) as isolated:
        fail_next_commit(units.db, "serialization")
        with pytest.raises(DBAPIError, match="locked" if "sqlite" in units.driver else "a test asked for this"):
            units.run(add("tea"))
        units.run(add("coffee"))
        assert isolated.names() == ["coffee"]


@on(*POSTGRESQL, *MARIADB)
def test_the_next_commit_loses_its_connection(units: Units) -> None:
    with Isolated(units) as isolated:
        isolated.see(lambda session: [insert("arranged")(session), session.commit()])
        fail_next_commit(units.db, "disconnect")
        with pytest.raises(DBAPIError) as raised:
            units.run(add("tea"))
        assert raised.value.connection_invalidated
        units.run(add("coffee"))
        assert isolated.names() == ["arranged", "coffee"]


@on(*POSTGRESQL, *MARIADB)
def test_a_connection_dies_in_the_middle(units: Units) -> None:
    """A killed connection stays dead for its unit of work, even if the work catches the error."""

    def work(session: Session) -> None:
        insert("tea")(session)
        for _ in range(2):
            with pytest.raises(DBAPIError) as raised:
                session.execute(text("SELECT 1"))
            assert raised.value.connection_invalidated

    with Isolated(units) as isolated:
        kill_connection(units.db, after=1)
        with pytest.raises(DBAPIError):
            units.run(work)
        units.run(add("coffee"))
        assert isolated.names() == ["coffee"]


@on("sqlite+pysqlite", "sqlite+aiosqlite")
def test_sqlite_has_no_connection_to_lose(units: Units) -> None:
    with Isolated(units):
        kill_connection(units.db)
        with pytest.raises(IsolationError, match="does not know how to cause this failure on sqlite"):
            units.run(insert("tea"))


@on(*SOME)
def test_an_exhausted_pool_raises_a_timeout(units: Units) -> None:
    with Isolated(units) as isolated:
        with exhausted_pool(units.db):
            with pytest.raises(PoolTimeoutError):
                units.run(insert("tea"))
            assert isolated.names() == []
        units.run(insert("coffee"))
        assert isolated.names() == ["coffee"]


@on("sqlite+pysqlite", "sqlite+aiosqlite")
def test_a_failure_that_never_happened_is_an_error(units: Units) -> None:
    """If a requested failure never happens, the block raises, because the test would have passed without it."""
    for ask in (fail_next_commit, kill_connection):
        with pytest.raises(IsolationError, match="has not happened"), Isolated(units):
            ask(units.db)


def test_failures_need_an_isolated_database() -> None:
    db = Database("sqlite://")
    with pytest.raises(IsolationError, match="works on an isolated database only"):
        fail_next_commit(db)


# -- hooks -----------------------------------------------------------------------------------------


@on(*SOME)
def test_hooks_are_captured(units: Units) -> None:
    """Hooks of committed work are captured instead of run; a test can inspect them, and run them with `hooks.run()`."""

    def work(session: Session) -> None:
        units.db.on_commit(hook, "tea", loud=True)
        insert("tea")(session)

    def hook(name: str, loud: bool) -> Any:
        if units.is_async:
            return units.db.session.run_sync(insert(f"{name}{'!' * loud}"))
        return insert(f"{name}{'!' * loud}")(units.db.session)

    with Isolated(units) as isolated:
        with captured_hooks(units.db) as hooks:
            run_one_inside(units)
            units.run(work)
            with pytest.raises(IntegrityError):
                units.run(work)
        (kept,) = hooks
        assert (kept.func, kept.args, kept.keywords) == (hook, ("tea",), {"loud": True})  # type: ignore[attr-defined]
        assert isolated.names() == ["tea"]
        running = hooks.run()
        if running is not None:
            units.runner.run(running)  # type: ignore[arg-type]
        assert (isolated.names(), hooks) == (["tea", "tea!"], [])
        units.run(lambda session: units.db.on_commit(hook, "coffee", loud=False))
        assert isolated.names() == ["coffee", "tea", "tea!"]


def run_one_inside(units: Units) -> None:
    """Hooks that an inner block captures and runs are not captured again by the outer block."""
    log: list[int] = []
    with captured_hooks(units.db) as hooks:
        units.run(lambda session: units.db.on_commit(log.append, 1) or session.execute(text("SELECT 1")))  # type: ignore[func-returns-value]
        running = hooks.run()
        if running is not None:
            units.runner.run(running)  # type: ignore[arg-type]
    assert (log, hooks) == ([1], [])


# -- queries ---------------------------------------------------------------------------------------


@on(*SYNC, *ASYNC)
def test_too_many_statements_are_named_with_their_origin(units: Units) -> None:
    """`assert_queries()` names each statement and the line that executed it, on an isolated database or not.

    Statements that begin or end transactions do not count.
    """

    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        with session.begin_nested():
            session.scalars(select(Parent)).all()

    def check() -> None:
        with assert_queries(units.db, max=2) as queries:
            units.run(work)
        assert len(queries) == 2
        with assert_queries(units.db, max=1):
            units.run(lambda session: session.execute(text("DELETE FROM parent")))
        with pytest.raises(AssertionError) as raised, assert_queries(units.db, max=1):
            units.run(work)
        lines = str(raised.value).splitlines()
        assert lines[0] == "2 statements were sent, and 1 are allowed:"
        first = work.__code__.co_firstlineno
        assert [line.strip() for line in lines[1:]] == [
            "1. SELECT 1",
            f"{HERE}:{first + 1} in work",
            "2. SELECT parent.name FROM parent",
            f"{HERE}:{first + 3} in work",
        ]

    check()
    with Isolated(units):
        check()


@on("postgresql+asyncpg")
def test_the_origin_of_a_statement_of_a_coroutine(units: Units) -> None:
    async def work() -> None:
        async with units.db.session_scope() as session:
            await session.scalar(text("SELECT 1"))

    with assert_queries(units.db, max=1) as queries:
        units.runner.run(work())
    assert queries[0].origin == f"{HERE}:{work.__code__.co_firstlineno + 2} in work"


@on("sqlite+pysqlite")
def test_a_statement_without_user_code_on_the_stack(units: Units) -> None:
    with assert_queries(units.db, max=99) as queries:
        with units.db.sessionmaker() as session:
            thread = threading.Thread(target=session.execute, args=(text("SELECT 1"),))
            thread.start()
            thread.join()
    assert {query.origin for query in queries} == {"no code of yours is on the stack"}


@on("postgresql+psycopg")
def test_statements_of_an_engine_that_is_created_in_the_block(units: Units) -> None:
    """Statements of an engine that is created inside the block count; those of other databases do not.

    The first read without a transaction creates such an engine.
    """
    with assert_queries(units.db, max=1) as queries:
        with units.db.session_scope() as session:
            units.db.use(read_only_autocommit)
            session.execute(text("SELECT 1"))
        with units.store.engine.connect() as elsewhere:
            elsewhere.execute(text("SELECT 2"))
    assert [query.statement for query in queries] == ["SELECT 1"]


@on("sqlite+pysqlite")
def test_an_error_of_the_block_is_not_hidden(units: Units) -> None:
    with pytest.raises(ZeroDivisionError), assert_queries(units.db, max=0):
        units.run(lambda session: [session.execute(text("SELECT 1")), 1 / 0])


# -- apps ------------------------------------------------------------------------------------------


@pytest.fixture
def flask_app(tmp_path: Path) -> Iterator[tuple[Flask, SessionPlugin[Any]]]:
    db = SessionPlugin(f"sqlite:///{tmp_path}/test.db", metadata=Base.metadata)
    app = Flask(__name__)
    db.init_app(app)

    @app.post("/parents")
    def create() -> Any:
        db.session.add(Parent(name=request.args["name"]))
        return "created", 201

    @app.post("/stream")
    def stream() -> Any:
        posted = request.json

        def names() -> Iterator[str]:
            for name in posted:
                db.session.add(Parent(name=name))
                yield name

        return Response(names(), 201, headers={"X-Client": request.headers["X-Client"]})

    @app.errorhandler(IntegrityError)
    def refused(error: IntegrityError) -> Any:
        return "refused", 409

    db.create_all()
    yield app, db
    db.dispose()


def test_a_failed_commit_reaches_the_error_handler_of_flask(flask_app: tuple[Flask, SessionPlugin[Any]]) -> None:
    app, db = flask_app
    client = app.test_client()
    with db.isolated() as session:
        fail_next_commit(db)
        assert client.post("/parents?name=tea").status_code == 409
        assert client.post("/parents?name=tea").status_code == 201
        assert session.scalars(select(Parent.name)).all() == ["tea"]
    with db.session_scope() as session:
        assert session.scalars(select(Parent.name)).all() == []


def test_leaving_a_flask_stream_midway_writes_nothing(flask_app: tuple[Flask, SessionPlugin[Any]]) -> None:
    app, db = flask_app
    with db.isolated() as session:
        left = leave_midstream(app, "POST", "/stream?x=1", json=["a", "b", "c"], headers={"X-Client": "x"}, chunks=2)
        assert (left.status, left.body) == (201, b"ab")
        assert session.scalars(select(Parent.name)).all() == []
        left = leave_midstream(app, "POST", "/parents?name=tea")
        assert (left.status, left.body) == (201, b"created")
        leave_midstream(app, "POST", "/stream", json=["a", "b"], headers={"X-Client": "x"}, chunks=9)
        assert session.scalars(select(Parent.name).order_by(Parent.name)).all() == ["a", "b", "tea"]


def fastapi_app(location: Path) -> tuple[FastAPI, AsyncSessionPlugin[Any]]:
    db = AsyncSessionPlugin(f"sqlite+aiosqlite:///{location}/test.db", metadata=Base.metadata)
    app = FastAPI()
    db.init_app(app)

    @app.post("/parents", status_code=201)
    async def create(name: str) -> None:
        db.session.add(Parent(name=name))

    @app.post("/stream", status_code=201)
    async def stream(names: list[str]) -> StreamingResponse:
        async def body() -> AsyncGenerator[str]:
            for name in names:
                db.session.add(Parent(name=name))
                yield name
                await asyncio.sleep(0)

        return StreamingResponse(body(), 201)

    @app.exception_handler(IntegrityError)
    async def refused(request: Any, error: Any) -> JSONResponse:
        return JSONResponse("refused", 409)

    return app, db


def test_an_asgi_app(tmp_path: Path) -> None:
    """In an ASGI app a failed commit reaches the error handler, and leaving a stream midway writes nothing."""
    app, db = fastapi_app(tmp_path)

    async def main() -> None:
        await db.create_all()
        async with db.isolated() as session:
            fail_next_commit(db)
            assert (await aleave_midstream(app, "POST", "/parents?name=tea")).status == 409
            left = await aleave_midstream(app, "POST", "/stream", json=["a", "b", "c"], chunks=2)
            assert (left.status, left.body) == (201, b"ab")
            assert (await session.scalars(select(Parent.name))).all() == []
            assert (await aleave_midstream(app, "POST", "/stream", json=["a"], chunks=9)).body == b"a"
            assert (await session.scalars(select(Parent.name))).all() == ["a"]
        await db.dispose()

    asyncio.run(main())


def test_an_asgi_app_that_ignores_the_disconnect() -> None:
    """What an app sends after the client has disconnected is not read."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in (b"a", b"b", b"c"):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    assert asyncio.run(aleave_midstream(app, "GET", "/", chunks=2)).body == b"ab"


# -- a database per worker -------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "postgresql+asyncpg", "mariadb+pymysql", "mariadb+aiomysql"])
def test_each_worker_has_a_database(driver: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(driver.partition("+")[0])
    base = make_url(server.url(driver.partition("+")[2]))
    if driver.startswith("mariadb"):  # its user may create databases of its own name only
        base = base.set(username="root", password="")
    with worker_database(base, "gw1") as url:
        assert url.database == f"{base.database}_gw1"
        left_open = create_engine(server.admin_url(url.database))
        Base.metadata.create_all(left_open)
    with worker_database(base.render_as_string(hide_password=False), "gw1") as url:
        engine = create_engine(server.admin_url(url.database))
        Base.metadata.create_all(engine, checkfirst=False)
        engine.dispose()
    with pytest.raises(OperationalError):
        engine.connect()
    left_open.dispose()


def test_each_worker_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQLite the file is named after pytest-xdist's worker; without a worker, or in memory, nothing changes."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    with worker_database(f"sqlite:///{tmp_path}/test.db") as url:
        assert url.database == f"{tmp_path}/test_gw3.db"
        db = Database(url, metadata=Base.metadata)
        db.create_all()
        db.dispose()
        assert os.listdir(tmp_path) == ["test_gw3.db"]
    assert os.listdir(tmp_path) == []
    with worker_database("sqlite://") as url:
        assert url == make_url("sqlite://")
    with worker_database("sqlite:///test.db", "master") as url:
        assert url.database == "test.db"


@on("postgresql+psycopg")
def test_the_next_commit_of_a_session_of_the_factory_is_disconnected(units: Units) -> None:
    """A session of ``db.sessionmaker()`` belongs to no unit of work; its commit fails with the driver's error too."""
    with Isolated(units):
        fail_next_commit(units.db, "disconnect")
        with units.db.sessionmaker() as session:
            insert("lost")(session)
            with pytest.raises(OperationalError):
                session.commit()
    assert units.store.names() == []


@pytest.mark.parametrize("failure", [IntegrityError, "disconnect"])
def test_a_failure_of_a_database_that_is_not_known(monkeypatch: pytest.MonkeyPatch, failure: Any) -> None:
    """On a database of which nothing special is known, the kit says that it cannot cause a failure."""
    db = Database("sqlite://", metadata=Base.metadata)
    monkeypatch.setitem(BACKENDS, "sqlite", Unknown())
    with db.isolated():
        fail_next_commit(db, failure)
        with pytest.raises(IsolationError, match="does not know how to cause"), db.session_scope() as session:
            session.execute(text("SELECT 1"))
    db.dispose()


class Unknown(Backend):
    """A backend with the defaults."""
