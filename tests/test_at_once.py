"""Two threads or tasks use one session while one of them ends its transaction: both get `ConcurrentUseError`."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sqlite3 import ProgrammingError
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.orm import Session

from session_plugin import ConcurrentUseError, Database, Policy, ScopeClosedError, commit_on_success, read_only
from session_plugin.engines import guard

from .conftest import make_store
from .drivers import SYNC
from .harness import Parent, insert
from .units import Units, on

POOL_OF_ONE: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 3}
OTHERS = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "flush": lambda session: (session.add(Parent(name="other")), session.flush()),
    "connection": lambda session: session.connection(),
    "begin": lambda session: session.begin_nested(),
}


@pytest.mark.parametrize("other", OTHERS)
@on("sqlite+pysqlite")
def test_a_session_that_another_thread_commits(units: Units, other: str) -> None:
    """SQLAlchemy's sentence about the state of the session is the cause."""
    raised: list[BaseException | None] = []

    def work(session: Session) -> None:
        insert("first")(session)

        def beside(committing: Session) -> None:
            with ThreadPoolExecutor(1) as elsewhere:
                raised.append(elsewhere.submit(OTHERS[other], session).exception())

        event.listen(session, "after_commit", beside, once=True)
        session.commit()
        session.expunge_all()

    units.run(work)
    assert isinstance(raised[0], ConcurrentUseError)
    assert "session_scope(new=True)" in str(raised[0])
    if other != "execute":
        assert isinstance(raised[0].__cause__, InvalidRequestError)
    assert units.store.names() == ["first"]


@pytest.mark.parametrize("misuse", ["connection", "begin", "flush"])
@on("sqlite+pysqlite")
def test_misuse_by_the_same_thread_has_sqlalchemys_error(units: Units, misuse: str) -> None:
    """Nobody else is there."""

    def work(session: Session) -> None:
        insert("first")(session)

        def inside(committing: Session) -> None:
            with pytest.raises(InvalidRequestError) as caught:
                OTHERS[misuse](session)
            assert not isinstance(caught.value, ConcurrentUseError)

        event.listen(session, "after_commit", inside, once=True)
        session.commit()
        session.expunge_all()

    units.run(work)
    assert units.store.names() == ["first"]


SLEEP = {"postgresql": "SELECT 1 FROM pg_sleep(0.3)", "mariadb": "SELECT SLEEP(0.3)"}


class Beside:
    """A task or a thread that has joined the unit of work and executes a slow statement."""

    def __init__(self, units: Units, work: Callable[[Session], Any]) -> None:
        self.units = units
        self.work = work

    async def astart(self) -> None:
        async def task() -> None:
            async with self.units.db.session_scope() as session:
                await session.run_sync(self.work)

        self.task = asyncio.create_task(task())
        while not self.units.db._unit_of_work().transaction.busy:
            assert not self.task.done()
            await asyncio.sleep(0)

    def start(self, session: Session) -> None:
        self.raised: list[BaseException] = []

        def thread() -> None:
            try:
                self.work(session)
            except Exception as error:
                self.raised.append(error)

        self.thread = threading.Thread(target=thread)
        self.thread.start()
        while not self.units.db._unit_of_work().transaction.busy:
            assert self.thread.is_alive()

    async def aerror(self) -> BaseException | None:
        await asyncio.wait([self.task], timeout=20)
        return self.task.exception()


def commit_beside(units: Units, work: Callable[[Session], Any]) -> BaseException | None:
    """Do ``work`` in a task or a thread, commit meanwhile, and return the error of ``work``."""

    async def amain() -> BaseException | None:
        with pytest.raises(ConcurrentUseError):
            async with units.db.session_scope() as session:
                await session.run_sync(insert("lost"))
                beside = Beside(units, work)
                await beside.astart()
                await session.commit()
        return await beside.aerror()

    def main() -> BaseException | None:
        with pytest.raises(ConcurrentUseError):
            with units.db.session_scope() as session:
                insert("lost")(session)
                beside = Beside(units, work)
                beside.start(session)
                session.commit()
        beside.thread.join(20)
        return beside.raised[0] if beside.raised else None

    return units.runner.run(amain()) if units.is_async else main()


