"""The configuration of a `Database`, and the errors of a wrong configuration."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from sqlalchemy import Column, ForeignKey, Table, create_engine, event, inspect, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool

from session_plugin import (
    AsyncDatabase,
    ConfigurationError,
    Database,
    NoScopeError,
    commit_on_success,
    manual,
)
from session_plugin.database import forks
from session_plugin.database.forks import dispose_at_exit, forget_inherited_connections
from session_plugin.database.interface import core_of
from session_plugin.engines import forks as process
from session_plugin.engines.making import connection_limit
from session_plugin.flask import SessionPlugin as FlaskPlugin
from session_plugin.scope.session import ScopeSession

from .conftest import make_store
from .harness import Base, Parent, insert, wait_for


@pytest.fixture
def dispose() -> Any:
    """Dispose of the databases that a test creates."""
    made: list[Any] = []

    def keep(db: Any) -> Any:
        made.append(db)
        return db

    yield keep
    for db in made:
        if isinstance(db, AsyncDatabase):
            asyncio.run(db.dispose())
        else:
            db.dispose()


class CustomSession(Session):
    def shout(self) -> str:
        return "tea!"


class CustomAsyncSession(AsyncSession):
    sync_session_class = CustomSession


# -- sources ---------------------------------------------------------------------------------------


def test_a_url(dispose: Any) -> None:
    """A `Database` can be created from a URL."""
    db = dispose(Database("sqlite://"))
    with db.session_scope() as session:
        assert session.scalar(text("SELECT 42")) == 42


def test_an_engine_that_the_user_created_is_not_disposed_of(dispose: Any) -> None:
    """dispose() does not dispose of an engine that the user created."""
    engine = create_engine("sqlite://")
    db = dispose(Database(engine))
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
    pool = engine.pool
    db.dispose()
    assert db.engine is engine
    assert engine.pool is pool
    engine.dispose()
    assert engine.pool is not pool


def test_bind_is_an_alternative_to_the_first_argument(dispose: Any) -> None:
    """``bind=`` is an alternative to the first argument."""
    engine = create_engine("sqlite://")
    assert dispose(Database(bind=engine)).engine is engine
    engine.dispose()


def test_a_sessionmaker_with_its_class_and_options(dispose: Any) -> None:
    """The session class and the options of a sessionmaker are used."""
    engine = create_engine("sqlite://")
    maker = sessionmaker(engine, class_=CustomSession, autoflush=False, info={"who": "me"})
    with dispose(Database(maker)).session_scope() as session:
        assert (session.shout(), session.autoflush, session.info) == ("tea!", False, {"who": "me"})
    engine.dispose()


def test_an_async_sessionmaker(dispose: Any) -> None:
    """The session classes of an async sessionmaker are used."""
    engine = create_async_engine("sqlite+aiosqlite://")
    db = dispose(AsyncDatabase(async_sessionmaker(engine, class_=CustomAsyncSession)))

    async def main() -> None:
        async with db.session_scope() as session:
            assert isinstance(session, CustomAsyncSession)
            assert isinstance(session.sync_session, CustomSession)
        await engine.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("work", ["SELECT 1", None])
def test_a_session_is_closed_by_its_own_close(work: str | None, dispose: Any) -> None:
    """A session is closed by the close() method of its own class, even if it was not used."""
    closed: list[str] = []

    class Closing(Session):
        def close(self) -> None:
            super().close()
            closed.append("sync")

    class AsyncClosing(AsyncSession):
        async def close(self) -> None:
            await super().close()
            closed.append("async")

    async def main(db: Any) -> None:
        async with db.session_scope() as session:
            if work:
                await session.execute(text(work))
        await db.dispose()

    with dispose(Database("sqlite://", class_=Closing)).session_scope() as session:
        if work:
            session.execute(text(work))
    assert closed == ["sync"]
    asyncio.run(main(AsyncDatabase("sqlite+aiosqlite://", class_=AsyncClosing)))
    assert closed == ["sync", "async"]
    asyncio.run(main(AsyncDatabase("sqlite+aiosqlite://", sync_session_class=Closing)))
    assert closed == ["sync", "async", "sync"]


def test_a_session_class_keeps_its_own_attributes(dispose: Any) -> None:
    """A user's session class keeps its public attributes, unless SQLAlchemy's `Session` has the same attribute."""
    public = {name for name in vars(ScopeSession) if not name.startswith("_")}
    assert public <= {*dir(Session)}

    class Own(Session):
        def has_changes(self) -> str:
            return "own"

    with dispose(Database("sqlite://", class_=Own)).session_scope() as session:
        session.execute(text("CREATE TABLE t (x INTEGER)"))
        assert session.has_changes() == "own"


@pytest.mark.parametrize("by", ["keyword", "factory"])
def test_a_sessionmaker_as_sync_session_class(by: str, dispose: Any) -> None:
    """A sessionmaker as ``sync_session_class`` keeps its options, and events that listen to it fire."""
    maker = sessionmaker(info={"a": 1})
    begun: list[Any] = []
    event.listen(maker, "after_begin", lambda session, *rest: begun.append(session))
    engine = create_async_engine("sqlite+aiosqlite://")
    source: Any = engine
    options: dict[str, Any] = {"sync_session_class": maker}
    if by == "factory":
        source, options = async_sessionmaker(engine, **options), {}
    db = dispose(AsyncDatabase(source, **options))

    async def main() -> None:
        async with db.session_scope() as session:
            await session.scalar(text("SELECT 1"))
            assert begun == [session.sync_session]
            assert session.info["a"] == 1
        await engine.dispose()

    asyncio.run(main())


def test_every_session_option_passes_through(dispose: Any) -> None:
    """Session options are passed on under SQLAlchemy's names, together with engine options."""
    db = dispose(
        Database(
            "sqlite://", autoflush=False, expire_on_commit=False, autobegin=False, twophase=False, info={"a": 1},
            join_transaction_mode="create_savepoint", class_=CustomSession, echo=False, pool_size=3, max_overflow=1,
        )
    )  # fmt: skip
    assert db.engine.pool.size() == 3
    with db.session_scope() as session:
        assert type(session).__name__ == "CustomSession"
        assert (session.autoflush, session.expire_on_commit, session.autobegin) == (False, False, False)
        assert session.join_transaction_mode == "create_savepoint"
        session.begin()
        assert session.scalar(text("SELECT 1")) == 1


