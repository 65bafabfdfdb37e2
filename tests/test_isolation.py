"""The promises of `db.isolated()` on each driver; a separate connection checks that no row is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from session_plugin import (
    AsyncDatabase,
    Database,
    IsolationError,
    ReadOnlyError,
    TransactionAbortedError,
    manual,
    read_only,
)
from session_plugin.testing import IsolationWarning
from session_plugin.testing.isolation.isolation import _inherited, leave_to_parent
from session_plugin.testing.isolation.statements import custom_settings
from session_plugin.testing.isolation.turns import Turn, Turns

from .drivers import MARIADB, POSTGRESQL, SQLITE
from .harness import SQLALCHEMY_2_0, Base, Child, Parent, add, add_orphan, insert
from .units import Units, on

SOME = ("sqlite+pysqlite", "sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg", "mariadb+pymysql")
"""One driver of each kind, for tests in which the driver itself makes no difference."""


class Isolated:
    """An isolated database and the test's session; ``see`` runs work in that session."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._block = units.db.isolated()

    def __enter__(self) -> Isolated:
        if self._units.is_async:
            self.session = self._units.runner.run(self._block.__aenter__())
        else:
            self.session = self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._units.is_async:
            self._units.runner.run(self._block.__aexit__(*error))
        else:
            self._block.__exit__(*error)

    def see(self, work: Callable[[Session], Any]) -> Any:
        if self._units.is_async:
            return self._units.runner.run(self.session.run_sync(work))
        return work(self.session)

    def names(self) -> list[str]:
        return self.see(lambda session: sorted(session.scalars(select(Parent.name))))


def nested(units: Units, work: Callable[[Session], Any]) -> Any:
    """Run ``work`` in a separate unit of work inside another one."""
    return await_only(units.arun(work, new=True)) if units.is_async else units.run(work, new=True)


def insert_and_commit(name: str) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        insert(name)(session)
        session.commit()

    return work


def test_committed_work_is_visible_inside_the_block_and_undone_after_it(units: Units) -> None:
    with Isolated(units) as isolated:
        isolated.see(insert_and_commit("arranged"))
        units.run(add("tea"))
        units.run(lambda session: session.add(Parent(name=f"{session.get(Parent, 'tea').name} too")))  # type: ignore[union-attr]
        assert isolated.names() == ["arranged", "tea", "tea too"]
        assert units.store.names() == []
    assert units.store.names() == []
    units.run(add("afterwards"))
    assert units.store.names() == ["afterwards"]


def test_rolled_back_work_is_undone_at_once(units: Units) -> None:
    """A failed unit of work is undone and no other, even where a failed statement aborts the transaction (PostgreSQL).

    An error that leaves the block undoes everything.
    """

    def fail(session: Session) -> None:
        insert("half")(session)
        insert("tea")(session)

    with pytest.raises(ZeroDivisionError), Isolated(units) as isolated:
        units.run(add("tea"))
        with pytest.raises(IntegrityError):
            units.run(fail)
        assert isolated.names() == ["tea"]
        raise ZeroDivisionError
    assert units.store.names() == []


def test_savepoints_of_the_app_still_work(units: Units) -> None:
    def work(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError), session.begin_nested():
            insert("coffee")(session)
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    with Isolated(units) as isolated:
        units.run(work)
        assert isolated.names() == ["tea"]


@on(*POSTGRESQL, *SQLITE)
def test_a_commit_that_would_have_failed_fails(units: Units) -> None:
    """A deferred constraint is checked where the COMMIT would have been, and does not affect the next unit of work."""
    with Isolated(units) as isolated:
        with pytest.raises(IntegrityError):
            units.run(add_orphan)
        with pytest.raises(IntegrityError):
            isolated.see(lambda session: [add_orphan(session), session.commit()])
        isolated.see(lambda session: session.rollback())
        units.run(add("tea"))
        units.run(lambda session: session.add_all([Child(name="child", parent="late"), Parent(name="late")]))
        assert isolated.names() == ["late", "tea"]


@on("sqlite+pysqlite")
def test_sqlite_ignores_violations_that_existed_before(units: Units) -> None:
    with units.store.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql("INSERT INTO child VALUES ('old', 'nobody')")
        connection.commit()
    with Isolated(units):
        units.run(add("tea"))
        with pytest.raises(IntegrityError):
            units.run(add_orphan)


@on(*POSTGRESQL, "sqlite+pysqlite")
def test_deferred_constraints_stay_deferred(units: Units) -> None:
    with Isolated(units):
        units.run(add("first"))

        def late_parent(session: Session) -> None:
            session.add(Child(name="child", parent="late"))
            session.flush()
            session.add(Parent(name="late"))

        units.run(late_parent)


