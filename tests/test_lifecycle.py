"""How a unit of work ends when one of its steps fails."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from sqlalchemy import create_engine, event, literal, select, text
from sqlalchemy import insert as insert_into
from sqlalchemy.exc import (
    DBAPIError,
    IllegalStateChangeError,
    IntegrityError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    ResourceClosedError,
)
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction
from sqlalchemy.pool import NullPool

from session_plugin import (
    AsyncDatabase,
    ConcurrentUseError,
    ConfigurationError,
    Database,
    Outcome,
    ScopeClosedError,
    TransactionAbortedError,
    commit_on_success,
    manual,
    read_only,
)
from session_plugin.database.forks import forget_open_units
from session_plugin.database.interface import core_of
from session_plugin.engines.guard import MANY_RESULTS
from session_plugin.scope import ending
from session_plugin.scope.lifecycle import settle
from session_plugin.scope.opening import open_unit_of_work
from session_plugin.scope.runner import run
from session_plugin.scope.transaction_state import LateConnection

from .drivers import ASYNC, POSTGRESQL, SYNC
from .harness import POOL, Base, Child, Parent, Sibling, add, add_orphan, insert
from .servers import PostgreSQL
from .units import Units, on


class BoomError(Exception):
    pass


def fail_once(target: Any, name: str) -> list[str]:
    """Make the next call of this event raise."""
    failed: list[str] = []

    def listen(*args: Any) -> None:
        if not failed:
            failed.append(name)
            raise BoomError(name)

    event.listen(target, name, listen)
    return failed


def test_a_rollback_that_fails_discards_the_connection(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """If ROLLBACK fails, the original error is still the one raised, and the pool stays usable."""
    failed = fail_once(units.sync_engine, "rollback")

    def work(session: Session) -> None:
        insert("lost")(session)
        raise ZeroDivisionError

    with caplog.at_level(logging.WARNING, "session_plugin"), pytest.raises(ZeroDivisionError):
        units.run(work)
    assert failed == ["rollback"]
    assert "ROLLBACK failed" in caplog.text
    for number in range(6):
        units.run(insert(f"row {number}"))
    assert len(units.store.names()) == 6


def test_a_savepoint_that_cannot_be_rolled_back_discards_the_connection(units: Units) -> None:
    """SQLAlchemy leaves the outer transaction open if ROLLBACK TO SAVEPOINT fails, so the connection is discarded."""
    discarded: list[Any] = []
    event.listen(units.sync_engine, "invalidate", lambda *more: discarded.append(more))
    fail_once(units.sync_engine, "rollback_savepoint")

    def work(session: Session) -> None:
        session.begin_nested()
        insert("lost")(session)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        units.run(work)
    assert len(discarded) == 1
    assert units.store.names() == []


def test_a_commit_that_fails_rolls_back(units: Units) -> None:
    """A commit that fails rolls back, even if it fails before COMMIT is sent and the transaction is still open."""
    fail_once(units.sync_engine, "commit")
    with pytest.raises(BoomError):
        units.run(insert("lost"))
    for number in range(6):
        units.run(insert(f"row {number}"))
    assert len(units.store.names()) == 6


@on(*POSTGRESQL)
def test_a_connection_that_the_server_ends_is_discarded(units: Units) -> None:
    """If the server ends the connection at any step, the error is raised, nothing is written, and the pool recovers."""

    def kill(session: Session) -> None:
        insert("lost")(session)
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with units.store.engine.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})

    with pytest.raises(DBAPIError):
        units.run(kill)

    def kill_and_fail(session: Session) -> None:
        kill(session)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        units.run(kill_and_fail)
    for number in range(6):
        units.run(insert(f"row {number}"))
    assert len(units.store.names()) == 6


@on(*POSTGRESQL)
def test_a_failing_close_does_not_skip_the_next(units: Units) -> None:
    """Units of work of two databases, one inside the other, both return their connections if one ROLLBACK fails."""
    other = Units(units.driver, units.store)

    def inside(session: Session) -> None:
        fail_once(other.sync_engine, "rollback")
        other.db.use(manual)
        session.execute(text("SELECT 1"))

    async def both() -> None:
        async with units.db.session_scope() as outer:
            await outer.run_sync(insert("tea"))
            await other.arun(inside)
        await other.db.dispose()

    if units.is_async:
        units.runner.run(both())
    else:
        with units.db.session_scope() as outer:
            insert("tea")(outer)
            other.run(inside)
        other.db.dispose()
    assert other.sync_engine.pool.checkedout() == 0
    assert units.store.names() == ["tea"]
    other.runner.close()


def test_a_scope_that_was_not_settled_rolls_back_at_its_close(units: Units) -> None:
    if units.is_async:

        async def main() -> None:
            scope = open_unit_of_work(core_of(units.db), origin="test")
            await scope.session.run_sync(insert("lost"))
            await ending.aclose(scope)
            await ending.aclose(scope)

        units.runner.run(main())
    else:
        scope = open_unit_of_work(core_of(units.db), origin="test")
        insert("lost")(scope.session)
        ending.close(scope)
        ending.close(scope)
    assert units.store.names() == []


def test_a_rollback_that_fails_at_the_close_raises_nothing(units: Units) -> None:
    """A failed rollback at the close raises nothing, because the caller could not act on it; the pool stays usable."""
    fail_once(units.sync_engine, "rollback")
    scope = open_unit_of_work(core_of(units.db), origin="test")

    async def main() -> None:
        await scope.session.run_sync(insert("lost"))
        await ending.aclose(scope)

    if units.is_async:
        units.runner.run(main())
    else:
        insert("lost")(scope.session)
        ending.close(scope)
    for number in range(6):
        units.run(insert(f"row {number}"))
    assert len(units.store.names()) == 6


def test_settling_twice_settles_what_came_in_between(units: Units) -> None:
    """Work after the first settling is a separate transaction, with its own hooks, and is settled the next time."""
    log: list[str] = []

    def late(scope: Any, name: str) -> Any:
        def work(session: Session) -> None:
            scope.add_hook("commit", lambda: log.append(name))
            insert(name)(session)

        return work

    async def main() -> None:
        scope = open_unit_of_work(core_of(units.db), origin="test")
        for name in ("first", "second"):
            await scope.session.run_sync(late(scope, name))
            await ending.asettle(scope, Outcome())
        await scope.session.run_sync(late(scope, "third"))
        await ending.asettle(scope, Outcome(interrupted=True))
        await ending.aclose(scope)

    if units.is_async:
        units.runner.run(main())
    else:
        scope = open_unit_of_work(core_of(units.db), origin="test")
        for name in ("first", "second"):
            late(scope, name)(scope.session)
            ending.settle(scope, Outcome())
        late(scope, "third")(scope.session)
        ending.settle(scope, Outcome(interrupted=True))
        ending.close(scope)
    assert units.store.names() == log == ["first", "second"]


def test_a_hook_that_stops_the_process_is_not_swallowed() -> None:
    """Only an Exception in a hook is logged; a KeyboardInterrupt propagates after the connection was returned."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), db.session_scope() as session:
        insert("kept")(session)
        db.on_commit(interrupt)
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    with db.session_scope() as session:
        assert session.get(Parent, "kept") is not None
    db.dispose()