def test_async_sessions_do_not_expire_by_default(dispose: Any) -> None:
    """Async sessions are created with expire_on_commit=False, unless the option is given."""
    assert dispose(AsyncDatabase("sqlite+aiosqlite://")).sessionmaker.kw["expire_on_commit"] is False
    asked = dispose(AsyncDatabase("sqlite+aiosqlite://", expire_on_commit=True))
    assert asked.sessionmaker.kw["expire_on_commit"] is True


def test_a_session_of_the_sessionmaker_belongs_to_no_scope(dispose: Any) -> None:
    """A session that is created with `Database.sessionmaker` belongs to no unit of work."""
    db = dispose(Database("sqlite://", metadata=Base.metadata))
    db.create_all()
    with db.sessionmaker() as session:
        session.add(Parent(name="tea"))
        session.commit()
        session.close()
        assert session.scalar(select(Parent.name)) == "tea"
    db.drop_all()
    assert inspect(db.engine).get_table_names() == []


class Orders(DeclarativeBase):
    pass


class Order(Orders):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Report(Orders):
    __tablename__ = "reports"
    id: Mapped[int] = mapped_column(primary_key=True)


class Log(DeclarativeBase):
    pass


class Entry(Log):
    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.parametrize("key", [Report, Report.__table__, Report.__mapper__], ids=["class", "table", "mapper"])
def test_named_engines_and_binds(dispose: Any, key: Any) -> None:
    """One session uses the engine that ``binds`` gives for each entity, and create_all() uses the same binds."""
    db = dispose(
        Database(
            {"default": "sqlite://", "reports": {"url": "sqlite://", "pool_size": 2}},
            binds={key: "reports"},
            metadata=Orders.metadata,
        )
    )
    db.create_all()
    assert inspect(db.engines["default"]).get_table_names() == ["orders"]
    assert inspect(db.engines["reports"]).get_table_names() == ["reports"]
    with db.session_scope() as session:
        session.add_all([Order(), Report()])
    with db.engines["reports"].connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM reports")) == 1