@on(*SOME)
def test_a_phantom_commit_and_a_doomed_one_are_refused(units: Units) -> None:
    def swallow(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(DBAPIError):
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    def commit_doomed(session: Session) -> None:
        insert("doomed")(session)
        units.db.doom("a test")
        session.commit()

    with Isolated(units) as isolated:
        if units.driver.startswith("postgresql"):
            with pytest.raises(TransactionAbortedError):
                units.run(swallow)
        with pytest.raises(TransactionAbortedError):
            units.run(commit_doomed)
        assert isolated.names() == []


@on(*SOME)
def test_hooks_run_after_the_commit(units: Units) -> None:
    log: list[str] = []

    def work(session: Session) -> None:
        units.db.on_commit(lambda: log.append("committed"))
        units.db.on_commit(lambda: (units.arun if units.is_async else units.run)(add("from a hook")))
        units.db.on_rollback(lambda: log.append("rolled back"))
        insert("tea")(session)

    with Isolated(units) as isolated:
        units.run(work)
        with pytest.raises(IntegrityError):
            units.run(work)
        assert isolated.names() == ["from a hook", "tea"]
    assert log == ["committed", "rolled back"]


@on(*SOME)
def test_the_tests_session_is_separate_from_the_apps_sessions(units: Units) -> None:
    """The test's session shares no objects with the app's sessions, and reads again what the app has changed."""
    with Isolated(units) as isolated:
        isolated.see(insert_and_commit("tea"))
        mine = isolated.see(lambda session: session.get(Parent, "tea"))

        def look(session: Session) -> None:
            assert session.get(Parent, "tea") is not mine
            session.execute(text("UPDATE parent SET name = 'coffee'"))

        units.run(look)
        assert isolated.see(lambda session: session.get(Parent, "tea")) is None
        assert isolated.names() == ["coffee"]


@on("sqlite+pysqlite", "postgresql+asyncpg")
def test_the_tests_session_refreshes_objects_that_it_holds(units: Units) -> None:
    """A query and `get()` refresh the objects of the test's session, even where a commit expires nothing."""

    def arrange(session: Session) -> Child:
        session.add_all([Parent(name="old"), Parent(name="new")])
        session.flush()
        session.add(child := Child(name="child", parent="old"))
        session.commit()
        return child

    def move(parent: str) -> None:
        units.run(lambda session: session.execute(text(f"UPDATE child SET parent = '{parent}'")))

    with Isolated(units) as isolated:
        held = isolated.see(arrange)
        move("new")
        assert isolated.see(lambda session: session.scalars(select(Child)).one().parent) == "new"
        move("old")
        assert isolated.see(lambda session: session.get(Child, "child").parent) == "old"  # type: ignore[union-attr]
        assert held.name == "child"


@on("sqlite+pysqlite", "postgresql+asyncpg")
def test_an_object_of_the_tests_session_knows_its_key_when_the_app_has_deleted_it(units: Units) -> None:
    with Isolated(units) as isolated:
        isolated.see(insert_and_commit("tea"))
        tea = isolated.see(lambda session: session.get(Parent, "tea"))
        units.run(lambda session: session.delete(session.get(Parent, tea.name)))
        assert isolated.see(lambda session: session.get(Parent, tea.name)) is None
        assert tea.name == "tea"


@on("sqlite+pysqlite", "postgresql+asyncpg")
def test_the_tests_session_keeps_unflushed_changes(units: Units) -> None:
    def change(session: Session) -> None:
        session.get(Child, "child").parent = "new"  # type: ignore[union-attr]
        assert session.get(Child, "child").parent == "new"  # type: ignore[union-attr]
        session.commit()
        assert session.scalar(select(Child.parent)) == "new"

    with Isolated(units) as isolated:
        parents = [Parent(name="old"), Parent(name="new")]
        isolated.see(lambda session: session.add_all(parents) or session.commit())  # type: ignore[func-returns-value]
        isolated.see(lambda session: session.add(Child(name="child", parent="old")) or session.commit())  # type: ignore[func-returns-value]
        isolated.see(change)


@on(*SOME)
def test_uncommitted_work_of_the_test_raises_isolation_error(units: Units) -> None:
    with Isolated(units) as isolated:
        isolated.see(insert("tea"))
        with pytest.raises(IsolationError, match="uncommitted work"):
            units.run(insert("coffee"))
        isolated.see(lambda session: session.commit())
        units.run(insert("coffee"))
        assert isolated.names() == ["coffee", "tea"]


@on(*SOME)
def test_work_committed_inside_a_reader_that_fails_is_kept(units: Units) -> None:
    """An audit row that is committed inside a request that only reads is kept when the request fails."""

    def refused(session: Session) -> None:
        session.scalars(select(Parent)).all()
        nested(units, add("audit"))
        raise ZeroDivisionError

    with Isolated(units) as isolated:
        with pytest.raises(ZeroDivisionError):
            units.run(refused)
        assert isolated.names() == ["audit"]


@on(*SOME)
def test_undoing_work_that_was_committed_inside_warns(units: Units) -> None:
    def refused(session: Session) -> None:
        insert("tea")(session)
        nested(units, add("audit"))
        raise ZeroDivisionError

    with pytest.warns(IsolationWarning, match="A real database would have kept that"), Isolated(units) as isolated:
        with pytest.raises(ZeroDivisionError):
            units.run(refused)
        assert isolated.names() == []


@on("postgresql+psycopg", "postgresql+asyncpg")
def test_a_reader_whose_statement_failed_cannot_keep_work_committed_inside(units: Units) -> None:
    """A failed statement aborts PostgreSQL's transaction; undoing it also undoes inner committed work, and warns."""

    def refused(session: Session) -> None:
        session.scalars(select(Parent)).all()
        nested(units, add("audit"))
        session.execute(text("SELECT 1/0"))

    with pytest.warns(IsolationWarning), Isolated(units):
        with pytest.raises(DBAPIError):
            units.run(refused)


@on(*SOME)
def test_nested_units_of_work_see_each_others_rows(units: Units) -> None:
    """An outer unit of work continues after inner ones, reads the rows that they wrote, and all of them commit."""

    def outer(session: Session) -> None:
        insert("outer")(session)
        nested(units, lambda inner: [insert("inner")(inner), nested(units, add("innermost"))])
        assert len(session.scalars(select(Parent)).all()) == 3

    with Isolated(units) as isolated:
        units.run(outer)
        assert isolated.names() == ["inner", "innermost", "outer"]


@on("sqlite+pysqlite", "postgresql+asyncpg")
def test_the_outer_session_cannot_write_while_an_inner_one_is_open(units: Units) -> None:
    def outer(session: Session) -> None:
        session.scalars(select(Parent)).all()

        def inner(other: Session) -> None:
            insert("inner")(other)
            session.scalars(select(Parent)).all()
            insert("outer")(session)

        nested(units, inner)

    with Isolated(units) as isolated:
        with pytest.raises(IsolationError, match="the end of the inner transaction would decide about both"):
            units.run(outer)
        assert isolated.names() == []


@on("sqlite+pysqlite", "postgresql+psycopg")
def test_threads_take_turns(units: Units) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                units.run(insert(f"{number}-{turn}"))
        except BaseException as error:
            errors.append(error)

    with Isolated(units) as isolated:
        isolated.names()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(isolated.names()) == 20
    assert units.store.names() == []


@on("sqlite+aiosqlite", "postgresql+asyncpg", "mariadb+asyncmy")
def test_tasks_take_turns(units: Units) -> None:
    """Concurrent tasks run one after another, including those that a unit of work starts with ``new=True``."""

    async def branches() -> None:
        async with units.db.session_scope() as session:
            await session.run_sync(insert("outer"))
            await asyncio.gather(*(units.arun(insert(f"branch {number}"), new=True) for number in range(3)))

    async def crowd() -> None:
        await asyncio.gather(branches(), *(units.arun(insert(f"task {number}")) for number in range(3)))

    with Isolated(units) as isolated:
        units.runner.run(crowd())
        assert len(isolated.names()) == 7


@on("sqlite+aiosqlite")
def test_work_waits_for_the_tasks_inside_it(units: Units) -> None:
    """A unit of work continues, and ends, only after the transaction of a task that it started has ended."""

    async def main() -> None:
        goes_on = asyncio.Event()

        async def inside() -> None:
            async with units.db.session_scope(new=True) as session:
                await session.run_sync(insert("inside"))
                goes_on.set()
                await asyncio.sleep(0.02)

        async with units.db.session_scope() as session:
            await session.run_sync(insert("outer"))
            task = asyncio.create_task(inside())
            await goes_on.wait()
            await session.run_sync(insert("later"))
        goes_on.clear()
        async with units.db.session_scope() as session:
            await session.run_sync(lambda session: session.execute(text("DELETE FROM parent WHERE name = 'inside'")))
            task = asyncio.create_task(inside())
            await goes_on.wait()
        await task

    with Isolated(units) as isolated:
        units.runner.run(main())
        assert isolated.names() == ["inside", "later", "outer"]


SLEEP = {
    "sqlite+aiosqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) "
    "SELECT max(i) FROM n",
    "postgresql+asyncpg": "SELECT pg_sleep(5)",
    "postgresql+psycopg_async": "SELECT pg_sleep(5)",
    "mariadb+asyncmy": "SELECT SLEEP(1)",
}


@on(*SLEEP)
def test_a_task_that_is_cancelled_in_a_statement_is_undone_alone(units: Units) -> None:
    """Cancelling a task in a statement, as a client disconnect does, undoes the work of that task only.

    MariaDB's drivers close the connection instead, so the test's session raises IsolationError.
    """

    async def work(begun: asyncio.Event) -> None:
        async with units.db.session_scope() as session:
            await session.run_sync(insert("half"))
            begun.set()
            await session.execute(text(SLEEP[units.driver]))

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(work(begun))
        await begun.wait()
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Isolated(units) as isolated:
        units.run(add("tea"))
        units.runner.run(main())
        if units.driver.startswith("mariadb"):
            with pytest.raises(IsolationError, match="was lost"):
                isolated.names()
        else:
            assert isolated.names() == ["tea"]


SLOW = {
    "sqlite+aiosqlite": f"({SLEEP['sqlite+aiosqlite']})",
    "postgresql+asyncpg": "(SELECT 'slow' FROM pg_sleep(5))",
}
if SQLALCHEMY_2_0:
    del SLOW["sqlite+aiosqlite"]  # it leaves the cancelled cursor open, so SQLite cannot release a savepoint


@on(*SLOW)
def test_a_flush_that_anyio_cancels_is_undone_alone(units: Units) -> None:
    """anyio's scope cancels the ROLLBACK too; it is repeated before the outer unit of work continues or commits."""

    async def cancelled() -> None:
        with anyio.CancelScope() as scope:
            async with units.db.session_scope(new=True) as session:
                await session.run_sync(insert("half"))
                session.add(Parent(name=text(SLOW[units.driver])))
                asyncio.get_running_loop().call_later(0.01, scope.cancel)
                await session.flush()
        assert scope.cancelled_caught

    async def main() -> None:
        async with units.db.session_scope() as session:
            await session.run_sync(insert("outer"))
            await cancelled()
        await cancelled()

    with Isolated(units) as isolated:
        units.runner.run(main())
        assert isolated.names() == ["outer"]


@contextmanager
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("session_plugin.testing.isolation.turns.LONGEST_WAIT", 0.05)
        yield


@on("sqlite+pysqlite")
def test_a_wait_that_times_out_names_the_open_transaction(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []

    def other() -> None:
        with pytest.raises(IsolationError) as raised:
            units.run(insert("coffee"))
        messages.append(str(raised.value))

    with Isolated(units), short_waits(monkeypatch), units.db.session_scope() as session:
        insert("tea")(session)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"while the transaction of session_scope() at {__file__}" in messages[0]


@on("sqlite+pysqlite")
def test_a_session_cannot_commit_while_a_later_one_is_open(units: Units) -> None:
    with Isolated(units), units.db.sessionmaker() as first, units.db.sessionmaker() as second:
        first.scalars(select(Parent)).all()
        second.scalars(select(Parent)).all()
        with pytest.raises(IsolationError, match=r"a session of db.sessionmaker\(\) cannot go on"):
            first.commit()
        second.commit()


@on("sqlite+pysqlite")
def test_the_tests_session_can_read_inside_an_open_unit_of_work(units: Units) -> None:
    with Isolated(units) as isolated:
        with units.db.session_scope() as session:
            insert("tea")(session)
            assert isolated.names() == ["tea"]
            insert("coffee")(session)
            assert isolated.names() == ["coffee", "tea"]
        assert isolated.names() == ["coffee", "tea"]


@on("sqlite+pysqlite")
def test_asking_for_the_bind_takes_no_turn(units: Units) -> None:
    with Isolated(units) as isolated, units.db.sessionmaker() as asked:
        assert asked.get_bind().dialect.name == "sqlite"
        thread = threading.Thread(target=units.run, args=(insert("tea"),))
        thread.start()
        thread.join()
        assert isolated.names() == ["tea"]


@on(*SOME)
def test_the_engine_itself_is_refused(units: Units) -> None:
    """A connection taken from the engine itself would not see the test's rows, and its writes would be kept."""

    async def connect() -> None:
        async with units.db.engine.connect():
            raise AssertionError

    with Isolated(units):
        units.run(add("tea"))
        with pytest.raises(IsolationError, match="taken from the engine itself"):
            if units.is_async:
                units.runner.run(connect())
            else:
                units.db.engine.connect()


@on(*MARIADB)
def test_ddl_that_commits_is_refused(units: Units) -> None:
    with Isolated(units):
        units.run(add("tea"))
        with pytest.raises(IsolationError, match="commits or ends the transaction"):
            units.run(lambda session: session.execute(text("CREATE TABLE other (id INT)")))
        units.run(lambda session: session.execute(text("CREATE TEMPORARY TABLE other (id INT)")))
    assert units.store.names() == []


@on(*POSTGRESQL, *SQLITE)
def test_ddl_is_undone(units: Units) -> None:
    create = "CREATE TABLE other (id INT)"
    for _ in range(2):
        with Isolated(units):
            units.run(lambda session: session.execute(text(create)))


@on(*SOME)
def test_a_commit_in_sql_is_refused(units: Units) -> None:
    with Isolated(units), pytest.raises(IsolationError, match="commits or ends the transaction"):
        units.run(lambda session: session.execute(text("COMMIT")))


@on(*SOME)
def test_read_only_work_writes_nothing(units: Units) -> None:
    """Under read_only neither the ORM nor SQL can write; the next unit of work can."""

    def write(session: Session) -> None:
        units.db.use(read_only)
        session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    def add_one(session: Session) -> None:
        units.db.use(read_only)
        session.add(Parent(name="tea"))

    with Isolated(units) as isolated:
        with pytest.raises((DBAPIError, ReadOnlyError)):
            units.run(write)
        with pytest.raises(ReadOnlyError):
            units.run(add_one)
        units.run(add("coffee"))
        assert isolated.names() == ["coffee"]


@on("sqlite+pysqlite", "postgresql+asyncpg")
def test_manual_work_commits_by_hand(units: Units) -> None:
    def work(session: Session) -> None:
        units.db.use(manual)
        insert("saved")(session)
        session.commit()
        insert("not saved")(session)

    with Isolated(units) as isolated:
        units.run(work)
        assert isolated.names() == ["saved"]


@on("sqlite+pysqlite", "postgresql+asyncpg")
def test_invalidating_a_session_undoes_its_own_work_only(units: Units) -> None:
    with Isolated(units) as isolated:
        units.run(add("tea"))
        units.run(lambda session: [insert("coffee")(session), session.invalidate()])
        assert isolated.names() == ["tea"]


@on("postgresql+psycopg")
def test_a_lost_connection_raises_isolation_error(units: Units) -> None:
    with Isolated(units) as isolated:
        units.run(add("tea"))
        with pytest.raises(DBAPIError):
            units.run(lambda session: session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())")))
        with pytest.raises(IsolationError, match="was lost"):
            isolated.names()


@on("sqlite+pysqlite", "sqlite+aiosqlite", "postgresql+asyncpg")
def test_an_app_may_dispose_of_its_engine_inside_the_block(units: Units) -> None:
    """If the app disposes of its engine, as a lifespan does, the test's connection stays open until the block ends."""
    closed = []
    with Isolated(units) as isolated:
        units.run(add("tea"))
        event.listen(units.sync_engine, "close_detached", closed.append)
        if units.is_async:
            units.runner.run(units.db.dispose())
        else:
            units.db.dispose()
        assert isolated.names() == ["tea"]
    assert len(closed) == 1


@on("sqlite+pysqlite", "sqlite+aiosqlite")
def test_a_database_cannot_be_isolated_twice(units: Units) -> None:
    with Isolated(units) as isolated:
        with pytest.raises(IsolationError, match="isolated already"), Isolated(units):
            raise AssertionError
        units.run(add("tea"))
        assert isolated.names() == ["tea"]


@on("sqlite+pysqlite")
def test_a_session_from_the_block_refuses_afterwards(units: Units) -> None:
    with Isolated(units) as isolated:
        isolated.names()
    with pytest.raises(IsolationError, match="has ended"):
        isolated.names()


def test_autocommit_is_refused() -> None:
    db = Database(create_engine("sqlite://", isolation_level="AUTOCOMMIT"))
    autocommit = Database(create_engine("sqlite://").execution_options(isolation_level="AUTOCOMMIT"))
    with db.isolated(), autocommit.isolated() as session, pytest.raises(IsolationError, match="AUTOCOMMIT"):
        session.execute(text("SELECT 1"))


def test_a_connection_that_cannot_begin_returns_to_the_pool(tmp_path: Any) -> None:
    """If BEGIN fails on the first engine, or on another one while the first is in use, the connection is returned."""
    names = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")}
    db = Database(names, binds={Child: "other"}, metadata=Base.metadata)
    db.create_all()

    def refuse(connection: Any) -> None:
        raise ZeroDivisionError

    with db.isolated() as session:
        for engine, model in ((db.engines["default"], Parent), (db.engines["other"], Child)):
            event.listen(engine, "begin", refuse)
            with pytest.raises(ZeroDivisionError):
                session.scalars(select(model))
            event.remove(engine, "begin", refuse)
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            assert session.scalars(select(model)).all() == []
    db.dispose()


@on("sqlite+pysqlite")
def test_a_session_can_use_the_connection_of_another_one(units: Units) -> None:
    with Isolated(units) as isolated, units.db.sessionmaker(bind=isolated.session.connection()) as other:
        insert("tea")(other)
        other.commit()
        assert isolated.names() == ["tea"]


def test_several_engines_at_once(tmp_path: Any) -> None:
    """Several engines are isolated together, even with ``twophase=True``, which savepoints do not need."""
    names = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "other")}
    db = Database(names, binds={Child: "other"}, metadata=Base.metadata, twophase=True)
    with db.isolated() as session:
        db.create_all()
        with db.session_scope() as work:
            work.add_all([Parent(name="tea"), Child(name="child", parent="tea")])
        assert (session.scalar(select(Parent.name)), session.scalar(select(Child.name))) == ("tea", "child")
    db.create_all()
    with db.sessionmaker(twophase=False) as session:
        assert (session.scalar(select(Parent.name)), session.scalar(select(Child.name))) == (None, None)
    db.dispose()