@on(*SYNC)
def test_a_sync_scope_under_an_event_loop_uses_a_thread_only_for_io(units: Units) -> None:
    """Settling stays on the event loop's thread if nothing is sent to the database and no code of the user runs."""
    threads: list[Any] = []
    event.listen(units.sync_engine, "commit", lambda connection: threads.append(threading.current_thread()))

    async def main(work: Any) -> None:
        scope = open_unit_of_work(core_of(units.db), origin="test")
        work(scope.session)
        await ending.asettle(scope, Outcome())
        await ending.aclose(scope)

    def begins(session: Any) -> None:
        commit = session.commit
        session.commit = lambda: (silent.append(threading.current_thread()), commit())
        session.begin()

    def listens(session: Session) -> None:
        event.listen(session, "after_commit", lambda session: silent.append(threading.current_thread()))
        session.begin()

    silent: list[Any] = []
    asyncio.run(main(lambda session: None))
    asyncio.run(main(begins))
    assert (threads, silent) == ([], [threading.main_thread()])
    asyncio.run(main(listens))
    assert (threads, silent.pop() is threading.main_thread()) == ([], False)
    asyncio.run(main(insert("tea")))
    asyncio.run(main(add("milk")))
    assert [thread is threading.main_thread() for thread in threads] == [False, False]
    assert units.store.names() == ["milk", "tea"]


@on(*POSTGRESQL)
def test_a_failed_close_does_not_skip_the_hooks(units: Units) -> None:
    """SQLAlchemy fires no event when `session.close()` fails.

    Settling the unit of work then runs the hooks and frees the connection's place in the pool.
    """
    undone: list[str] = []

    def work(session: Session) -> None:
        units.db.on_rollback(undone.append, "tea")
        own = session.scalar(text("SELECT pg_backend_pid()"))
        with units.store.engine.connect() as connection:
            assert connection.scalar(text("SELECT pg_terminate_backend(:own, 5000)"), {"own": own})
        with pytest.raises(DBAPIError):
            session.close()
        units.db.doom()

    units.run(work)
    assert undone == ["tea"]


def test_settling_after_a_404_only_rolls_back() -> None:
    """After a 404 the generator of `settle()` yields exactly one call, the rollback."""
    db = Database("sqlite://", metadata=Base.metadata, **POOL)
    db.create_all()
    scope = open_unit_of_work(core_of(db), origin="test")
    insert("tea")(scope.session)
    calls = [call.__name__ for call in settle(scope, Outcome(status=404))]
    assert calls == ["rollback"]
    run(settle(scope, Outcome(status=404)))
    ending.close(scope)
    db.dispose()