def test_the_engines_of_an_async_database() -> None:
    """An async database has named engines, and `engine` is the default one."""
    db = AsyncDatabase({"default": "sqlite+aiosqlite://", "other": "sqlite+aiosqlite://"})
    assert list(db.engines) == ["default", "other"]
    assert db.engine is db.engines["default"]


def test_binds_of_a_whole_base_and_to_an_engine(dispose: Any) -> None:
    """``binds`` accepts a declarative base as a key and an engine as a value."""
    engine = create_engine("sqlite:///file:/log?vfs=memdb&uri=true", pool_size=1)
    db = dispose(Database("sqlite://", binds={Log: engine}, metadata=Log.metadata))
    db.create_all()
    assert inspect(engine).get_table_names() == ["entries"]
    db.drop_all()
    engine.dispose()


@pytest.mark.parametrize("method", ["create_all", "drop_all"])
def test_create_all_on_another_event_loop_raises(dispose: Any, method: str) -> None:
    """create_all() and drop_all() raise an error while another event loop uses the database's connections."""
    db = dispose(AsyncDatabase("sqlite+aiosqlite://", metadata=Base.metadata))

    async def elsewhere() -> None:
        await asyncio.to_thread(asyncio.run, getattr(db, method)())

    async def main() -> None:
        await db.create_all()
        with pytest.raises(ConfigurationError, match="another event loop"):
            await elsewhere()
        await db.drop_all()

    asyncio.run(main())


def test_a_disposed_async_database_serves_another_loop(dispose: Any) -> None:
    """An async database that was disposed of can be used on another event loop, even while the first one runs."""
    db = dispose(AsyncDatabase("sqlite+aiosqlite://"))

    async def work() -> None:
        async with db.session_scope() as session:
            assert await session.scalar(text("SELECT 42")) == 42
        await db.dispose()

    async def main() -> None:
        await work()
        await asyncio.to_thread(asyncio.run, work())
        await work()

    asyncio.run(main())


def test_create_all_on_an_async_database(dispose: Any) -> None:
    """create_all() and drop_all() can be awaited on an async database."""
    db = dispose(AsyncDatabase("sqlite+aiosqlite://", metadata=Base.metadata))

    async def main() -> None:
        await db.create_all()
        async with db.session_scope() as session:
            await session.run_sync(insert("tea"))
        await db.drop_all()
        async with db.session_scope() as session:
            assert (await session.scalars(text("SELECT name FROM sqlite_master"))).all() == []

    asyncio.run(main())


def test_the_default_policy(dispose: Any) -> None:
    """The default policy is `commit_on_success`, unless ``policy=`` is given."""
    db = dispose(Database("sqlite://", policy=manual))
    with db.session_scope():
        assert db.scope.policy is manual
    assert dispose(Database("sqlite://"))._core.default_policy is commit_on_success


# -- 17: a wrong configuration raises at start-up --------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Database(), "No database is configured"),
        (lambda: Database("postgres//nonsense:secret@"), "cannot be read"),
        (lambda: Database("postgresql+nonsense://u:secret@h/d"), "has no dialect for"),
        (lambda: Database("mysql+cymysql://u:secret@h/d"), "not installed: pip install cymysql"),
        (lambda: Database("sqlite+aiosqlite://"), "Use AsyncDatabase"),
        (lambda: Database("postgresql+asyncpg://u:secret@h/d"), "Use AsyncDatabase"),
        (lambda: AsyncDatabase("sqlite://"), r"Write sqlite\+aiosqlite://"),
        (lambda: AsyncDatabase("postgresql+psycopg2://u:secret@h/d"), "sync driver|not installed"),
        (lambda: Database("sqlite://", poolsize=3), "poolsize"),
        (lambda: Database(create_async_engine("sqlite+aiosqlite://")), "give an Engine to Database"),
        (lambda: AsyncDatabase(create_engine("sqlite://")), "an AsyncEngine to AsyncDatabase"),
        (lambda: Database(create_engine("sqlite://"), pool_size=3), "pool_size cannot be applied"),
        (lambda: Database(42), "does not name a database"),
        (lambda: Database({"default": {"pool_size": 3}}), 'need a "url" each'),
        (lambda: Database("sqlite://", binds={Order: "reports"}), "names the engine 'reports'"),
        (lambda: Database("sqlite://", policy="commit"), "is not a policy"),
        (lambda: Database("sqlite://").create_all(), "metadata=Base.metadata"),
    ],
)
def test_a_wrong_configuration_raises(make: Any, message: str) -> None:
    """A wrong configuration raises an error that says what to change and contains no password."""
    from session_plugin import PolicyError

    with pytest.raises((ConfigurationError, PolicyError), match=message) as caught:
        make()
    assert "secret" not in str(caught.value)
    del caught
    gc.collect()