def test_a_database_in_memory_keeps_its_tables() -> None:
    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://", metadata=Base.metadata)
        await db.create_all()
        for _ in range(2):
            async with db.isolated() as session:
                await db.create_all()
                async with db.session_scope() as work:
                    work.add(Parent(name="tea"))
                assert (await session.get(Parent, "tea")).name == "tea"  # type: ignore[union-attr]
                await db.drop_all()
        await db.create_all()
        await db.dispose()

    asyncio.run(main())


def test_the_block_restores_the_database(tmp_path: Any) -> None:
    """After the block the Database object and the stored data are as they were before it."""
    db = Database(f"sqlite:///{tmp_path}/test.db", metadata=Base.metadata)
    db.create_all()
    before = db.sessionmaker.class_, vars(db).keys()
    with warnings.catch_warnings(), db.isolated():
        assert db.sessionmaker.class_ is not before[0]
    assert (db.sessionmaker.class_, vars(db).keys()) == before
    with db.engine.connect() as connection:
        assert connection.scalar(select(Parent.name)) is None
    db.dispose()


@on("postgresql+psycopg", "sqlite+pysqlite")
def test_a_forked_process_is_refused(units: Units) -> None:
    """A forked process gets an IsolationError and can leave the block cleanly; the parent keeps the connection."""
    with Isolated(units) as isolated:
        isolated.see(lambda session: [insert("before")(session), session.commit()])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with pytest.raises(IsolationError, match="forked inside"):
                    units.run(add("child"))
                isolated.__exit__(None, None, None)
                gc.collect()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        units.run(add("after"))
        assert isolated.names() == ["after", "before"]
    assert units.store.names() == []