@on("sqlite+aiosqlite")
def test_a_stream_that_is_still_open_is_closed(units: Units) -> None:
    """Settling closes a result of `AsyncSession.stream()` that is still open."""
    from sqlalchemy import select

    async def main() -> None:
        async with units.db.session_scope() as session:
            session.add_all(Parent(name=f"row {number}") for number in range(20))
            result = await session.stream_scalars(select(Parent))
            await anext(aiter(result))
        with pytest.raises(ResourceClosedError):
            await result.all()

    units.runner.run(main())


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_stream_is_closed_before_its_transaction_ends(
    units: Units, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream is closed before COMMIT or ROLLBACK.

    Afterwards the server has no such cursor any more, and MariaDB would first send all unread rows.
    """
    streams: list[Any] = []

    def work(session: Session) -> None:
        session.add_all(Parent(name=f"row {number}") for number in range(9))
        session.flush()
        streams.append(session.execute(select(Parent.name), execution_options={"yield_per": 2}))
        streams[0].fetchone()
        if end == "rollback":
            units.db.doom("dry run")

    units.run(work)
    with pytest.raises(ResourceClosedError):
        streams[0].all()
    assert [record.message for record in caplog.records if record.name.startswith("sqlalchemy")] == []


@pytest.mark.filterwarnings("ignore:.*ServerCursor.*deleted while still open:ResourceWarning")
@on(*POSTGRESQL)
def test_closing_a_stream_of_a_rolled_back_savepoint_commits_or_raises(units: Units) -> None:
    """If closing a stream aborts the transaction, that raises an error; otherwise the work is committed.

    Some drivers ask the server to close a cursor that the savepoint's rollback has closed already.
    """

    def work(session: Session) -> None:
        insert("tea")(session)
        savepoint = session.begin_nested()
        stream = session.execute(text("SELECT * FROM generate_series(1, 9)"), execution_options={"yield_per": 1})
        stream.fetchone()
        savepoint.rollback()

    try:
        units.run(work)
    except TransactionAbortedError:
        assert units.store.names() == []
    else:
        assert units.store.names() == ["tea"]
    gc.collect()  # psycopg warns about a cursor that it could not close


def test_a_two_phase_session_does_not_commit_an_aborted_transaction(postgresql: Any) -> None:
    """An aborted transaction raises an error with ``twophase=True`` too, although PREPARE TRANSACTION "succeeds"."""
    db = Database(
        {"default": postgresql.url("psycopg"), "other": postgresql.url("psycopg")},
        twophase=True,
        metadata=Base.metadata,
    )
    db.create_all()
    with pytest.raises(TransactionAbortedError), db.session_scope() as session:
        insert("tea")(session)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
    with db.session_scope() as session:
        assert session.get(Parent, "tea") is None
        insert("milk")(session)
    with db.session_scope() as session:
        assert session.get(Parent, "milk") is not None
        assert session.scalar(text("SELECT count(*) FROM pg_prepared_xacts")) == 0
    db.dispose()


def test_an_async_database_needs_a_running_loop() -> None:
    db = AsyncDatabase("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match="no asyncio event loop runs"):
        _ = open_unit_of_work(core_of(db), origin="test").session


def test_an_unread_core_result_is_closed_with_its_transaction() -> None:
    """An unread result is closed when the unit of work is settled.

    SQLite's cursors are lazy, so it would read rows that the next unit of work writes on that connection.
    """
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add_all(Parent(name=f"row {number}") for number in range(300))
    scope = open_unit_of_work(core_of(db), origin="test")
    unread = scope.session.execute(text("SELECT name FROM parent"))
    unread.fetchone()
    for _ in range(250):
        assert scope.session.scalar(text("SELECT count(*) FROM parent")) == 300
    assert len(scope.transaction.open_results) <= 101
    ending.settle(scope, Outcome())
    with pytest.raises(ResourceClosedError):
        unread.fetchall()
    assert scope.transaction.open_results == []
    ending.close(scope)
    db.dispose()


@on("sqlite+aiosqlite", "postgresql+psycopg")
def test_a_result_whose_rows_are_there_stays_readable(units: Units) -> None:
    """A result whose rows are in memory can be read after the unit of work, because it needs no connection."""
    results: list[Any] = []
    units.run(lambda session: results.append(session.execute(text("SELECT 42"))))
    assert results[0].scalar() == 42


@on("postgresql+psycopg", "postgresql+asyncpg")
def test_after_a_failed_connect_the_policy_can_still_be_changed(units: Units) -> None:
    """A failed attempt to connect begins no transaction, so `use()` can still decide how it begins."""
    failed = fail_once(units.sync_engine, "do_connect")

    def work(session: Session) -> Any:
        with pytest.raises(BoomError):
            session.execute(text("SELECT 1"))
        units.db.use(read_only)
        return session.scalar(text("SHOW transaction_read_only"))

    assert units.run(work) == "on"
    assert failed == ["do_connect"]


class OwnSession(Session):
    """Like SQLModel's session, it adds a method beside ``execute()``, and calls SQLAlchemy's methods on their class."""

    def exec(self, statement: Any) -> Any:
        return super().execute(statement)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return Session.execute(self, *args, **kwargs)


class CountingSession(OwnSession):
    """A session with a listener that executes another statement after each one."""


@event.listens_for(CountingSession, "do_orm_execute")
def count_after(state: ORMExecuteState) -> Any:
    if state.execution_options.get("counts"):
        return None
    result = state.invoke_statement()
    state.session.execute(text("SELECT 1"), execution_options={"counts": True})
    return result


STREAMS: dict[str, Callable[[Any], Any]] = {
    "execute": lambda session: session.execute(select(Parent), execution_options={"yield_per": 5}),
    "scalars": lambda session: session.scalars(select(Parent.name).execution_options(stream_results=True)),
    "query": lambda session: iter(session.query(Parent).yield_per(5)),
    "exec": lambda session: session.exec(select(Parent).execution_options(yield_per=5)),
}


@pytest.mark.parametrize("url", ["sqlite", "postgresql"])
@pytest.mark.parametrize("way", STREAMS)
@pytest.mark.parametrize("class_", [OwnSession, CountingSession])
def test_a_stream_is_closed_whichever_way_it_was_opened(
    class_: type[Session], way: str, url: str, request: pytest.FixtureRequest
) -> None:
    """A stream is closed with its transaction, even if the user's session class calls SQLAlchemy's methods directly."""
    source = "sqlite://" if url == "sqlite" else request.getfixturevalue("postgresql").url("psycopg")
    db = Database(source, class_=class_, metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add_all(Parent(name=f"row {number:02}") for number in range(50))
    scope = open_unit_of_work(core_of(db), origin="test")
    stream = STREAMS[way](scope.session)
    next(iter(stream))
    ending.settle(scope, Outcome())
    with pytest.raises(ResourceClosedError):
        list(stream)
    ending.close(scope)
    db.dispose()


def test_a_stream_of_an_engine_that_streams_everything_is_closed(postgresql: PostgreSQL) -> None:
    """With the engine's ``stream_results`` every result is closed, unless the statement turns streaming off."""
    db = Database(postgresql.url("psycopg"), execution_options={"stream_results": True})
    numbers = text("SELECT * FROM generate_series(1, 3000)")
    scope = open_unit_of_work(core_of(db), origin="test")
    stream = scope.session.execute(numbers)
    rows = scope.session.execute(numbers, execution_options={"stream_results": False})
    stream.fetchone()
    ending.settle(scope, Outcome())
    assert len(rows.all()) == 3000
    with pytest.raises(ResourceClosedError):
        stream.all()
    ending.close(scope)
    db.dispose()


def test_an_unread_result_that_a_listener_wraps_is_closed() -> None:
    """If a listener replaces an unread result by a view of it, settling closes the view and the result behind it.

    SQLite's cursors are lazy, so the rows have not been fetched yet.
    """

    class MappingSession(Session):
        pass

    event.listen(MappingSession, "do_orm_execute", lambda state: state.invoke_statement().mappings())
    db = Database("sqlite://", class_=MappingSession)
    scope = open_unit_of_work(core_of(db), origin="test")
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000) SELECT i FROM n"
    unread = scope.session.execute(text(numbers))
    ending.settle(scope, Outcome())
    with pytest.raises(ResourceClosedError):
        list(unread)
    ending.close(scope)
    db.dispose()