def test_an_async_database_without_greenlet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without greenlet, `AsyncDatabase` raises an error that names the extra to install."""
    import sys

    monkeypatch.setitem(sys.modules, "greenlet", None)
    with pytest.raises(ConfigurationError, match=r"session_plugin\[asyncio\]"):
        AsyncDatabase("sqlite+aiosqlite://")


def test_a_missing_default_engine_raises() -> None:
    """Reading `engine` raises an error if there is no engine called 'default'."""
    db = Database({"reports": "sqlite://"})
    with pytest.raises(ConfigurationError, match="No engine is called 'default'"):
        _ = db.engine
    db.dispose()


def test_a_scoped_session_cannot_replace_the_session(dispose: Any) -> None:
    """`scoped_session` returns the unit of work's session, and its registry cannot replace it."""
    db = dispose(Database("sqlite://"))
    registry = db.scoped_session.registry
    assert not registry.has()
    with pytest.raises(NoScopeError):
        db.scoped_session()
    with db.session_scope() as session:
        assert registry.has()
        assert db.scoped_session() is session
        with pytest.raises(ConfigurationError, match="cannot replace"):
            registry.set(session)


# -- fork ------------------------------------------------------------------------------------------


def test_a_forked_child_shares_no_socket(postgresql: Any) -> None:
    """A forked child opens its own connections, and its exit does not close those of the parent."""
    db = Database(postgresql.url("psycopg"), pool_size=1, max_overflow=0)

    def backend() -> int:
        with db.session_scope() as session:
            return session.scalar(text("SELECT pg_backend_pid()")) or 0

    mine = backend()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, str(backend()).encode())
            db.dispose()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        theirs = int(pipe.read())
    assert os.waitpid(child, 0)[1] == 0
    assert theirs != mine
    assert backend() == mine
    db.dispose()


WORKERS = """
import multiprocessing
import sys

from sqlalchemy import text

from session_plugin import Database

db = Database(sys.argv[1], pool_size=1, max_overflow=0)
backend = text("SELECT pg_backend_pid()")


def save(name):
    with db.session_scope() as session:
        session.execute(text("INSERT INTO parent (name) VALUES (:name)"), {"name": name})
        return session.scalar(backend)


if __name__ == "__main__":
    with db.session_scope() as session:
        mine = save("before")
        with multiprocessing.get_context(sys.argv[2]).Pool(2) as workers:
            theirs = set(workers.map(save, ["tea", "milk", "honey", "jam"], chunksize=2))
            workers.close()
            workers.join()
        save("after")
        assert session.scalar(backend) == mine and mine not in theirs, (mine, theirs)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_worker_processes(request: pytest.FixtureRequest, tmp_path: Path, method: str) -> None:
    """Worker processes that start during a unit of work use their own units of work and leave the parent's open."""
    store = make_store(request, "postgresql+psycopg")
    program = tmp_path / "workers.py"
    program.write_text(WORKERS)
    command = [sys.executable, "-W", "always::ResourceWarning", str(program), store.url, method]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stderr == ""
    assert sorted(store.names()) == ["after", "before", "honey", "jam", "milk", "tea"]
    assert wait_for(lambda: store.open_transactions() == [])
    store.engine.dispose()


