"""The end of a unit of work when a part of it fails."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from session_plugin import AsyncDatabase, Database, Outcome, SessionScope, manual
from session_plugin._drive import run
from session_plugin._lifecycle import settle

from .harness import POOL, Base, Parent, insert
from .units import POSTGRESQL, SYNC, Units, on


class BoomError(Exception):
    pass


def fail_once(target: Any, name: str) -> list[str]:
    """The next call of this event raises."""
    failed: list[str] = []

    def listen(*args: Any) -> None:
        if not failed:
            failed.append(name)
            raise BoomError(name)

    event.listen(target, name, listen)
    return failed


def test_a_rollback_that_fails_discards_the_connection(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """The error that was on its way stays the one that is told; the pool is whole."""
    failed = fail_once(units.sync_engine, "rollback")

    def work(session: Session) -> None:
        insert("lost")(session)
        raise ZeroDivisionError

    with caplog.at_level(logging.WARNING, "session_plugin"), pytest.raises(ZeroDivisionError):
        units.run(work)
    assert failed == ["rollback"]
    assert "the connection is discarded" in caplog.text
    for number in range(6):
        units.run(insert(f"row {number}"))
    assert len(units.store.names()) == 6


def test_a_commit_that_fails_rolls_back(units: Units) -> None:
    """Also one that fails before it is sent, which leaves the transaction open."""
    fail_once(units.sync_engine, "commit")
    with pytest.raises(BoomError):
        units.run(insert("lost"))
    for number in range(6):
        units.run(insert(f"row {number}"))
    assert len(units.store.names()) == 6


@on(*POSTGRESQL)
def test_a_connection_that_the_server_ends_is_discarded(units: Units) -> None:
    """Whatever the step at which it ends: the error is told, nothing is written, the pool recovers."""

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
    """Two databases, one unit of work inside the other: both give their connections back."""
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
            scope = SessionScope(units.db, origin="test")
            await scope.session.run_sync(insert("lost"))
            await scope.aclose()
            await scope.aclose()

        units.runner.run(main())
    else:
        scope = SessionScope(units.db, origin="test")
        insert("lost")(scope.session)
        scope.close()
        scope.close()
    assert units.store.names() == []


def test_settling_twice_settles_what_came_in_between(units: Units) -> None:
    """Late work is a transaction of its own, and so are its hooks."""
    log: list[str] = []

    def late(scope: Any, name: str) -> Any:
        def work(session: Session) -> None:
            scope.add_hook("commit", lambda: log.append(name))
            insert(name)(session)

        return work

    async def main() -> None:
        scope = SessionScope(units.db, origin="test")
        for name in ("first", "second"):
            await scope.session.run_sync(late(scope, name))
            await scope.asettle(Outcome())
        await scope.session.run_sync(late(scope, "third"))
        await scope.asettle(Outcome(interrupted=True))
        await scope.aclose()

    if units.is_async:
        units.runner.run(main())
    else:
        scope = SessionScope(units.db, origin="test")
        for name in ("first", "second"):
            late(scope, name)(scope.session)
            scope.settle(Outcome())
        late(scope, "third")(scope.session)
        scope.settle(Outcome(interrupted=True))
        scope.close()
    assert units.store.names() == log == ["first", "second"]


def test_a_hook_that_stops_the_process_is_not_swallowed() -> None:
    """Only exceptions are logged; a KeyboardInterrupt goes on, and the connection is back."""
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
def test_a_sync_scope_under_an_event_loop_hops_only_to_talk(units: Units) -> None:
    """The ending runs in one thread of its own, and in none if there is nothing to say."""
    threads: list[Any] = []
    event.listen(units.sync_engine, "commit", lambda connection: threads.append(threading.current_thread()))

    async def main(work: Any) -> None:
        scope = SessionScope(units.db, origin="test")
        work(scope.session)
        await scope.asettle(Outcome())
        await scope.aclose()

    import asyncio

    asyncio.run(main(lambda session: None))
    asyncio.run(main(lambda session: session.begin()))
    assert threads == []
    asyncio.run(main(insert("tea")))
    assert [thread is threading.main_thread() for thread in threads] == [False]
    assert units.store.names() == ["tea"]


def test_an_ending_makes_the_calls_in_its_order() -> None:
    """The page of the lifecycle, read off the generator itself."""
    db = Database("sqlite://", metadata=Base.metadata, **POOL)
    db.create_all()
    scope = SessionScope(db, origin="test")
    insert("tea")(scope.session)
    calls = [call.__name__ for call in settle(scope, Outcome(status=404))]
    assert calls == ["rollback"]
    run(settle(scope, Outcome(status=404)))
    scope.close()
    db.dispose()


@on("sqlite+aiosqlite")
def test_a_stream_that_is_still_open_is_closed(units: Units) -> None:
    """A result of AsyncSession.stream() does not outlive the settling."""
    from sqlalchemy import select
    from sqlalchemy.exc import ResourceClosedError

    async def main() -> None:
        async with units.db.session_scope() as session:
            session.add_all(Parent(name=f"row {number}") for number in range(20))
            result = await session.stream_scalars(select(Parent))
            await anext(aiter(result))
        with pytest.raises(ResourceClosedError):
            await result.all()

    units.runner.run(main())


def test_a_two_phase_session_is_refused_by_an_aborted_transaction(postgresql: Any) -> None:
    """PREPARE TRANSACTION of an aborted transaction "succeeds" on PostgreSQL as well."""
    from session_plugin import TransactionAbortedError

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
    with pytest.raises(RuntimeError, match="no running event loop"):
        _ = SessionScope(db, origin="test").session