def test_the_rows_of_an_insert_stay_readable() -> None:
    """What INSERT .. RETURNING returned is in memory, so it is not closed with its transaction, unlike a SELECT."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        rows = [{"name": "tea"}, {"name": "pot"}]
        inserted = session.connection().execute(insert_into(Parent).returning(Parent.name), rows)
        selected = session.connection().execute(select(Parent.name))
    assert sorted(inserted.scalars()) == ["pot", "tea"]
    with pytest.raises(ResourceClosedError):
        selected.all()
    db.dispose()


def test_a_connection_that_streams_closes_its_results() -> None:
    """If the user asks for one connection that streams, its ORM results too are closed with the transaction."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add_all([Parent(name="tea"), Parent(name="pot")])
        session.flush()
        assert not db._unit_of_work().transaction.streams
        session.commit()
        session.connection(execution_options={"stream_results": True})
        assert db._unit_of_work().transaction.streams
        unread = session.scalars(select(Parent))
        assert db._unit_of_work().transaction.open_results
    with pytest.raises(ResourceClosedError):
        unread.all()
    db.dispose()


def test_a_stream_that_a_listener_serves_from_a_cache_needs_no_connection() -> None:
    """A listener that answers without the database takes no connection, and its result can be read after the end."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add(Parent(name="tea"))
        session.flush()
        cached = session.execute(select(Parent.name)).freeze()
    with db.session_scope() as session:
        event.listen(session, "do_orm_execute", lambda state: cached())
        result = session.execute(select(Parent.name).execution_options(stream_results=True))
        assert not db._unit_of_work().transaction.connected
    assert result.scalars().all() == ["tea"]
    db.dispose()


def test_results_that_were_read_are_not_kept() -> None:
    """A unit of work keeps no references to results that were read, however many statements it executes."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        for _ in range(3 * MANY_RESULTS):
            session.execute(text("SELECT 1")).all()
            session.execute(select(literal(1)).select_from(Parent).execution_options(yield_per=5)).all()
        assert len(db._unit_of_work().transaction.open_results) <= MANY_RESULTS
    db.dispose()