def test_a_forked_child_drops_the_inherited_pool(dispose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked child drops the inherited pool without closing its connections, which the parent still uses."""
    db = dispose(Database("sqlite://"))
    monkeypatch.setattr(forks, "alive", WeakSet([core_of(db)]))  # not the databases of other tests
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
    inherited = db.engine.pool
    forget_inherited_connections()
    assert db.engine.pool is not inherited
    assert inherited.checkedin() == 1
    inherited.dispose()


def test_a_forked_child_forgets_the_event_loop_of_its_parent(dispose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent's event loop, which is still open there, does not keep the child from using its own."""
    db = dispose(AsyncDatabase("sqlite+aiosqlite://"))
    monkeypatch.setattr(forks, "alive", WeakSet([core_of(db)]))

    async def use() -> None:
        async with db.session_scope():
            pass

    parents = asyncio.new_event_loop()
    parents.run_until_complete(use())
    with pytest.raises(ConfigurationError, match="another event loop"):
        asyncio.run(use())
    forget_inherited_connections()
    asyncio.run(use())
    parents.close()


def test_a_process_that_c_code_forked_begins_with_its_first_session(
    dispose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no callback of `os` ran, the first session finds another process id, and drops the inherited pool, once."""
    db = dispose(Database("sqlite://"))
    monkeypatch.setattr(forks, "alive", WeakSet([core_of(db)]))
    monkeypatch.setattr(process, "_calls", [forget_inherited_connections])
    inherited = db.engine.pool
    monkeypatch.setattr(process, "_pid", os.getppid())
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
    childs = db.engine.pool
    assert childs is not inherited
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
    assert db.engine.pool is childs


def test_threads_of_a_forked_child_make_their_first_sessions_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waited while another one did what a new process does, does not do it again."""
    calls: list[str] = []
    monkeypatch.setattr(process, "_calls", [])
    monkeypatch.setattr(process, "_pid", os.getppid())
    process.after_fork_in_child(lambda: calls.append("begin"))

    @contextmanager
    def lock_of_another() -> Iterator[None]:
        monkeypatch.setattr(process, "_checking", threading.Lock())
        process.check_process()  # by the thread that has the lock, while this one waits
        yield

    monkeypatch.setattr(process, "_checking", lock_of_another())
    process.check_process()
    assert calls == ["begin"]


def test_a_fork_beside_a_thread_that_makes_the_first_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that a thread of the parent held is free in the child; what is urgent there comes first."""
    calls: list[str] = []
    for registered in ("_calls", "_calls_at_once"):
        monkeypatch.setattr(process, registered, [])
    process.after_fork_in_child(lambda: calls.append("begin"))
    process.after_fork_in_child(lambda: calls.append("at once"), only_at_once=True)
    parents = threading.Lock()
    monkeypatch.setattr(process, "_checking", parents)
    monkeypatch.setattr(process, "_pid", os.getppid())
    with parents:
        process._forked()
        process.check_process()
        assert not process._checking.locked()
    assert calls == ["at once", "begin"]


def test_a_system_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `os` has no callbacks for forks, as on Windows, none is registered, and nothing fails."""
    registered: list[Any] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **calls: registered.append(calls), raising=False)
    process._register()
    assert registered == [{"after_in_child": process._forked}]
    monkeypatch.delattr(os, "register_at_fork")
    process._register()
    assert len(registered) == 1


def test_pooled_connections_are_closed_at_exit(postgresql: Any) -> None:
    """At the end of a process, the pooled connections of sync databases are closed, so that no driver warns."""
    program = f"""
from sqlalchemy import text
from session_plugin import Database

db = Database({postgresql.url("psycopg")!r})
with db.session_scope() as session:
    session.execute(text("SELECT 1"))
"""
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


def test_engines_that_are_disposed_of_at_exit(dispose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At exit, engines that session_plugin created are disposed of, except those that need an event loop."""
    ours, theirs = dispose(Database("sqlite://")), dispose(Database(create_engine("sqlite://")))
    needs_loop = AsyncDatabase("sqlite+aiosqlite://")
    pools = [db.engine.pool for db in (ours, theirs, needs_loop)]
    monkeypatch.setattr(forks, "alive", WeakSet(map(core_of, (ours, theirs, needs_loop))))
    dispose_at_exit()
    kept = [db.engine.pool is pool for db, pool in zip((ours, theirs, needs_loop), pools, strict=True)]
    assert kept == [False, True, True]


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"pool_size": 3, "max_overflow": 2, "pool_timeout": 7}, (5, 7)),
        ({"pool_size": 3}, (13, 30)),
        ({"max_overflow": -1}, None),
        ({"pool_size": 0}, None),
        ({"poolclass": NullPool}, None),
    ],
)
def test_the_connection_limit_of_a_pool(options: Any, limits: Any) -> None:
    """connection_limit() returns the number of connections of a pool and its timeout, or None if there is no limit."""
    assert connection_limit(create_engine("sqlite:///x", **options), options) == limits


def test_the_overflow_of_a_users_engine_is_not_counted() -> None:
    """The overflow of an engine that the user created is not counted."""
    assert connection_limit(create_engine("sqlite:///x", pool_size=3), None) == (3, 30)


def test_databases_are_collected() -> None:
    """A database that is no longer used is garbage-collected."""
    import weakref

    db = Database("sqlite://")
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
    db.dispose()
    collected = weakref.ref(db)
    del db, session
    gc.collect()
    assert collected() is None


def test_every_engine_is_listened_to() -> None:
    """An engine is listened to even if it has the same id() as an engine that was garbage-collected."""
    for _ in range(200):
        db = Database("sqlite://")
        with db.session_scope() as session:
            session.execute(text("CREATE TABLE t (n INTEGER)"))
            session.execute(text("INSERT INTO t VALUES (1)"))
            assert db.scope.wrote
        db.dispose()
        del db, session
        gc.collect(1)


@pytest.mark.parametrize("through", ["binds", "sessionmaker"])
def test_binds_without_a_default_engine(dispose: Any, through: str) -> None:
    """A database whose entities all have an engine by ``binds`` needs no default engine."""
    first, second = create_engine("sqlite://"), create_engine("sqlite://")
    binds: Any = {Order: first, Report: second}
    db = dispose(Database(binds=binds) if through == "binds" else Database(sessionmaker(binds=binds)))
    with db.session_scope() as session:
        assert [session.get_bind(entity).pool for entity in (Order, Report)] == [first.pool, second.pool]
    with pytest.raises(ConfigurationError, match="No engine is called 'default'; there are none by name"):
        db.engine  # noqa: B018
    first.dispose()
    second.dispose()


def test_the_connection_limit_of_binds_without_a_default_engine() -> None:
    """The semaphore for sync sessions under ASGI then has as many permits as the smallest of their pools."""
    first, second = (create_engine("sqlite:///x", pool_size=size, max_overflow=0) for size in (3, 2))
    db: Any = Database(binds={Order: first, Report: second})
    assert core_of(db).semaphore._capacity == 2


def test_an_association_table_is_created_beside_the_tables_it_refers_to(dispose: Any) -> None:
    """An association table has no class that ``binds`` could name; it is created on the engine of its two sides."""

    class Base(DeclarativeBase):
        pass

    class Left(Base):
        __tablename__ = "left"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Elsewhere(Base):
        __tablename__ = "elsewhere"
        id: Mapped[int] = mapped_column(ForeignKey("left.id"), primary_key=True)

    Table("association", Base.metadata, Column("a", ForeignKey("left.id")), Column("b", ForeignKey("left.id")))
    Table("beside", Base.metadata, Column("a", ForeignKey("elsewhere.id")))
    engines: Any = {"default": "sqlite://", "left": "sqlite://"}
    db = dispose(Database(engines, metadata=Base.metadata, binds={Left: "left"}))
    db.create_all()
    tables = {name: sorted(inspect(engine).get_table_names()) for name, engine in db.engines.items()}
    assert tables == {"default": ["beside", "elsewhere"], "left": ["association", "left"]}


def test_a_session_cannot_be_replaced() -> None:
    """Assigning to ``db.session``, as test fixtures of other libraries do, raises and names `db.isolated()`."""
    for db in (Database("sqlite://"), FlaskPlugin("sqlite://")):
        with pytest.raises(ConfigurationError, match=r"db\.isolated\(\)"):
            db.session = Session()  # type: ignore[assignment]