@on("sqlite+pysqlite")
def test_a_forked_process_leaves_the_connection_to_its_parent(units: Units) -> None:
    """A forked process sends nothing on the test's connection, and leaves the transaction open for the parent."""
    block = units.db.isolated()
    session = block.__enter__()
    session.execute(text("SELECT 1"))
    leave_to_parent()
    with pytest.raises(IsolationError, match="forked inside"):
        units.run(add("child"))
    block.__exit__(None, None, None)
    assert units.sync_engine.pool.checkedout() == 1
    session.close()
    for connection in _inherited.pop()._connections.values():
        assert connection.in_transaction()
        connection.close()


def test_only_one_waiter_makes_the_tests_session_step_aside() -> None:
    """A second waiter that arrives while the test's session steps aside does not ask it again."""
    turns, asked = Turns(is_async=False), []

    class OfTheTest:
        _unit_of_work = None

        def step_aside(self, *, wrote: bool) -> None:
            asked.append(turn)
            turns._let_step_aside(turn)

    turn = Turn(OfTheTest())  # type: ignore[arg-type]
    turns._let_step_aside(turn)
    assert asked == [turn]


# -- settings --------------------------------------------------------------------------------------


TENANT = "SELECT current_setting('app.tenant', true)"
SHOW = (TENANT, "SHOW statement_timeout", "SELECT current_user", "SHOW search_path")