def test_after_a_lost_sqlite_transaction_no_statement_is_executed() -> None:
    """After a failed INSERT OR ROLLBACK further statements raise, because each would commit on its own."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()

    def lose(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT OR ROLLBACK INTO parent (name) VALUES ('tea')"))

    with pytest.raises(TransactionAbortedError, match="IntegrityError"), db.session_scope() as session:
        lose(session)
        with pytest.raises(TransactionAbortedError, match="IntegrityError"):
            session.execute(text("INSERT INTO parent (name) VALUES ('alone')"))
        session.execute(text("INSERT INTO parent (name) VALUES ('alone')"))
    with pytest.raises(PendingRollbackError), db.session_scope() as session:
        lose(session)
        with pytest.raises(TransactionAbortedError):
            session.commit()
    with db.session_scope() as session:
        lose(session)
        session.rollback()
        insert("milk")(session)
    with db.session_scope() as session:
        assert session.scalars(text("SELECT name FROM parent")).all() == ["milk"]
    db.dispose()


def test_an_error_under_autocommit_aborts_nothing() -> None:
    """A failed statement under AUTOCOMMIT does not raise TransactionAbortedError at the end of the unit of work."""
    autocommit = replace(commit_on_success, isolation_level="AUTOCOMMIT")
    db = Database("sqlite://", metadata=Base.metadata, policy=autocommit)
    db.create_all()
    with db.session_scope() as session:
        session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
    with db.session_scope() as session:
        assert session.scalars(text("SELECT name FROM parent")).all() == ["tea"]
    db.dispose()


@pytest.mark.parametrize("named_by", ["binds", "get_bind"])
def test_an_engine_that_only_binds_or_get_bind_names_keeps_the_promises(postgresql: Any, named_by: str) -> None:
    """An engine that only `binds` or `get_bind()` names is guarded against phantom commits too."""
    other = create_engine(postgresql.url("psycopg"))
    Base.metadata.create_all(other)

    class Routing(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return other

    options: dict[str, Any] = {"binds": {Base: other}} if named_by == "binds" else {"class_": Routing}
    db = Database("sqlite://", **options)
    with pytest.raises(TransactionAbortedError), db.session_scope() as session:
        insert("tea")(session)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO parent VALUES ('tea')"), bind_arguments={"mapper": Parent})
    with db.session_scope() as session:
        assert session.get(Parent, "tea") is None
    db.dispose()
    other.dispose()


def test_an_engine_that_get_bind_names_is_not_kept() -> None:
    """No reference is kept to an engine that `get_bind()` returns, because an app may have one for each tenant."""
    engines = [create_engine("sqlite://")]

    class Routing(Session):
        def get_bind(self, *args: Any, **kwargs: Any) -> Any:
            return engines[0]

    db = Database("sqlite://", class_=Routing)
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
    engines[0].dispose()
    kept = ref(engines.pop())
    del session
    gc.collect()
    assert kept() is None
    db.dispose()


def test_a_doomed_scope_does_not_commit_over_an_open_savepoint(units: Units) -> None:
    """A doomed unit of work refuses a commit over an open savepoint, and one through the connection itself."""

    def over_a_savepoint(session: Session) -> None:
        with session.begin():
            insert("lost")(session)
            units.db.doom("dry run")
            session.begin_nested()
            session.execute(text("SELECT 2"))

    def through_the_connection(session: Session) -> None:
        insert("lost")(session)
        units.db.doom("dry run")
        session.connection().commit()

    for work in (over_a_savepoint, through_the_connection):
        with pytest.raises(TransactionAbortedError, match="dry run"):
            units.run(work)
    assert units.store.names() == []


@pytest.mark.parametrize("name", ["after_commit", "after_transaction_end"])
def test_a_listener_that_fails_after_the_commit_raises_nothing(
    units: Units, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """If a listener fails after COMMIT, the data is durable, so the error is only logged and the hooks still run."""
    ran: list[str] = []

    def fail(session: Session, *ended: SessionTransaction) -> None:
        if not ended or ended[0].parent is None:
            raise BoomError

    def work(session: Session) -> None:
        insert("tea")(session)
        event.listen(session, name, fail)
        units.db.on_commit(ran.append, "on_commit")
        units.db.on_rollback(ran.append, "on_rollback")

    units.run(work)
    assert (ran, units.store.names()) == (["on_commit"], ["tea"])
    assert "a listener failed after the COMMIT" in caplog.text
    assert units.sync_engine.pool.checkedout() == 0


@on(*POSTGRESQL)
def test_a_listener_that_replaces_the_error_does_not_hide_an_aborted_transaction(units: Units) -> None:
    """An aborted transaction is detected even if a ``handle_error`` listener raises another error.

    SQLAlchemy calls no further listener in that case.
    """

    @event.listens_for(units.sync_engine.__class__, "handle_error")
    def replace_error(context: Any) -> None:
        if "1/0" in (context.statement or ""):
            raise BoomError from context.original_exception

    def work(session: Session) -> None:
        insert("lost")(session)
        with pytest.raises(BoomError):
            session.execute(text("SELECT 1/0"))

    try:
        with pytest.raises(TransactionAbortedError):
            units.run(work)
    finally:
        event.remove(units.sync_engine.__class__, "handle_error", replace_error)
    assert units.store.names() == []


@pytest.mark.parametrize("end", ["invalidate", "close"])
def test_an_error_on_a_closed_connection_is_not_replaced(end: str) -> None:
    """An error on a closed or invalidated connection is raised unchanged; inspecting the connection would fail too."""
    db = Database("sqlite://", poolclass=NullPool)
    with db.engine.connect() as connection:
        result = connection.execute(text("SELECT 1"))
        getattr(connection, end)()
        with pytest.raises(ProgrammingError, match="closed database"):
            result.all()
    db.dispose()


def test_a_connect_error_is_not_replaced(tmp_path: Path) -> None:
    """A failed connect raises its own error, although there is no connection to inspect."""
    db = Database(f"sqlite:///{tmp_path / 'nowhere' / 'shop.db'}")
    with pytest.raises(OperationalError, match="unable to open"), db.session_scope() as session:
        session.connection()
    db.dispose()


def test_an_error_swallowed_during_the_flush_is_detected(postgresql: Any) -> None:
    """The transaction is checked right before COMMIT, after every listener of the session has run."""
    db = Database(postgresql.url("psycopg"), metadata=Base.metadata)
    db.create_all()
    with pytest.raises(TransactionAbortedError), db.session_scope() as session:

        @event.listens_for(session, "after_flush")
        def swallow(flushed: Session, context: Any) -> None:
            with pytest.raises(DBAPIError):
                flushed.connection().exec_driver_sql("SELECT 1/0")

        session.add(Parent(name="lost"))
    with db.session_scope() as session:
        assert session.get(Parent, "lost") is None
    db.dispose()


@pytest.mark.parametrize("driver", ["psycopg_async", "asyncpg"])
@pytest.mark.parametrize("cut", ["rollback", "close"])
def test_a_rollback_waits_for_the_statement_of_a_sibling(postgresql: Any, driver: str, cut: str) -> None:
    """A rollback waits until a concurrent statement of the same session has finished.

    Closing the socket under that statement would break the next connection, which reuses the file descriptor.
    """

    async def main() -> None:
        db = AsyncDatabase(postgresql.url(driver), pool_size=1, max_overflow=0, pool_timeout=5)

        PID = text("SELECT pg_backend_pid()")

        async def work() -> None:
            async with db.session_scope() as session:
                pid = await session.scalar(PID)
                sleeping = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.2)")))
                while not db._unit_of_work().transaction.busy:
                    await asyncio.sleep(0.01)
                await getattr(session, cut)()
                assert sleeping.done()
                assert await session.scalar(PID) == pid

        await work()
        await db.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("driver", ["psycopg_async", "asyncpg"])
@pytest.mark.parametrize("cut", ["rollback", "close"])
def test_a_rollback_beside_a_statement_without_end_breaks_no_pool(
    postgresql: Any, driver: str, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a concurrent statement does not finish, a rollback discards the connection and that statement raises."""
    monkeypatch.setattr("session_plugin.engines.guard.LONGEST_WAIT", 0.05)

    async def main() -> None:
        db = AsyncDatabase(postgresql.url(driver), pool_size=1, max_overflow=0, pool_timeout=5)

        async def work() -> None:
            async with db.session_scope() as session:
                await session.execute(text("SELECT 1"))
                sleeping = asyncio.create_task(session.execute(text("SELECT pg_sleep(5)")))
                while not db._unit_of_work().transaction.busy:
                    await asyncio.sleep(0.01)
                await getattr(session, cut)()
                with pytest.raises(Exception):  # noqa: B017  each driver raises its own error
                    await sleeping
                await session.rollback()

        await work()
        for _ in range(3):
            async with db.session_scope() as session:
                assert await session.scalar(text("SELECT 1")) == 1
        await db.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("driver", ["psycopg_async", "asyncpg"])
