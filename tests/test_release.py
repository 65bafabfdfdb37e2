"""``db.release()``: the connection goes back in the middle of a unit of work, unless something would be lost."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import event, insert, inspect, select, text
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.orm import Session, SessionTransaction

from session_plugin import ConcurrentUseError, Database, NoScopeError, ReleaseError, ScopeClosedError, read_only
from session_plugin.database.interface import core_of
from session_plugin.fastapi import SessionPlugin
from session_plugin.scope.permits import _end_loan

from .drivers import ASYNC, MARIADB, POSTGRESQL, SYNC
from .harness import Parent, add, count, release
from .library import Author, Book, Library
from .units import Units, on


def checked_out(units: Units) -> int:
    number: int = units.sync_engine.pool.checkedout()
    return number


def test_the_connection_is_back_and_the_next_statement_takes_another_one(units: Units) -> None:
    """What was loaded stays readable meanwhile, and the work goes on."""
    units.run(add("tea"))

    def work(session: Session) -> None:
        tea = session.get_one(Parent, "tea")
        assert checked_out(units) == 1
        release(units.db)
        assert checked_out(units) == 0
        assert tea.name == "tea"
        assert session.get(Parent, "tea") is tea
        assert checked_out(units) == 0  # it was not expired
        assert count(session) == 1
        assert checked_out(units) == 1
        tea.name = "green tea"

    units.run(work)
    assert units.store.names() == ["green tea"]


def test_without_a_connection_nothing_happens(units: Units) -> None:
    """A function may release whatever was done before it, and twice."""

    def work(session: Session) -> None:
        release(units.db)
        session.get(Parent, "tea")
        release(units.db)
        release(units.db)
        assert checked_out(units) == 0

    units.run(work)


def test_hooks_wait_for_the_decision(units: Units) -> None:
    """Of either kind: giving a connection back ends no unit of work."""
    called: list[str] = []

    def work(session: Session) -> None:
        count(session)
        units.db.on_commit(called.append, "committed")
        units.db.on_rollback(called.append, "rolled back")
        release(units.db)
        assert called == []
        count(session)
        release(units.db)

    units.run(work)
    assert called == ["committed"]
    called.clear()

    def fails(session: Session) -> None:
        work(session)
        raise KeyError

    with pytest.raises(KeyError):
        units.run(fails)
    assert called == ["rolled back"]


def test_a_rollback_after_it(units: Units) -> None:
    """It is one of the whole unit of work so far: its rows are read anew, and its hooks learn of it."""
    units.run(add("tea"))
    called: list[str] = []

    def work(session: Session) -> Session:
        tea = session.get_one(Parent, "tea")
        units.db.on_commit(called.append, "committed")
        units.db.on_rollback(called.append, "rolled back")
        release(units.db)
        session.rollback()
        assert inspect(tea).expired
        assert called == ["rolled back"]
        session.rollback()
        units.db.on_commit(called.append, "later")
        count(session)
        release(units.db)
        return session

    units.run(work).rollback()
    assert called == ["rolled back", "later"]


def test_a_doomed_unit_of_work_stays_doomed(units: Units) -> None:
    """Its later transactions are doomed too."""

    def work(session: Session) -> None:
        count(session)
        units.db.doom("dry run")
        release(units.db)
        session.add(Parent(name="tea"))

    units.run(work)
    assert units.store.names() == []


def lock_row(session: Session) -> None:
    session.execute(select(Parent).with_for_update()).all()


REFUSED: dict[str, tuple[Callable[[Session], Any], str]] = {
    "a new object": (add("tea"), "were not flushed"),
    "a changed object": (lambda session: setattr(session.get_one(Parent, "old"), "name", "new"), "were not flushed"),
    "a deleted object": (lambda session: session.delete(session.get_one(Parent, "old")), "were not flushed"),
    "a flushed object": (lambda session: (add("tea")(session), session.flush()), "may have written"),
    "Core": (lambda session: session.execute(insert(Parent).values(name="tea")), "may have written"),
    "SQL": (lambda session: session.execute(text("INSERT INTO parent (name) VALUES ('tea')")), "may have written"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_work_that_would_be_lost(units: Units, what: str) -> None:
    """It is refused, and the unit of work commits as if nothing had happened."""
    prepare, reason = REFUSED[what]
    units.run(add("old"))

    def work(session: Session) -> None:
        prepare(session)
        with pytest.raises(ReleaseError, match=reason):
            release(units.db)

    units.run(work)
    names = units.store.names()
    assert names == {"a changed object": ["new"], "a deleted object": []}.get(what, names)
    assert ("tea" in names) == (what not in ("a changed object", "a deleted object"))


@on(*POSTGRESQL, *MARIADB)
def test_locks(units: Units) -> None:
    """A locked row would be free before the unit of work that relies on it has ended."""
    units.run(add("tea"))

    def work(session: Session) -> None:
        lock_row(session)
        with pytest.raises(ReleaseError, match="holds a lock or a setting"):
            release(units.db)

    units.run(work)


def test_a_savepoint_in_sql(units: Units) -> None:
    """The session knows nothing of it."""

    def work(session: Session) -> None:
        session.execute(text("SAVEPOINT a"))
        with pytest.raises(ReleaseError):
            release(units.db)
        session.execute(text("ROLLBACK TO SAVEPOINT a"))

    units.run(work)


@on(*POSTGRESQL)
@pytest.mark.parametrize("later", [False, True])
def test_options_of_the_connection(units: Units, later: bool) -> None:
    """An isolation level or a schema that the app has chosen for this transaction would be another one in the next."""
    options = {"isolation_level": "SERIALIZABLE"} if not later else {"schema_translate_map": {None: "tenant"}}

    def work(session: Session) -> None:
        if later:
            session.connection().execution_options(**options)
        else:
            session.connection(execution_options=options)
        with pytest.raises(ReleaseError, match="a lock or a setting"):
            release(units.db)

    units.run(work)


@on(*POSTGRESQL)
@pytest.mark.parametrize(
    "statement",
    [
        "SET LOCAL app.tenant = 'me'",
        "SELECT set_config('app.tenant', 'me', true)",
        "SET CONSTRAINTS ALL IMMEDIATE",
        "SELECT pg_advisory_xact_lock(1)",
        "LOCK TABLE parent",
    ],
)
def test_settings_and_other_locks(units: Units, statement: str) -> None:
    """They end with the transaction: what follows would be done by nobody."""

    def work(session: Session) -> None:
        session.execute(text(statement))
        with pytest.raises(ReleaseError):
            release(units.db)

    units.run(work)


def test_a_savepoint(units: Units) -> None:
    """It is a part of a transaction that goes on."""

    def work(session: Session) -> None:
        with session.begin_nested():
            count(session)
            with pytest.raises(ReleaseError, match="a savepoint is open"):
                release(units.db)
        release(units.db)

    units.run(work)


def test_a_transaction_that_the_app_has_begun(units: Units) -> None:
    """SQLAlchemy would refuse every statement in the rest of its block."""

    def work(session: Session) -> None:
        with session.begin():
            count(session)
            with pytest.raises(ReleaseError, match=r"session.begin\(\) is open"):
                release(units.db)
            count(session)
        count(session)
        release(units.db)

    units.run(work)


def test_a_result_that_is_being_read(units: Units) -> None:
    """Its rows come from the connection."""
    units.run(lambda session: session.add_all([Parent(name=str(number)) for number in range(10)]))

    def work(session: Session) -> None:
        rows = session.execute(select(Parent.name), execution_options={"yield_per": 2})
        next(rows)
        with pytest.raises(ReleaseError, match="a result has not been read to its end"):
            release(units.db)
        assert len(rows.all()) == 9
        release(units.db)

    units.run(work)


def test_in_a_loop_over_rows(units: Units) -> None:
    """The rows of an ORM query are all there with the first one, and the loop goes on."""
    units.run(lambda session: session.add_all([Parent(name=str(number)) for number in range(5)]))

    def work(session: Session) -> None:
        seen = []
        for parent in session.scalars(select(Parent).order_by(Parent.name)):
            release(units.db)
            seen.append(parent.name)
        for name in session.execute(select(Parent.name)).all():
            release(units.db)
            seen.append(name[0])
        assert len(seen) == 10

    units.run(work)


def raw_insert(session: Session) -> None:
    cursor = session.connection().connection.cursor()
    cursor.execute("INSERT INTO parent (name) VALUES ('raw')")
    cursor.close()


def test_raw_cursors(units: Units) -> None:
    """The driver or the server is asked; on MariaDB, which cannot say, the connection is kept to be safe."""

    def reads(session: Session) -> None:
        session.connection()
        if units.driver in MARIADB:
            with pytest.raises(ReleaseError, match="it cannot be seen what raw cursors have written"):
                release(units.db)
        else:
            release(units.db)
            assert checked_out(units) == 0

    def writes(session: Session) -> None:
        raw_insert(session)
        with pytest.raises(ReleaseError):
            release(units.db)

    units.run(reads)
    units.run(writes)
    assert units.store.names() == ["raw"]


@on(*POSTGRESQL)
def test_an_aborted_transaction(units: Units) -> None:
    """It has written nothing, and a new one begins."""

    def work(session: Session) -> None:
        with pytest.raises(Exception, match="nowhere"):
            session.execute(text("SELECT * FROM nowhere"))
        release(units.db)
        session.add(Parent(name="tea"))

    units.run(work)
    assert units.store.names() == ["tea"]


def test_a_flush_that_failed(units: Units) -> None:
    """The session needs a rollback() anyway."""
    units.run(add("tea"))

    def work(session: Session) -> None:
        session.add(Parent(name="tea"))
        with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
            session.flush()
        with pytest.raises(ReleaseError):
            release(units.db)
        session.rollback()
        release(units.db)

    units.run(work)


def test_a_flush_that_failed_before_its_first_statement(units: Units) -> None:
    """Nothing was written, and still the session is not usable before a rollback()."""

    def work(session: Session) -> None:
        count(session)
        event.listen(session, "before_flush", fail, once=True)
        session.add(Parent(name="tea"))
        with pytest.raises(ZeroDivisionError):
            session.flush()
        session.expunge_all()
        session.rollback()
        release(units.db)

    units.run(work)


def test_a_flush_that_failed_without_a_statement(units: Units) -> None:
    """SQLAlchemy refuses everything until the rollback(), and so does release()."""

    def work(session: Session) -> None:
        session.add(Parent(name="tea"))
        event.listen(Parent, "before_insert", fail)
        try:
            with pytest.raises(ZeroDivisionError):
                session.flush()
        finally:
            event.remove(Parent, "before_insert", fail)
        session.expunge_all()
        with pytest.raises(ReleaseError, match="a flush has failed"):
            release(units.db)
        session.rollback()
        release(units.db)

    units.run(work)


@on(*SYNC)
def test_in_the_middle_of_a_commit(units: Units) -> None:
    """A listener is too early for it, and the COMMIT goes on."""

    def give_back(session: Session) -> None:
        with pytest.raises(ReleaseError, match="a COMMIT is under way"):
            release(units.db)

    def work(session: Session) -> None:
        count(session)
        event.listen(session, "after_commit", give_back, once=True)
        session.commit()
        count(session)

    units.run(work)


def fail(*arguments: Any) -> None:
    raise ZeroDivisionError


def test_outside_a_unit_of_work() -> None:
    """As everywhere."""
    with pytest.raises(NoScopeError):
        Database("sqlite://").release()


def test_after_the_end() -> None:
    """A thread that has outlived its unit of work learns that."""
    db = Database("sqlite://")
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
        inside = contextvars.copy_context()
    with pytest.raises((ScopeClosedError, NoScopeError)):
        inside.run(db.release)
    db.dispose()


@on("postgresql+psycopg_async", "postgresql+asyncpg")
def test_beside_another_statement(units: Units) -> None:
    """Somebody else is using the connection."""

    async def main() -> None:
        async with units.db.session_scope() as session:
            await session.execute(select(1))
            other = asyncio.create_task(session.execute(text("SELECT 1 FROM pg_sleep(0.2)")))
            while not session.sync_session._unit_of_work.transaction.busy:
                await asyncio.sleep(0)
            with pytest.raises(ConcurrentUseError):
                await units.db.release()
            await other
            await units.db.release()

    units.runner.run(main())


@on("postgresql+psycopg_async", "postgresql+asyncpg", "mariadb+asyncmy")
def test_a_statement_beside_it(units: Units) -> None:
    """While the connection is given back, another task cannot have it."""

    async def main() -> None:
        async with units.db.session_scope() as session:
            (await session.execute(select(1))).all()
            giving_back = asyncio.create_task(units.db.release())
            while not session.sync_session._unit_of_work.releases:
                await asyncio.sleep(0)
            with pytest.raises(ConcurrentUseError):
                await session.execute(select(1))
            units.db.on_commit(called.append, "committed")
            with pytest.raises(ConcurrentUseError):
                await units.db.release()
            await giving_back
            assert called == []
            await session.execute(select(1))

    called: list[str] = []
    units.runner.run(main())
    assert called == ["committed"]


@on("postgresql+psycopg_async", "postgresql+asyncpg")
def test_beside_a_rollback(units: Units) -> None:
    """Another task is giving the connection back."""

    async def main() -> None:
        async with units.db.session_scope() as session:
            (await session.execute(select(1))).all()
            begun: list[Any] = []
            event.listen(units.sync_engine, "rollback", begun.append, once=True)
            other = asyncio.create_task(session.rollback())
            while not begun:
                await asyncio.sleep(0)
            with pytest.raises(ConcurrentUseError):
                await units.db.release()
            await other

    units.runner.run(main())


@pytest.mark.parametrize("on_event_loop", [False, True])
def test_permits(on_event_loop: bool) -> None:
    """A sync session under ASGI gives its permit back too, unless it would wait for the next on the event loop."""
    app, db = FastAPI(), SessionPlugin("sqlite://", pool_size=1, max_overflow=0)
    db.init_app(app)
    free: list[bool] = []
    needed: Any = Depends(db.get_session)

    def work(session: Session) -> None:
        semaphore = core_of(db.database_for(app)).semaphore
        session.execute(select(1)).all()
        db.release()
        assert db.engine.pool.checkedout() == 0
        _end_loan(session._unit_of_work)  # type: ignore[attr-defined]
        free.append(semaphore.take())
        if free[-1]:
            semaphore.release()
        session.execute(select(1)).all()

    @app.get("/async")
    async def on_the_event_loop(session: Session = needed) -> None:
        work(session)

    @app.get("/")
    def in_a_thread(session: Session = needed) -> None:
        work(session)

    async def get() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            return (await client.get("/async" if on_event_loop else "/")).status_code

    assert asyncio.run(get()) == 200
    assert free == [not on_event_loop]
    database = core_of(db.database_for(app))
    assert database.semaphore.take()
    db.database_for(app).dispose()


def test_a_read_only_policy(units: Units) -> None:
    """Each transaction begins as the policy says."""

    def work(session: Session) -> None:
        units.db.use(read_only)
        count(session)
        release(units.db)
        count(session)
        release(units.db)

    units.run(work)


@on(*POSTGRESQL)
def test_a_connection_that_was_lost(units: Units) -> None:
    """ROLLBACK fails, the connection is discarded, and the next statement takes another one."""
    units.run(add("tea"))

    def work(session: Session) -> None:
        tea = session.get_one(Parent, "tea")
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with units.store.engine.connect() as other:
            assert other.scalar(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        release(units.db)
        assert checked_out(units) == 0
        assert tea.name == "tea"
        assert session.scalar(text("SELECT pg_backend_pid()")) != pid
        session.add(Parent(name="milk"))

    units.run(work)
    assert units.store.names() == ["milk", "tea"]


def test_a_relationship_is_loaded_later() -> None:
    """The objects stay in the session, which loads what they still miss on another connection."""
    db = Database("sqlite://", metadata=Library.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add(Author(id=1, books=[Book(id=1), Book(id=2)]))
    with db.session_scope() as session:
        author = session.get_one(Author, 1)
        db.release()
        assert author in session
        assert [book.id for book in author.books] == [1, 2]
        db.release()
        author.books.append(Book(id=3))
    with db.session_scope() as session:
        assert len(session.get_one(Author, 1).books) == 3
    db.dispose()


@on(*SYNC[:2], *ASYNC[:2])
def test_under_isolation(units: Units) -> None:
    """In a test of the user's own too."""

    def work(session: Session) -> None:
        count(session)
        release(units.db)
        session.add(Parent(name="tea"))

    if units.is_async:

        async def isolated() -> None:
            async with units.db.isolated() as outside:
                await units.arun(work)
                assert await outside.run_sync(count) == 1

        units.runner.run(isolated())
    else:
        with units.db.isolated() as outside:
            units.run(work)
            assert count(outside) == 1
    assert units.store.names() == []


def test_while_the_connection_is_being_released(units: Units) -> None:
    """Neither another release() nor a statement may come between."""

    def work(session: Any) -> None:
        count(session)
        session._unit_of_work.releases = True
        with pytest.raises(ConcurrentUseError):
            release(units.db)
        with pytest.raises(ConcurrentUseError):
            count(session)
        session._unit_of_work.releases = False
        release(units.db)
        assert checked_out(units) == 0

    units.run(work)


@on("sqlite+pysqlite")
def test_a_session_that_changes_its_state_meanwhile(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLAlchemy's refusal says that another thread is at work."""

    def refuse(transaction: SessionTransaction) -> None:
        raise IllegalStateChangeError("it is being prepared", code="isce")

    def work(session: Session) -> None:
        count(session)
        with monkeypatch.context() as patch:
            patch.setattr(SessionTransaction, "close", refuse)
            with pytest.raises(ConcurrentUseError) as raised:
                release(units.db)
        assert isinstance(raised.value.__cause__, IllegalStateChangeError)
        release(units.db)

    units.run(work)