def executing(*statements: str, **parameters: Any) -> Callable[[Session], list[Any]]:
    """Return work that executes ``statements``, and returns the first value of each that has one."""

    def work(session: Session) -> list[Any]:
        results = [session.execute(text(statement), parameters) for statement in statements]
        return [result.scalar() or None for result in results if result.returns_rows]

    return work


@pytest.mark.parametrize(
    "setting",
    [
        "SELECT set_config('app.tenant', '1', true)",
        "SELECT set_config('app.tenant', '1', false)",
        "SET app.tenant = '1'",
        "SET /* the tenant */ LOCAL app.tenant = '1'",
        "DO $$ BEGIN PERFORM set_config('app' || '.tenant', '1', true); END $$",
        "SET LOCAL statement_timeout = '5s'",
        "SET LOCAL ROLE pg_monitor",
        "SET LOCAL search_path TO pg_catalog",
    ],
)
@on(*POSTGRESQL)
def test_settings_end_with_their_unit_of_work(units: Units, setting: str) -> None:
    """What a committed unit of work has set is not seen by the next one, nor by one nested in it, as in production."""
    with Isolated(units) as isolated:
        before = units.run(executing(*SHOW))

        def work(session: Session) -> None:
            session.execute(text(setting))
            during = executing(*SHOW)(session)
            assert during != before
            assert nested(units, executing(*SHOW)) == before
            if not setting.startswith("DO"):
                assert executing(*SHOW)(session) == during

        units.run(work)
        assert units.run(executing(*SHOW)) == before
        assert isolated.see(executing(*SHOW)) == before