SERVERS = on("postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg", "mariadb+asyncmy")


@SERVERS
def test_statements_after_a_refused_commit(units: Units) -> None:
    """The COMMIT is refused beside a statement, and so is the next statement beside the ROLLBACK."""

    def work(session: Session) -> None:
        for _ in range(50):
            session.execute(text(SLEEP[units.store.backend]))

    error = commit_beside(units, work)
    assert isinstance(error, ConcurrentUseError | ScopeClosedError)
    assert units.store.names() == []


@on("postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg")
def test_a_statement_that_is_not_waited_for_any_longer(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is discarded, and the driver's error about that is the cause."""
    monkeypatch.setattr(guard, "LONGEST_WAIT", 0.05)
    error = commit_beside(units, lambda session: session.execute(text(SLEEP[units.store.backend])))
    assert isinstance(error, ConcurrentUseError)
    assert units.store.names() == []


@on("postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg")
def test_a_commit_while_rows_are_fetched(units: Units) -> None:
    """A streamed result asks the server for rows: that is a statement too, and the connection stays usable."""

    def work(session: Session) -> None:
        rows = text("SELECT i, pg_sleep(0.05) FROM generate_series(1, 60) i")
        for _ in session.execute(rows, execution_options={"yield_per": 1}):
            pass

    error = commit_beside(units, work)
    assert isinstance(error, InvalidRequestError)
    for _ in range(3):
        assert units.run(lambda session: session.scalar(text("SELECT 42"))) == 42


@on("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg_async", "mariadb+asyncmy")
def test_statements_beside_a_rollback(units: Units) -> None:
    """None begins on a connection that is on its way back to the pool."""

    async def main() -> None:
        async def loop() -> None:
            async with units.db.session_scope() as session:
                await session.run_sync(insert("lost"))
                while True:
                    begun.set()
                    await session.execute(text("SELECT 1"))

        begun = asyncio.Event()
        async with units.db.session_scope() as session:
            task = asyncio.create_task(loop())
            await begun.wait()
            await session.rollback()
            await asyncio.wait([task], timeout=20)
        assert isinstance(task.exception(), ConcurrentUseError)

    units.runner.run(main())
    assert units.store.names() == []


def one_after_the_other(units: Units, *works: Callable[[Session], Any]) -> None:
    """Do the ``works`` in one unit of work, each in a thread or a task of its own."""

    async def amain() -> None:
        async with units.db.session_scope() as session:
            for work in works:
                await asyncio.create_task(session.run_sync(work))

    def main() -> None:
        with units.db.session_scope() as session:
            threads = [ThreadPoolExecutor(1) for _ in works]  # all of them live: no two have the same identity
            for thread, work in zip(threads, works, strict=True):
                thread.submit(work, session).result()
            for thread in threads:
                thread.shutdown()

    units.runner.run(amain()) if units.is_async else main()


ONE_AFTER_THE_OTHER = on("sqlite+pysqlite", "postgresql+psycopg", "postgresql+asyncpg", "mariadb+asyncmy")


@pytest.mark.parametrize("other", OTHERS)
@ONE_AFTER_THE_OTHER
def test_a_session_whose_flush_has_failed_in_another_thread(units: Units, other: str) -> None:
    """Nobody else uses it: SQLAlchemy's own error says what to do."""

    def fail(session: Session) -> None:
        session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
        with pytest.raises(IntegrityError):
            insert("tea")(session)

    def use(session: Session) -> None:
        with pytest.raises(PendingRollbackError):
            OTHERS[other](session)
        session.expunge_all()

    one_after_the_other(units, fail, use, lambda session: session.rollback(), insert("milk"))
    assert units.store.names() == ["milk"]


@pytest.mark.parametrize("driver", ["postgresql+psycopg2", "postgresql+asyncpg", "mariadb+pymysql", "mariadb+asyncmy"])
def test_the_second_phase_in_another_thread(driver: str, request: pytest.FixtureRequest) -> None:
    """A thread or a task has called ``prepare()``, and the end of the unit of work commits."""
    units = Units(driver, make_store(request, driver), twophase=True)
    one_after_the_other(units, insert("tea"), lambda session: session.prepare())
    assert units.store.names() == ["tea"]
    units.close()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_connection_that_a_session_has_just_given_back(tmp_path: Path, end: str) -> None:
    """Another thread may use it, although the session is still giving another one back."""
    db = Database({name: f"sqlite:///{tmp_path / name}" for name in ("first", "second")}, binds={}, **POOL_OF_ONE)
    served: list[str] = []

    def use(name: str) -> None:
        with db.engines[name].connect() as connection:
            connection.execute(text("CREATE TABLE t (i INTEGER)"))
            connection.rollback()
        served.append(name)

    def checked_in(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        with ThreadPoolExecutor(1) as elsewhere:
            for name in db.engines:
                if not db.engines[name].pool.checkedout():
                    elsewhere.submit(use, name).result()

    with db.session_scope() as session:
        for engine in db.engines.values():
            session.execute(text("SELECT 1"), bind_arguments={"bind": engine})
        for engine in db.engines.values():
            event.listen(engine, "checkin", checked_in)
        getattr(session, end)()
    assert len(served) == 1
    db.dispose()


@on("sqlite+pysqlite", "postgresql+psycopg", "postgresql+asyncpg", "mariadb+asyncmy")
def test_work_after_a_commit_of_the_connection_itself(units: Units) -> None:
    """SQLAlchemy refuses to commit what follows, so the unit of work is no success."""

    def work(session: Session) -> None:
        insert("committed")(session)
        session.connection().commit()
        session.scalar(text("SELECT 1"))
        insert("lost")(session)

    with pytest.raises(InvalidRequestError, match="inactive"):
        units.run(work)
    assert units.store.names() == ["committed"]


def test_what_a_guard_refuses() -> None:
    """Beside a call of another thread nothing is fetched and no cursor closed; an error of a discarded one is named."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection, ThreadPoolExecutor(1) as elsewhere:
        mine = guard.ConnectionGuard(connection, {}, lambda: None)
        pooled: Any = connection.connection
        cursor = connection.connection.cursor()
        mine.execute(pooled, lambda *call: cursor.execute("VALUES (1), (2)"), cursor, "VALUES (1), (2)")
        guarded = guard._GuardedCursor(cursor, mine)
        begun, gate = threading.Event(), threading.Event()

        def hold() -> bool:
            begun.set()
            return gate.wait(10)

        held = elsewhere.submit(mine.alone, hold)
        assert begun.wait(10)
        guarded.close()
        with pytest.raises(ConcurrentUseError):
            guarded.fetchall()
        with pytest.raises(ConcurrentUseError):
            mine.execute(pooled, lambda *call: None, cursor, "SELECT 1")
        gate.set()
        assert held.result()
        assert (guarded.fetchone(), guarded.fetchall()) == ((1,), [(2,)])
        guarded.close()
        with pytest.raises(ProgrammingError):
            guarded.fetchone()
        mine.left = True
        with pytest.raises(ConcurrentUseError) as caught:
            guarded.fetchone()
        assert isinstance(caught.value.__cause__, ProgrammingError)
        with pytest.raises(ConcurrentUseError):
            mine.execute(pooled, lambda *call: None, cursor, "SELECT 1")
        mine.release()
    engine.dispose()


@on(*SYNC)
@pytest.mark.parametrize("policy", [commit_on_success, read_only])
def test_the_next_owner_of_a_connection(units: Units, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool hands a connection on before the session that had it has left it; the next one is no second user."""
    kept: list[guard.ConnectionGuard] = []
    monkeypatch.setattr(guard.ConnectionGuard, "release", lambda self: kept.append(self))

    def read(session: Session) -> Any:
        units.db.use(policy)
        return session.scalar(text("SELECT 1"))

    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(units.run, read).result() == 1
    with units.sync_engine.begin() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    kept[0].doomed = "it is another one's"
    with units.sync_engine.begin() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    assert units.run(read) == 1
    assert len(kept) == 2
