"""Transactions on SQLite: DDL, savepoints, locks and databases in memory."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolResetState

from session_plugin import (
    AsyncDatabase,
    ConfigurationError,
    Database,
    commit_on_success,
    manual,
    read_only,
    read_only_autocommit,
)
from session_plugin.database.interface import core_of
from session_plugin.engines.backends import sqlite
from session_plugin.flask import SessionPlugin as FlaskSessionPlugin
from session_plugin.scope import ending
from session_plugin.scope.opening import open_unit_of_work

from .harness import Base, Parent, insert


@pytest.fixture
def db(tmp_path: Path) -> Any:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", metadata=Base.metadata, connect_args={"timeout": 5})
    database.create_all()
    yield database
    assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    database.dispose()


def names(db: Any) -> list[str]:
    with db.session_scope() as session:
        return sorted(session.scalars(text("SELECT name FROM parent")))


def test_ddl_rolls_back(db: Any) -> None:
    with pytest.raises(ZeroDivisionError), db.session_scope() as session:
        session.execute(text("CREATE TABLE more (id INTEGER)"))
        _ = 1 / 0
    with db.session_scope() as session, pytest.raises(OperationalError, match="no such table"):
        session.execute(text("SELECT * FROM more"))


def test_a_released_savepoint_does_not_survive_the_rollback(db: Any) -> None:
    with pytest.raises(ZeroDivisionError), db.session_scope() as session:
        with session.begin_nested():
            insert("tea")(session)
        _ = 1 / 0
    assert names(db) == []


def test_the_drivers_default_does_not_roll_back_ddl(tmp_path: Path) -> None:
    """With plain SQLAlchemy a rollback keeps a new table; the tests before this one guard against that."""
    engine = create_engine(f"sqlite:///{tmp_path / 'plain.db'}")
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE more (id INTEGER)"))
        connection.rollback()
        assert connection.scalars(text("SELECT name FROM sqlite_master")).all() == ["more"]
    engine.dispose()


def test_a_raw_connection_still_has_transactions(db: Any) -> None:
    """A raw connection has the driver's implicit transactions, even if a session used it before."""
    _insert(db)
    raw = db.engine.raw_connection()
    raw.cursor().execute("INSERT INTO parent (name) VALUES ('lost')")
    raw.close()
    assert names(db) == ["tea"]


def begins(db: Any) -> list[str]:
    """A list to which each BEGIN is added that is executed from now on."""
    seen: list[str] = []

    @event.listens_for(db.engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("BEGIN"):
            seen.append(statement)

    return seen


@pytest.mark.parametrize(
    ("method", "begin"), [("POST", "BEGIN IMMEDIATE"), ("GET", "BEGIN"), ("HEAD", "BEGIN"), (None, "BEGIN IMMEDIATE")]
)
def test_begin_is_immediate_if_the_unit_of_work_may_write(db: Any, method: str | None, begin: str) -> None:
    seen = begins(db)
    scope = open_unit_of_work(core_of(db), origin="test", method=method)
    scope.session.execute(text("SELECT 1"))
    ending.close(scope)
    assert seen == [begin]


def test_two_writers_wait_for_one_another(db: Any) -> None:
    """Eight threads that read and then write at the same time wait for each other; none fails with a lock error."""
    with db.engine.connect() as connection:
        connection.connection.driver_connection.rollback()
        connection.connection.driver_connection.execute("PRAGMA journal_mode=WAL")
    insert_one = threading.Barrier(8)
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            insert_one.wait()
            with db.session_scope() as session:
                session.scalar(text("SELECT count(*) FROM parent"))
                insert(f"row {number}")(session)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(names(db)) == 8


def test_wal_is_recommended_once(db: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Database(f"sqlite:///{tmp_path / 'other.db'}")
    with caplog.at_level(logging.WARNING, "session_plugin"):
        for _ in range(2):
            with other.session_scope() as session:
                session.execute(text("SELECT 1"))
    assert [record.getMessage().count("journal_mode=WAL") for record in caplog.records] == [1]
    other.dispose()


def test_an_in_memory_url_is_one_database_for_every_thread() -> None:
    db = Database("sqlite:///:memory:", metadata=Base.metadata)
    db.create_all()
    thread = threading.Thread(target=lambda: _insert(db))
    thread.start()
    thread.join()
    assert names(db) == ["tea"]
    db.dispose()
    assert names(db) == ["tea"]  # the data lives as long as the Database
    db.dispose()


def _insert(db: Any) -> None:
    with db.session_scope() as session:
        insert("tea")(session)


def test_two_in_memory_urls_are_two_databases() -> None:
    first, second = (Database("sqlite://", metadata=Base.metadata) for _ in range(2))
    first.create_all()
    second.create_all()
    _insert(first)
    assert (names(first), names(second)) == (["tea"], [])
    first.dispose()
    second.dispose()


def test_an_old_sqlite_raises_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 35, 5))
    with pytest.raises(ConfigurationError, match=r"3\.36 or newer"):
        Database("sqlite://")