@on(*POSTGRESQL)
def test_settings_made_by_parameters_and_by_the_connection(units: Units) -> None:
    """A name may be a parameter; what the connection was set up with, and the app has overridden, comes back."""
    set_tenant = "SELECT set_config(:name, :value, true)"

    def set_up(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("SET app.tenant = 'it''s \\'")
        cursor.execute("SET statement_timeout = '7s'")
        cursor.close()
        connection.commit()

    event.listen(units.sync_engine, "connect", set_up)
    with Isolated(units):
        before = units.run(executing(TENANT, "SHOW statement_timeout"))
        assert before == ["it's \\", "7s"]
        units.run(executing("SET LOCAL statement_timeout = 0", set_tenant, name="app.tenant", value="1"))
        assert units.run(executing(TENANT, "SHOW statement_timeout")) == before


@on(*POSTGRESQL)
def test_set_constraints_ends_with_its_unit_of_work(units: Units) -> None:
    def late_parent(session: Session) -> None:
        session.add(Child(name="child", parent="late"))
        session.flush()
        session.add(Parent(name="late"))

    with Isolated(units):
        units.run(executing("SET CONSTRAINTS ALL IMMEDIATE"))
        units.run(late_parent)


@on(*POSTGRESQL)
def test_setting_in_an_aborted_transaction(units: Units) -> None:
    """A statement that would set something in an aborted transaction fails as ever."""

    def work(session: Session) -> None:
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1/0"))
        session.execute(text("SET LOCAL statement_timeout = 0"))

    with Isolated(units), pytest.raises(DBAPIError):
        units.run(work)


@on(*POSTGRESQL)
def test_settings_of_a_reader_that_fails_after_work_inside_it(units: Units) -> None:
    """A unit of work whose rollback keeps what was committed inside it keeps none of its settings."""

    def work(session: Session) -> None:
        executing("SELECT set_config('app.tenant', '1', true)")(session)
        nested(units, insert("kept"))
        raise KeyError

    with Isolated(units) as isolated:
        with pytest.raises(KeyError):
            units.run(work)
        assert (isolated.names(), units.run(executing(TENANT))) == (["kept"], [None])


@on("sqlite+pysqlite", "mariadb+pymysql")
def test_other_databases_keep_the_settings_of_the_connection(units: Units) -> None:
    """Where a setting does not end with the transaction, it stays on the connection, as in production."""
    sqlite = units.driver.startswith("sqlite")
    change, show = ("PRAGMA cache_size = 77", "PRAGMA cache_size") if sqlite else ("SET @tenant = 77", "SELECT @tenant")
    with Isolated(units):
        units.run(executing(change))
        assert units.run(executing(show)) == [77]


@pytest.mark.parametrize(
    "parameters",
    [("app.tenant", 1), ["app.tenant", None], {"name": "App.Tenant"}, [{"name": "app.tenant"}], [("app.tenant",)]],
)
def test_names_of_custom_settings_in_parameters(parameters: Any) -> None:
    """They are found in each way in which drivers take parameters; a long text is none."""
    assert custom_settings("SELECT set_config($1, $2, true)", parameters) == {"app.tenant"}
    assert custom_settings("SELECT set_config($1, $2, true)", ["a.b" * 100]) == set()


# -- what a transaction of MariaDB ends ---------------------------------------------------------------

READ_ONLY_MODES = [
    "SET TRANSACTION READ ONLY",
    "set transaction isolation level read committed, read only",
    "SET @@tx_read_only = 1",
    "SET @@tx_read_only = ON",
]
MODES = [
    *READ_ONLY_MODES,
    "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    "SET TRANSACTION READ WRITE",
    "SET @@tx_isolation = 'SERIALIZABLE'",
]


def error_of(units: Units, *statements: str) -> tuple[Any, ...]:
    """Return the driver's error for ``statements`` in one unit of work, or an empty tuple."""
    try:
        units.run(executing(*statements))
    except DBAPIError as error:
        assert error.orig is not None
        return type(error), error.orig.args
    return ()


@pytest.mark.parametrize("mode", MODES)
@on(*MARIADB)
def test_the_mode_of_a_transaction_ends_with_its_unit_of_work(units: Units, mode: str) -> None:
    """As in production: it may be set at the beginning of each, holds in it, and is not seen by the next one."""
    attempts = [
        (mode, "SET @tenant = 1", mode, "SELECT count(*) FROM parent"),
        (mode, "INSERT INTO parent (name) VALUES ('one')"),
        ("SET @tenant = 2", "INSERT INTO parent (name) VALUES ('two')"),
        ("INSERT INTO parent (name) VALUES ('three')", mode),
        ("SELECT count(*) FROM parent", mode),
        ("SET @tenant = (SELECT count(*) FROM parent)", mode),
        ("SET STATEMENT max_statement_time = 9 FOR SELECT count(*) FROM parent", mode),
        (mode, "INSERT INTO parent (name) VALUES ('four')", "INSERT INTO parent (name) VALUES ('five')"),
    ]
    real = [error_of(units, *attempt) for attempt in attempts]
    names = units.store.names()
    units.store.clear()
    for _ in range(2):
        with Isolated(units) as isolated:
            for attempt, expected in zip(attempts, real, strict=True):
                assert error_of(units, *attempt) == expected, attempt
            assert isolated.names() == names
        assert units.store.names() == []
    assert bool(real[1]) == (mode in READ_ONLY_MODES)
    assert (real[2], [error[1][0] for error in real[3:7]]) == ((), [1568] * 4)


@on("mariadb+pymysql", "mariadb+asyncmy")
def test_the_mode_of_a_unit_of_work_around_another_one(units: Units) -> None:
    """A nested unit of work writes although the one around it is READ ONLY, which stays so."""

    def work(session: Session) -> None:
        session.execute(text("SET TRANSACTION READ ONLY"))
        nested(units, insert("kept"))
        with pytest.raises(DBAPIError, match="READ ONLY transaction"):
            session.execute(text("INSERT INTO parent (name) VALUES ('refused')"))

    with Isolated(units) as isolated:
        units.run(work)
        assert isolated.names() == ["kept"]


@pytest.mark.parametrize(
    "statement",
    [
        "ANALYZE TABLE parent",
        "CHECK TABLE parent",
        "FLUSH STATUS",
        "LOCK TABLE parent READ",
        "OPTIMIZE LOCAL TABLE parent",
        "REPAIR TABLE parent",
        "RESET QUERY CACHE",
        "SET @tenant = 1, autocommit = 1",
        "SET DEFAULT ROLE NONE",
        "set session autocommit=ON",
    ],
)
@on("mariadb+pymysql")
def test_statements_that_commit_are_refused(units: Units, statement: str) -> None:
    """Whatever would commit the work of the test raises instead."""
    with Isolated(units):
        units.run(add("tea"))
        with pytest.raises(IsolationError, match="commits or ends the transaction"):
            units.run(executing(statement))
    assert units.store.names() == []


@on("mariadb+pymysql")
def test_what_the_session_of_mariadb_keeps(units: Units) -> None:
    """User variables, SET SESSION, SET LOCAL and GET_LOCK do not end with a transaction, and stay on the connection."""
    change = executing(
        "SET @tenant = 77", "SET SESSION lock_wait_timeout = 77", "SET LOCAL sort_buffer_size = 131072",
        "SELECT GET_LOCK('shop', 0)", "SET STATEMENT max_statement_time = 9 FOR SELECT 1",
    )  # fmt: skip
    show = executing(
        "SELECT @tenant", "SELECT @@lock_wait_timeout", "SELECT @@sort_buffer_size", "SELECT IS_USED_LOCK('shop') > 0",
        "SELECT @@max_statement_time",
    )  # fmt: skip
    units.run(change)
    real = units.run(show)  # the pool has one connection
    units.run(executing("DO RELEASE_LOCK('shop')", "SET @tenant = NULL"))
    with Isolated(units):
        units.run(change)
        assert units.run(show) == real == [77, 77, 131072, 1, None]