def test_the_end_beside_a_statement_without_end_keeps_no_connection(
    postgresql: Any, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a concurrent statement does not finish, the end commits nothing and discards the connection."""
    monkeypatch.setattr("session_plugin.engines.guard.LONGEST_WAIT", 0.05)

    async def main() -> None:
        db = AsyncDatabase(postgresql.url(driver), pool_size=1, max_overflow=0, pool_timeout=5)
        discarded: list[Any] = []
        event.listen(db.engine.sync_engine, "invalidate", lambda *more: discarded.append(more))
        with pytest.raises(ConcurrentUseError):
            async with db.session_scope() as session:
                await session.execute(text("CREATE TABLE half_done (id INTEGER)"))
                sleeping = asyncio.create_task(session.execute(text("SELECT pg_sleep(5)")))
                while not db._unit_of_work().transaction.busy:
                    await asyncio.sleep(0.01)
        with pytest.raises(Exception):  # noqa: B017  each driver raises its own error
            await sleeping
        assert discarded
        async with db.session_scope() as session:
            assert await session.scalar(text("SELECT to_regclass('half_done')")) is None
        await db.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("begun", [True, False])
def test_a_fork_in_an_open_scope_leaves_it_to_the_parent(postgresql: Any, begun: bool) -> None:
    """A forked child opens its own unit of work on its own connection, and sends nothing on the parent's."""
    db = Database(postgresql.url("psycopg"), metadata=Base.metadata, pool_size=2)
    db.create_all()
    with db.session_scope() as session:
        if begun:
            insert("parent")(session)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with db.session_scope() as own:
                    insert("child")(own)
                del session, own
                gc.collect()
                db.dispose()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        if not begun:
            insert("parent")(session)
    with db.session_scope() as session:
        assert sorted(session.scalars(text("SELECT name FROM parent"))) == ["child", "parent"]
    db.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("saves", [True, False])
def test_a_forked_child_sends_nothing_through_the_session_of_its_parent(
    postgresql: PostgreSQL, driver: str, saves: bool
) -> None:
    """No COMMIT or ROLLBACK of the child reaches the parent's connection, and neither does its exit."""
    db = Database(postgresql.url(driver), metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        insert("parent")(session)
        connection = session.connection()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for call in (partial(connection.execute, text("DELETE FROM parent")), session.commit):
                    with pytest.raises(ScopeClosedError, match="belongs to the parent process"):
                        call()
                session.rollback()
                session.close()
                del session, connection, call
                gc.collect()
                db.dispose()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        with db.session_scope(new=True) as other:
            assert other.get(Parent, "parent") is None
        if not saves:
            db.doom()
    with db.session_scope() as session:
        assert session.scalars(text("SELECT name FROM parent")).all() == ["parent"] * saves
    db.dispose()


def test_a_unit_of_work_that_is_detached_after_a_fork_sends_nothing() -> None:
    """A unit of work that a forked child has detached refuses statements and sends nothing."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        insert("lost")(session)
        connection = session.connection()
        forget_open_units()
        assert db.scope.closed
        assert session.in_transaction()
        with pytest.raises(ScopeClosedError):
            session.execute(text("SELECT 1"))
        with pytest.raises(ScopeClosedError, match="belongs to the parent process"):
            connection.execute(text("SELECT 1"))
    assert session.in_transaction()
    session.rollback()
    session.close()
    db.dispose()


def test_a_forked_child_leaves_the_results_of_its_parent_open() -> None:
    """Closing a result may send something to the server, so the end of a detached session closes none."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add_all([Parent(name="tea"), Parent(name="pot")])
        session.flush()
        unread = session.connection().execute(select(Parent.name))
        forget_open_units()
    session.close()
    assert unread.fetchone() is not None
    db.dispose()


def test_a_fork_while_a_connection_is_taken() -> None:
    """The child's unit of work has ended, so the connection that arrives there is refused."""
    db = Database("sqlite://", **POOL)
    with db.session_scope() as session:
        event.listen(db.engine, "checkout", lambda *arguments: forget_open_units(), once=True)
        with pytest.raises(ScopeClosedError):
            session.execute(text("SELECT 1"))
    session.close()
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


def test_a_fork_beside_a_connection_that_was_closed_by_hand() -> None:
    """A connection that was closed by hand does not keep a forked child from detaching the open units of work."""
    db = Database("sqlite://")
    with db.session_scope(new=True) as session:
        session.connection().close()
        forget_open_units()
        assert db.scope.closed
    session.close()
    db.dispose()


def test_a_generator_that_is_not_read_to_its_end_dooms_nothing(units: Units) -> None:
    """A generator that is closed early does not doom the outer unit of work, which stays the current one."""
    if units.is_async:

        async def arows() -> Any:
            async with units.db.session_scope() as session:
                yield await session.run_sync(lambda sync: sync.scalar(text("SELECT 1")))

        async def main() -> None:
            async with units.db.session_scope() as session:
                await session.run_sync(insert("tea"))
                rows = arows()
                assert await anext(rows) == 1
                await rows.aclose()
                assert units.db.session is session

        units.runner.run(main())
    else:

        def rows() -> Any:
            with units.db.session_scope() as session:
                yield session.scalar(text("SELECT 1"))

        with units.db.session_scope() as session:
            insert("tea")(session)
            assert next(rows()) == 1
            assert units.db.session is session
    assert units.store.names() == ["tea"]


def test_generators_closed_in_the_order_of_their_opening_leave_the_outer_scope_current() -> None:
    db = Database("sqlite://")

    def holding() -> Any:
        with db.session_scope(new=True) as session:
            yield session

    with db.session_scope() as outer:
        first, second = holding(), holding()
        next(first)
        next(second)
        first.close()
        second.close()
        assert db.session is outer
    db.dispose()


@pytest.mark.parametrize("part", ["hook", "listener"])
def test_a_block_raises_ctrl_c_once_all_is_done(units: Units, part: str) -> None:
    """A KeyboardInterrupt after the COMMIT ends the program; the data is durable and the other hooks have run."""
    log: list[str] = []

    def ctrl_c(*args: Any) -> None:
        raise KeyboardInterrupt

    def work(session: Session) -> None:
        insert("tea")(session)
        if part == "hook":
            units.db.on_commit(ctrl_c)
        else:
            event.listen(session, "after_commit", ctrl_c)
        units.db.on_commit(log.append, "second")

    async def block() -> None:
        with pytest.raises(KeyboardInterrupt):
            await units.arun(work)

    if units.is_async:
        units.runner.run(block())
    else:
        with pytest.raises(KeyboardInterrupt):
            units.run(work)
    assert (log, units.store.names()) == (["second"], ["tea"])


@on("postgresql+psycopg_async")
def test_a_hook_that_is_closed_ends_at_once(units: Units) -> None:
    """A coroutine that is closed can await nothing more."""

    async def wait() -> None:
        await asyncio.sleep(60)

    hooks = core_of(units.db).arun_hooks([wait, wait])

    async def begin_and_close() -> None:
        hooks.send(None)
        hooks.close()

    units.runner.run(begin_and_close())


@on(*ASYNC)
def test_a_hook_that_raises_cancelled_error_changes_nothing(units: Units) -> None:
    """A CancelledError in a hook, which may come from a task that it awaited, is contained; the other hooks run."""
    log: list[str] = []

    async def cancelled() -> None:
        raise asyncio.CancelledError

    def work(session: Session) -> None:
        insert("tea")(session)
        units.db.on_commit(cancelled)
        units.db.on_commit(log.append, "second")

    units.run(work)
    assert (log, units.store.names()) == (["second"], ["tea"])


def test_a_partial_commit_is_noted_on_the_error(postgresql: Any) -> None:
    """If one of several engines fails to commit after another has committed, a note on the error says so.

    Without two-phase commit the engines commit one after the other, in no fixed order.
    """
    db = Database(
        {"default": postgresql.url("psycopg"), "other": postgresql.url("psycopg")},
        binds={Child: "other"},
        metadata=Base.metadata,
    )
    for engine in db.engines.values():
        Base.metadata.create_all(engine)
    noted = []
    for number in range(40):
        with pytest.raises(IntegrityError) as caught, db.session_scope() as session:
            insert(f"row {number}")(session)
            add_orphan(session)
        notes = getattr(caught.value, "__notes__", [])
        with db.session_scope() as session:
            assert (session.get(Parent, f"row {number}") is not None) == bool(notes)
        noted.extend(notes)
        if 0 < len(noted) < number + 1:
            break
    assert "twophase=True" in noted[0]
    db.dispose()


def test_a_listener_that_fails_as_a_transaction_begins_leaves_the_connection_usable() -> None:
    """SQLAlchemy keeps the connection, so whoever catches the error may ask for it again, and save with it."""
    db = Database("sqlite://", metadata=Base.metadata, **POOL)
    db.create_all()
    failed: list[bool] = []

    def fail_once(*arguments: Any) -> None:
        if not failed:
            failed.append(True)
            raise BoomError

    with db.session_scope() as session:
        event.listen(type(session), "after_begin", fail_once, insert=True)  # before ours
        with pytest.raises(BoomError):
            session.connection()
        session.connection().execute(insert_into(Parent).values(name="tea"))
    with db.session_scope() as session:
        assert session.scalars(select(Parent.name)).all() == ["tea"]
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


# -- a connection that another task or thread is taking ----------------------------------------------


def test_a_scope_does_not_commit_beside_a_connection_that_is_being_taken(units: Units) -> None:
    """The sibling's work would be half of it: SQLAlchemy's refusal becomes ours, which names the cure."""
    siblings: list[Sibling] = []

    def work(session: Any) -> None:
        session.add(Parent(name="half"))
        siblings.append(sibling := Sibling(session, units.sync_engine))
        state = session._unit_of_work.transaction
        sibling.let_go_once(lambda: state.late is not None)

    with pytest.raises(ConcurrentUseError, match=r"session_scope\(new=True\)") as caught:
        units.run(work)
    assert caught.value.__cause__.code == "isce"  # type: ignore[union-attr]
    assert siblings[0].ended.wait(10)
    assert isinstance(siblings[0].error, ScopeClosedError)
    assert units.store.names() == []


def test_a_scope_beside_a_connection_that_arrives_too_late(
    units: Units, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The block's own error leaves it within the bound, a warning names what was left, and nothing stays held."""
    monkeypatch.setattr("session_plugin.scope.lifecycle.LONGEST_WAIT", 0.02)
    siblings: list[Sibling] = []
    discarded = threading.Event()
    event.listen(units.sync_engine, "invalidate", lambda *arguments: discarded.set())
    opened: list[bool] = []

    def work(session: Any) -> None:
        siblings.append(sibling := Sibling(session, units.sync_engine))
        sibling.let_go_once(lambda: opened)
        raise KeyError("mine")

    async def main() -> None:
        with pytest.raises(KeyError, match="mine"):
            await units.arun(work)
        opened.append(True)
        while not siblings[0].ended.is_set():
            await asyncio.sleep(0.01)

    if units.is_async:
        units.runner.run(main())
    else:
        with pytest.raises(KeyError, match="mine"):
            units.run(work)
        opened.append(True)
    assert siblings[0].ended.wait(10)
    assert isinstance(siblings[0].error, ScopeClosedError)
    assert discarded.wait(10)
    assert "is not waited for any longer" in caplog.text
    assert caplog.text.count("WARNING") == 1
    assert units.store.names() == []


def test_discarding_leaves_a_connection_alone_that_was_closed_by_hand() -> None:
    """It is back in its pool, where it may serve somebody else; the session's other connection is discarded."""
    db = Database({"default": "sqlite://", "other": "sqlite://"}, **POOL)
    discarded: list[str] = []
    for name, engine in db.engines.items():
        event.listen(engine, "invalidate", lambda *arguments, name=name: discarded.append(name))
    with pytest.raises(BoomError), db.session_scope() as session:
        session.bind_mapper(Parent, db.engines["other"])
        session.connection(bind_arguments={"mapper": Parent.__mapper__})
        session.connection().close()
        db._unit_of_work().transaction.discard()
        raise BoomError
    assert discarded == ["other"]
    db.dispose()


def test_a_listener_that_ends_the_block_inside_a_rollback_gets_the_refusal() -> None:
    """SQLAlchemy refuses to end a transaction while it rolls it back, which is not taken for another thread's work."""
    db = Database("sqlite://", **POOL)
    with ExitStack() as block:
        session = block.enter_context(db.session_scope())
        session.execute(text("SELECT 1"))
        event.listen(session, "after_rollback", lambda session: block.close(), once=True)
        with pytest.raises(IllegalStateChangeError, match=r"'rollback\(\)' is already in progress"):
            session.rollback()
    assert not session.in_transaction()
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


class Invalidated:
    """Stands for a connection; notes that it was discarded."""

    discarded = False

    def invalidate(self) -> None:
        self.discarded = True


@pytest.mark.parametrize("arrives_first", [True, False])
def test_a_connection_that_arrives_as_the_ending_gives_up(arrives_first: bool) -> None:
    """It is released by exactly one side: by the ending if it came before that gave up, else where it arrives."""
    late, connection = LateConnection(0), Invalidated()
    if arrives_first:
        late.refuse(connection)  # type: ignore[arg-type]
        assert late.give_up() is False
        assert not connection.discarded
    else:
        assert late.give_up() is True
        late.refuse(connection)  # type: ignore[arg-type]
        assert connection.discarded


def test_an_ending_that_gave_up_while_the_connection_arrived_releases_it() -> None:
    """The time is over and the connection is there: the next try succeeds, and nothing is discarded."""
    db = Database("sqlite://", **POOL)
    tries: list[str] = []
    with pytest.raises(BoomError), db.session_scope() as session:
        session.execute(text("SELECT 1"))
        state = db._unit_of_work().transaction

        def rollback() -> None:
            tries.append("rollback")
            if len(tries) == 1:
                state.late = LateConnection(0)
                state.late.arrived = True
                raise IllegalStateChangeError("the other thread is still on its way out", code="isce")
            Session.rollback(session)

        session.rollback = rollback  # type: ignore[method-assign]
        raise BoomError
    assert len(tries) == 2
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


def test_giving_up_keeps_no_other_connection(postgresql: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is stuck while it connects to one engine cannot end its transaction on another one: discarded."""
    monkeypatch.setattr("session_plugin.scope.lifecycle.LONGEST_WAIT", 0.02)
    url = postgresql.url("psycopg")
    db = Database({"default": url, "reports": url})
    reports = db.engines["reports"]
    with pytest.raises(BoomError), db.session_scope() as session:
        session.bind_mapper(Parent, reports)
        session.execute(text("SELECT 1"))
        sibling = Sibling(session, reports)
        unit = db._unit_of_work()
        sibling.let_go_once(lambda: unit.closed and not unit.in_transaction)
        raise BoomError
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    assert sibling.ended.wait(10)
    assert isinstance(sibling.error, ScopeClosedError)
    assert reports.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


def test_a_savepoint_without_end_keeps_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a savepoint is being set, SQLAlchemy refuses to invalidate the session; its connections are discarded."""
    monkeypatch.setattr("session_plugin.scope.lifecycle.LONGEST_WAIT", 0.02)
    monkeypatch.setattr("session_plugin.engines.guard.LONGEST_WAIT", 0.02)
    db = Database(f"sqlite:///{tmp_path / 'test.db'}", **POOL)
    setting, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    execute = db.engine.dialect.do_execute

    def slow(cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SAVEPOINT"):
            setting.set()
            assert go_on.wait(10)
        execute(cursor, statement, *rest)

    db.engine.dialect.do_execute = slow  # type: ignore[method-assign]
    errors: list[BaseException] = []

    def set_savepoint(session: Session) -> None:
        try:
            session.begin_nested()
            session.execute(text("SELECT 2"))
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    with pytest.raises(BoomError), db.session_scope() as session:
        session.execute(text("SELECT 1"))
        threading.Thread(target=set_savepoint, args=[session]).start()
        assert setting.wait(10)
        raise BoomError
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    go_on.set()
    assert ended.wait(10)
    assert errors
    db.dispose()