def test_the_oldest_supported_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    Database("sqlite://").dispose()


def test_a_url_without_a_database_name_is_kept_on_other_databases() -> None:
    """Only SQLite treats a URL without a database name as a database in memory."""
    assert str(Database("postgresql+psycopg://").engine.url) == "postgresql+psycopg://"


def test_autocommit_has_no_transaction(db: Any) -> None:
    seen = begins(db)
    with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
    assert seen == []
    assert names(db) == ["tea"]


def test_an_engine_that_begins_by_itself_is_left_alone(tmp_path: Path) -> None:
    """An engine that already begins transactions by SQLAlchemy's documented recipe gets no second BEGIN."""
    engine = create_engine(f"sqlite:///{tmp_path / 'own.db'}")

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    db = Database(engine, metadata=Base.metadata)
    Database(engine)  # a second Database on the engine adds no second listener
    db.create_all()
    _insert(db)
    assert names(db) == ["tea"]
    engine.dispose()


def test_a_locked_database_fails_the_statement_and_keeps_the_pool_usable(db: Any, tmp_path: Path) -> None:
    """If BEGIN IMMEDIATE times out, the connection is returned and the next unit of work can use it."""
    impatient = Database(f"sqlite:///{tmp_path / 'test.db'}", connect_args={"timeout": 0.05}, pool_size=1)
    with db.session_scope() as session:
        insert("tea")(session)
        with pytest.raises(OperationalError, match="locked"), impatient.session_scope() as other:
            insert("milk")(other)
    assert impatient.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    with impatient.session_scope() as other:
        insert("milk")(other)
    impatient.dispose()
    assert names(db) == ["milk", "tea"]


def test_deferred_constraints_are_checked_at_commit(db: Any) -> None:
    event.listen(db.engine, "connect", lambda connection, record: connection.execute("PRAGMA foreign_keys=ON"))
    db.dispose()

    def orphan(session: Session) -> None:
        from .harness import Child

        session.add(Child(name="orphan", parent="nobody"))
        session.flush()

    with pytest.raises(IntegrityError), db.session_scope() as session:
        orphan(session)
    with db.session_scope() as session:
        session.add(Parent(name="nobody"))
    assert names(db) == ["nobody"]


def test_a_connection_that_is_only_to_be_terminated_is_left_alone() -> None:
    """Nothing is sent on a connection that can only be terminated.

    An example is one that is garbage-collected outside its event loop.
    """
    state = PoolResetState(transaction_was_reset=False, terminate_only=True, asyncio_safe=False)
    sqlite._reset(None, None, state)


def test_an_engine_with_other_options_is_prepared_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A ``get_bind()`` that calls ``engine.execution_options()`` in each unit of work adds no listener each time."""

    class Tenants(Session):
        engine: Any = None

        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            bind: Any = super().get_bind(*args, **kwargs)
            self.engine = self.engine or bind.execution_options(schema_translate_map={None: "main"})
            return self.engine

    db = Database(f"sqlite:///{tmp_path}/tenants.db", class_=Tenants, metadata=Base.metadata)
    Base.metadata.create_all(db.engine)
    for name in ("tea", "milk"):
        with db.session_scope() as session:
            insert(name)(session)
    assert [record.getMessage().count("journal_mode=WAL") for record in caplog.records] == [1]
    db.dispose()


# -- an engine that the user made --------------------------------------------------------------------


@pytest.fixture
def own_engine(tmp_path: Path) -> Any:
    engine = create_engine(f"sqlite:///{tmp_path / 'own.db'}", connect_args={"timeout": 0.05}, pool_size=1)
    Base.metadata.create_all(engine)
    yield engine
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


def state_of(engine: Any) -> tuple[Any, ...]:
    """How the only connection of ``engine`` behaves by itself, down to what the driver does with DDL."""
    seen: list[str] = []
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        driver.set_trace_callback(seen.append)
        state = driver.isolation_level, getattr(driver, "autocommit", None), driver.in_transaction
        query_only = connection.exec_driver_sql("PRAGMA query_only").scalar()
        connection.exec_driver_sql("SELECT * FROM parent").all()
        connection.exec_driver_sql("CREATE TABLE more (id INTEGER)")
        connection.rollback()
        connection.exec_driver_sql("DROP TABLE more")
        reads = driver.in_transaction
        connection.exec_driver_sql("INSERT INTO parent (name) VALUES ('lost')")
        writes = driver.in_transaction
        connection.rollback()
        connection.exec_driver_sql("DELETE FROM parent WHERE name = 'lost'")  # without a transaction it is not lost
        connection.commit()
        driver.set_trace_callback(None)
    return (*state, query_only, reads, writes, seen)


@pytest.mark.parametrize("isolation_level", ["driver's own", None, "EXCLUSIVE"])
def test_the_users_engine_is_as_before(own_engine: Any, isolation_level: Any) -> None:
    """Outside a unit of work its connections behave as the driver has them, also after units of work used them."""
    if isolation_level != "driver's own":

        def connect(connection: Any, record: Any) -> None:
            connection.isolation_level = isolation_level

        event.listen(own_engine, "connect", connect)
        own_engine.dispose()
    before = state_of(own_engine)
    db = Database(own_engine, metadata=Base.metadata)
    assert state_of(own_engine) == before
    for number, policy in enumerate([commit_on_success, read_only, manual]):
        with db.session_scope() as session:
            db.use(policy)
            if policy is not read_only:
                insert(f"row {number}")(session)
            session.execute(text("SELECT 1"))
        assert state_of(own_engine) == before, policy
    with pytest.raises(ZeroDivisionError), db.session_scope() as session:
        session.execute(text("CREATE TABLE lost (id INTEGER)"))
        _ = 1 / 0
    assert state_of(own_engine) == before
    assert names(db) == ["row 0"]


@pytest.mark.parametrize(
    ("method", "policy", "begin"),
    [("POST", commit_on_success, "BEGIN IMMEDIATE"), ("GET", commit_on_success, "BEGIN"), ("GET", read_only, "BEGIN")],
)
def test_a_unit_of_work_begins_on_the_users_engine(own_engine: Any, method: str, policy: Any, begin: str) -> None:
    """As on an engine that was made here; DDL and savepoints roll back."""
    db = Database(own_engine)
    seen = begins(db)
    scope = open_unit_of_work(core_of(db), origin="test", method=method)
    scope.use(policy)
    scope.session.execute(text("SELECT 1"))
    ending.close(scope)
    assert seen == [begin]


@pytest.mark.parametrize("open_session", [lambda db: Session(db.engine), lambda db: db.sessionmaker()])
def test_a_session_of_the_users_engine_holds_no_lock(own_engine: Any, open_session: Any) -> None:
    """A session that never passes through us and stays open keeps nobody from writing."""
    db = Database(own_engine)
    other = create_engine(own_engine.url, connect_args={"timeout": 0})
    with open_session(db) as session:
        assert session.scalars(select(Parent)).all() == []
        with other.begin() as connection:
            connection.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
        assert session.scalar(text("SELECT name FROM parent")) == "tea"
    other.dispose()


def test_a_raw_connection_of_the_users_engine_is_reset_as_its_pool_says(tmp_path: Path) -> None:
    """A pool that commits when a connection comes back keeps doing so."""
    engine = create_engine(f"sqlite:///{tmp_path / 'own.db'}", pool_reset_on_return="commit", pool_size=1)
    db = Database(engine, metadata=Base.metadata)
    db.create_all()
    _insert(db)
    raw = engine.raw_connection()
    raw.cursor().execute("INSERT INTO parent (name) VALUES ('milk')")
    raw.close()
    assert names(db) == ["milk", "tea"]
    engine.dispose()


def test_wal_is_recommended_for_the_users_engine(own_engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Once, by the first unit of work; a connection outside one sends nothing for that."""
    db = Database(own_engine)
    with own_engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
    assert caplog.records == []
    names(db)
    names(db)
    assert [record.getMessage().count("journal_mode=WAL") for record in caplog.records] == [1]


# -- a second connection to the file, in one unit of work --------------------------------------------

WAITS_FOR_ITSELF = "is open on the same file, and this code runs inside it"


def notes_of(error: BaseException) -> list[str]:
    return [note for note in getattr(error, "__notes__", []) if WAITS_FOR_ITSELF in note]


@pytest.fixture
def impatient(tmp_path: Path) -> Any:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}", connect_args={"timeout": 0}, metadata=Base.metadata)
    database.create_all()
    yield database
    database.dispose()


def test_a_second_engine_waits_for_its_own_unit_of_work(impatient: Any, tmp_path: Path) -> None:
    """The error of an audit log with an engine that nobody has given to us names the unit of work around it."""
    for path in (f"{tmp_path}/test.db", f"{tmp_path}/../{tmp_path.name}/test.db", f"file:{tmp_path}/test.db?uri=true"):
        audit = create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
        with impatient.session_scope() as session:
            insert("tea")(session)
            around = repr(impatient._unit_of_work())
            with pytest.raises(OperationalError, match="locked") as caught, audit.begin() as connection:
                connection.execute(text("INSERT INTO parent (name) VALUES ('audit')"))
            impatient.doom("a test")
        [note] = notes_of(caught.value)
        assert around in note
        audit.dispose()


def test_a_new_unit_of_work_waits_for_the_one_around_it(impatient: Any) -> None:
    """`session_scope(new=True)` on the same database names the outer one, as does one that is further out."""
    with impatient.session_scope() as session:
        insert("tea")(session)
        around = repr(impatient._unit_of_work())
        with pytest.raises(OperationalError) as caught, impatient.session_scope(new=True) as other:
            insert("milk")(other)
        assert around in notes_of(caught.value)[0]
        memory = Database("sqlite://")
        with (
            pytest.raises(OperationalError) as caught,
            memory.session_scope() as unrelated,
            impatient.session_scope(new=True) as other,
        ):
            unrelated.execute(text("SELECT 1"))
            insert("milk")(other)
        assert around in notes_of(caught.value)[0]
        memory.dispose()


def test_an_async_unit_of_work_waits_for_itself(tmp_path: Path) -> None:
    """The same on aiosqlite."""
    db = AsyncDatabase(
        f"sqlite+aiosqlite:///{tmp_path / 'test.db'}", connect_args={"timeout": 0}, metadata=Base.metadata
    )

    async def scenario() -> None:
        await db.create_all()
        async with db.session_scope() as session:
            await session.run_sync(insert("tea"))
            around = repr(db._unit_of_work())
            with pytest.raises(OperationalError) as caught:
                async with db.session_scope(new=True) as other:
                    await other.run_sync(insert("milk"))
            assert around in notes_of(caught.value)[0]
        await db.dispose()

    asyncio.run(scenario())


def test_whoever_waits_for_others_gets_no_note(impatient: Any, own_engine: Any, tmp_path: Path) -> None:
    """Another thread's transaction, another file, no transaction any more, and another error are not its own lock."""

    def refused(statement: str = "INSERT INTO parent (name) VALUES ('audit')", engine: Any = None) -> list[str]:
        with pytest.raises(OperationalError) as caught, (engine or impatient.engine).begin() as connection:
            connection.exec_driver_sql(statement)
        return notes_of(caught.value)

    with impatient.session_scope() as session:
        insert("tea")(session)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(refused()))
        thread.start()
        thread.join()
        assert found == [[]]
        assert refused("SELECT * FROM nothing") == []
        raw = create_engine("sqlite://", creator=lambda: sqlite3.connect(tmp_path / "test.db", timeout=0))
        assert refused(engine=raw) == []  # it is not known which file that is
        raw.dispose()
    holder = sqlite3.connect(own_engine.url.database)
    holder.execute("BEGIN IMMEDIATE")
    with impatient.session_scope() as session:
        insert("milk")(session)
        assert refused(engine=own_engine) == []
        impatient.session.commit()
    holder.close()
    holder = sqlite3.connect(tmp_path / "test.db")
    holder.execute("BEGIN IMMEDIATE")
    with impatient.session_scope() as session:
        impatient.use(read_only_autocommit)
        session.execute(text("SELECT 1")).all()
        assert refused() == []
    with impatient.session_scope() as session:
        assert refused() == []  # it has no transaction
        inherited = contextvars.copy_context()
    assert inherited.run(refused) == []  # it has ended
    holder.close()


def test_a_request_waits_for_itself(impatient: Any) -> None:
    """The error that a web request's error handlers and log get names the request."""
    app = Flask(__name__)
    db = FlaskSessionPlugin(impatient)
    db.init_app(app)
    caught: list[BaseException] = []

    @app.errorhandler(OperationalError)
    def locked(error: OperationalError) -> Any:
        caught.append(error)
        return "locked", 503

    @app.post("/orders")
    def order() -> str:
        insert("tea")(db.session)
        with db.session_scope(new=True) as audit:
            insert("audit")(audit)
        return "done"

    assert app.test_client().post("/orders").status_code == 503
    assert "POST /orders" in notes_of(caught[0])[0]
    assert names(impatient) == []
