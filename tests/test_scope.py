"""Units of work on every driver: how they begin, join and end, and what they refuse."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields
from http import HTTPStatus
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import sqlalchemy
from sqlalchemy import create_engine, event, inspect, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool
from sqlalchemy.util import await_only
from starlette.exceptions import HTTPException

import session_plugin.starlette  # noqa: F401  it recognizes a raised redirect
from session_plugin import (
    AsyncDatabase,
    ConcurrentUseError,
    ConfigurationError,
    Database,
    Decision,
    NoScopeError,
    Outcome,
    Policy,
    PolicyError,
    ReadOnlyError,
    ScopeClosedError,
    SessionPluginError,
    TransactionAbortedError,
    commit_on_success,
    manual,
    read_only,
    read_only_autocommit,
)
from session_plugin.database.interface import core_of
from session_plugin.engines.guard import ConnectionGuard, guard_of
from session_plugin.scope import ending
from session_plugin.scope.current import Entered
from session_plugin.scope.opening import open_unit_of_work
from session_plugin.scope.permits import wait_for_permit
from session_plugin.scope.transaction_state import TransactionState

from .drivers import POSTGRESQL, SQLITE, SYNC
from .harness import Base, Parent, add, add_orphan, count, insert
from .units import Units, on


class BoomError(Exception):
    pass


def boom(session: Session) -> None:
    raise BoomError


# -- 12: outside requests --------------------------------------------------------------------------


def test_a_block_commits(units: Units) -> None:
    units.run(add("tea"))
    assert units.store.names() == ["tea"]


def test_an_error_rolls_the_block_back(units: Units) -> None:
    def work(session: Session) -> None:
        insert("tea")(session)
        boom(session)

    with pytest.raises(BoomError):
        units.run(work)
    assert units.store.names() == []


def test_a_failed_commit_leaves_the_block(units: Units) -> None:
    """The error of COMMIT is SQLAlchemy's own, and the next block sees nothing of the failed one."""
    with pytest.raises(units.store.commit_error):
        units.run(add_orphan)
    for _ in range(6):
        units.run(lambda session: session.merge(Parent(name="nobody")))
    assert units.store.names() == ["nobody"]


@pytest.mark.parametrize("does", ["write", "read", "nothing"])
def test_a_unit_of_work_leaves_nothing_to_the_garbage_collector(units: Units, does: str) -> None:
    """A session is freed when its unit of work ends; a cycle would keep its rows until the next garbage collection."""
    made: list[ref[Session]] = []

    def noted(session: Session) -> None:
        made.append(ref(session))
        if does == "read":
            session.get(Parent, "tea")
        elif does == "write":
            session.add(Parent(name=f"tea {len(made)}"))

    units.run(noted)  # on first use drivers and SQLAlchemy leave some garbage of their own
    gc.collect()
    gc.disable()
    try:
        units.run(noted)
        assert [found() for found in made] == [None, None]
    finally:
        gc.enable()


@on("sqlite+pysqlite")
def test_plain_sqlalchemy_returns_a_connection_in_a_transaction(units: Units) -> None:
    """With plain SQLAlchemy on SQLite a connection returns to the pool in a transaction after a failed COMMIT.

    The tests for a failed commit guard against this.
    """
    with Session(units.store.engine) as session:
        add_orphan(session)
        connection: Any = session.connection().connection.driver_connection
        with pytest.raises(IntegrityError):
            session.commit()
    assert connection.in_transaction
    connection.rollback()


@on(*SQLITE)
def test_a_failed_explicit_commit_and_a_close_leave_no_transaction(units: Units) -> None:
    """After a failed commit and a close by the user, the connection returns to the pool without an open transaction."""

    def work(session: Session) -> None:
        add_orphan(session)
        with pytest.raises(IntegrityError):
            session.commit()
        session.close()

    units.run(work)
    for _ in range(6):
        units.run(lambda session: session.merge(Parent(name="nobody")))
    assert units.store.names() == ["nobody"]


def test_an_inner_block_joins(units: Units) -> None:
    """Inside an open unit of work `session_scope()` joins it, and only the outer block commits."""

    async def both() -> None:
        async with units.db.session_scope() as outer:
            async with units.db.session_scope() as inner:
                assert inner is outer
                await inner.run_sync(insert("tea"))
            assert units.store.names() == []

    if units.is_async:
        units.runner.run(both())
    else:
        with units.db.session_scope() as outer:
            with units.db.session_scope() as inner:
                assert inner is outer is units.db.session
                insert("tea")(inner)
            assert units.store.names() == []
    assert units.store.names() == ["tea"]


def test_a_swallowed_error_of_an_inner_block_dooms_the_outer(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    async def swallow() -> None:
        async with units.db.session_scope() as session:
            await session.run_sync(insert("tea"))
            with pytest.raises(BoomError):
                async with units.db.session_scope():
                    raise BoomError

    with caplog.at_level(logging.WARNING, "session_plugin"):
        if units.is_async:
            units.runner.run(swallow())
        else:
            with units.db.session_scope() as session:
                insert("tea")(session)
                with pytest.raises(BoomError), units.db.session_scope():
                    raise BoomError
    assert units.store.names() == []
    assert "BoomError left a session_scope() inside it" in caplog.text


@on(*POSTGRESQL)
def test_a_new_block_is_independent(units: Units) -> None:
    """`session_scope(new=True)` commits on its own, and its error does not doom the outer unit of work."""

    async def audit() -> None:
        async with units.db.session_scope() as outer:
            await outer.run_sync(insert("order"))
            await units.arun(insert("audit"), new=True)
            with pytest.raises(BoomError):
                await units.arun(boom, new=True)
            assert units.store.names() == ["audit"]
            assert units.db.session is outer

    if units.is_async:
        units.runner.run(audit())
    else:
        with units.db.session_scope() as outer:
            insert("order")(outer)
            units.run(insert("audit"), new=True)
            with pytest.raises(BoomError):
                units.run(boom, new=True)
            assert units.store.names() == ["audit"]
            assert units.db.session is outer
    assert units.store.names() == ["audit", "order"]


def test_outside_any_scope_there_is_no_session(units: Units) -> None:
    """Outside any unit of work the accessors raise NoScopeError with advice, and `hasattr(db, "session")` is False."""
    for ask in (lambda: units.db.session, lambda: units.db.doom(), lambda: units.db.on_commit(print)):
        with pytest.raises(NoScopeError, match=r"session_scope\(\)"):
            ask()
    assert not hasattr(units.db, "session")


def test_an_inherited_scope_is_not_joined_after_its_end() -> None:
    """In a task that outlives its unit of work `db.session` raises, and `session_scope()` opens a new unit of work."""

    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://")
        ended = asyncio.Event()

        async def outlive() -> Any:
            await ended.wait()
            with pytest.raises(ScopeClosedError, match=r"session_scope\(\)"):
                _ = await db.session.execute(text("SELECT 1"))
            async with db.session_scope() as session:
                return session

        async with db.session_scope() as first:
            task = asyncio.create_task(outlive())
        ended.set()
        assert await task is not first
        await db.dispose()

    asyncio.run(main())


def test_a_closed_scope_is_not_the_outer_scope_of_a_new_one() -> None:
    """A task that inherited a closed unit of work opens a new one inside the next outer one that is still open."""
    db = Database("sqlite://")
    outer = open_unit_of_work(core_of(db), origin="outer")
    with Entered(outer):
        closed = open_unit_of_work(core_of(db), origin="closed")
        ending.close(closed)
        with Entered(closed):
            assert open_unit_of_work(core_of(db), origin="next").outer is outer
    db.dispose()


@on(*SYNC)  # SQLAlchemy itself cannot return the connection of an async session that is garbage-collected
def test_a_swallowed_error_does_not_keep_a_scope_that_is_never_closed(units: Units) -> None:
    """After a swallowed error the traceback does not keep an unclosed session alive.

    Its connection is returned, and a ResourceWarning is issued.
    """
    scope = open_unit_of_work(core_of(units.db), origin="left open")
    insert("tea")(scope.session)
    scope.session.expunge_all()
    with contextlib.suppress(IntegrityError):
        insert("tea")(scope.session)
    with pytest.warns(ResourceWarning, match="left open was never closed"):
        del scope
        gc.collect()
    assert units.sync_engine.pool.checkedout() == 0


def test_a_scope_that_is_never_closed_warns() -> None:
    """The ResourceWarning about a unit of work that was never closed says where it was opened."""
    db = Database("sqlite://")
    scope = open_unit_of_work(core_of(db), origin="POST /orders")
    scope.session.execute(text("SELECT 1"))
    with pytest.warns(ResourceWarning, match="POST /orders was never closed and held a connection"):
        del scope
        gc.collect()
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


# -- 2: no connection and no transaction unless they are used --------------------------------------


def test_an_unused_session_takes_no_connection(units: Units) -> None:
    taken: list[Any] = []

    def listen(*args: Any) -> None:
        taken.append(args)

    from sqlalchemy import event

    event.listen(units.sync_engine, "checkout", listen)
    units.run(lambda session: None)
    assert taken == []


# -- 4: no phantom commit --------------------------------------------------------------------------


def insert_and_swallow(session: Session) -> None:
    insert("tea")(session)
    with pytest.raises(IntegrityError):
        session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))


def test_an_aborted_transaction_does_not_commit(units: Units) -> None:
    if units.store.backend in ("sqlite", "mariadb"):  # their transactions survive a failed statement
        units.run(insert_and_swallow)
        assert units.store.names() == ["tea"]
        return
    with pytest.raises(TransactionAbortedError, match="IntegrityError") as caught:
        units.run(insert_and_swallow)
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert units.store.names() == []


@on(*POSTGRESQL)
def test_an_error_while_reading_a_stream_is_detected(units: Units) -> None:
    """An error while rows are read, long after the statement was executed, also prevents the commit."""

    def work(session: Session) -> None:
        insert("lost")(session)
        rows = session.execute(text("SELECT 1 / (99 - n) FROM generate_series(1, 99) n").execution_options(yield_per=5))
        with pytest.raises(Exception, match="division by zero"):  # asyncpg raises its own error class
            rows.all()

    with pytest.raises(TransactionAbortedError):
        units.run(work)
    assert units.store.names() == []


@on("postgresql+psycopg")
def test_plain_sqlalchemy_makes_a_phantom_commit(units: Units) -> None:
    """With plain SQLAlchemy `commit()` returns although nothing is saved; the tests before guard against that."""
    with units.db.sessionmaker() as session:
        insert_and_swallow(session)
        session.commit()
    assert units.store.names() == []


@on(*POSTGRESQL)
def test_an_explicit_commit_of_an_aborted_transaction_raises_and_can_be_recovered(units: Units) -> None:
    def work(session: Session) -> None:
        insert_and_swallow(session)
        with pytest.raises(TransactionAbortedError):
            session.commit()
        session.rollback()
        insert("milk")(session)

    units.run(work)
    assert units.store.names() == ["milk"]


@on(*POSTGRESQL)
def test_the_database_itself_refuses_what_follows_a_caught_error(units: Units) -> None:
    """The plugin refuses only the COMMIT of an aborted transaction; before that PostgreSQL's own errors are raised."""

    def work(session: Session) -> None:
        insert_and_swallow(session)
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            session.execute(select(1))
        session.rollback()

    units.run(work)
    assert units.store.names() == []


@on(*SQLITE)
def test_a_transaction_that_sqlite_ended_does_not_count_as_committed(units: Units) -> None:
    """If INSERT OR ROLLBACK ends the whole transaction inside a block, the block raises TransactionAbortedError."""

    def work(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT OR ROLLBACK INTO parent (name) VALUES ('tea')"))

    with pytest.raises(TransactionAbortedError):
        units.run(work)
    assert units.store.names() == []


def test_a_recovered_savepoint_commits(units: Units) -> None:
    def work(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    units.run(work)
    assert units.store.names() == ["tea"]


# -- 5 and policies --------------------------------------------------------------------------------


def test_manual_keeps_only_what_was_committed(units: Units) -> None:
    def work(session: Session) -> None:
        units.db.use(manual)
        insert("kept")(session)
        session.commit()
        insert("lost")(session)

    units.run(work)
    assert units.store.names() == ["kept"]


def test_a_custom_policy(units: Units) -> None:
    seen: list[Outcome] = []

    def only_errors(outcome: Outcome) -> Decision:
        seen.append(outcome)
        return Decision(outcome.error is not None, "the other way round")

    def work(session: Session) -> None:
        units.db.use(only_errors)
        insert("tea")(session)
        boom(session)

    with pytest.raises(BoomError):
        units.run(work)
    assert units.store.names() == ["tea"]
    assert [type(outcome.error) for outcome in seen] == [BoomError]


@pytest.mark.parametrize("policy", [lambda outcome: True, lambda outcome: 1 / 0], ids=["nonsense", "raises"])
def test_a_policy_that_fails_commits_nothing(units: Units, policy: Any) -> None:
    def work(session: Session) -> None:
        units.db.use(policy)
        insert("tea")(session)

    with pytest.raises(PolicyError, match=r"[Nn]othing was committed"):
        units.run(work)
    assert units.store.names() == []


@pytest.mark.parametrize(("status", "is_error"), [(303, False), (399, False), (400, True), (500, True)])
def test_an_exception_that_is_a_response_is_an_error_from_400_on(status: int, is_error: bool) -> None:
    error = HTTPException(status, "told")
    assert Outcome.raised(error) == Outcome(status=status, error=error if is_error else None)


@pytest.mark.parametrize(("status", "failed"), [(None, None), (399, None), (400, "status 400")])
def test_a_response_is_a_failure_from_400_on(status: int | None, failed: str | None) -> None:
    assert Outcome(status=status).failed == failed


def test_an_outcome_shows_the_class_of_its_error_only() -> None:
    """The repr of an outcome names only the class of its error, because its text may contain statement parameters."""
    shown = repr(Outcome(status=500, error=BoomError("secret"), method="POST"))
    assert "error=BoomError" in shown
    assert "secret" not in shown
    assert "error=None" in repr(Outcome())


@pytest.mark.parametrize(
    "fact", [Outcome(status=200), Decision(True, "success"), commit_on_success], ids=lambda fact: type(fact).__name__
)
def test_what_crosses_a_boundary_is_frozen(fact: Any) -> None:
    for field in fields(fact):
        with pytest.raises(FrozenInstanceError):
            setattr(fact, field.name, None)


def test_use_refuses_an_object_that_is_not_a_policy(units: Units) -> None:
    def work(session: Session) -> None:
        with pytest.raises(PolicyError, match="commit_on_success"):
            units.db.use("read_only")

    units.run(work)


def test_use_after_the_transaction_began_is_too_late(units: Units) -> None:
    def work(session: Session) -> None:
        units.db.use(commit_on_success)
        insert("tea")(session)
        units.db.use(manual)  # begins in the same way, so it is not too late
        with pytest.raises(PolicyError, match="too late"):
            units.db.use(read_only)

    units.run(work)
    assert units.store.names() == []


def test_read_only_refuses_to_flush(units: Units) -> None:
    def work(session: Session) -> None:
        units.db.use(read_only)
        session.add(Parent(name="tea"))

    with pytest.raises(ReadOnlyError, match="Parent"):
        units.run(work)
    assert units.store.names() == []


@pytest.mark.parametrize(
    "statement",
    [
        sqlalchemy.insert(Parent).values(name="tea"),
        sqlalchemy.update(Parent).values(name="tea"),
        sqlalchemy.delete(Parent),
    ],
)
def test_read_only_refuses_statements_that_write(units: Units, statement: Any) -> None:
    """Under read_only a writing statement raises ReadOnlyError before it is sent to the database."""

    def work(session: Session) -> None:
        units.db.use(read_only)
        for send in (session.execute, session.scalars, session.scalar):
            with pytest.raises(ReadOnlyError):
                send(statement)

    units.run(work)


def test_a_plain_string_raises_sqlalchemys_error() -> None:
    """Under read_only a plain string raises SQLAlchemy's ArgumentError, which says what to do."""
    db = Database("sqlite://", policy=read_only)
    with db.session_scope() as session, pytest.raises(ArgumentError, match=r"text\("):
        session.execute("SELECT 1")  # type: ignore[call-overload]
    db.dispose()


def test_read_only_is_enforced_by_the_database(units: Units) -> None:
    refused_by_the_database(units, "INSERT INTO parent (name) VALUES ('x')")


@on(*SQLITE, *POSTGRESQL)
def test_read_only_refuses_ddl(units: Units) -> None:
    refused_by_the_database(units, "CREATE TABLE more (id INTEGER)")


def refused_by_the_database(units: Units, statement: str) -> None:
    """Insist that the database refuses ``statement``, and that the pooled connections can write afterwards."""

    def work(session: Session) -> None:
        units.db.use(read_only)
        session.execute(text(statement))

    for _ in range(6):
        with pytest.raises(DBAPIError, match=r"(?i)read.?only"):
            units.run(work)
    for number in range(6):
        units.run(insert(f"row {number}"))
    assert len(units.store.names()) == 6


@pytest.mark.parametrize("policy", [read_only, manual], ids=lambda policy: policy.name)
def test_what_was_only_read_stays_readable(policy: Policy, units: Units) -> None:
    units.run(insert("tea"))
    loaded: list[Parent] = []

    def work(session: Session) -> None:
        units.db.use(policy)
        loaded.extend(session.scalars(select(Parent)))

    units.run(work)
    assert [row.name for row in loaded] == ["tea"]


@pytest.mark.parametrize("autobegin", [True, False])
def test_a_rollback_that_discards_nothing_keeps_what_is_loaded(autobegin: bool, tmp_path: Path) -> None:
    """A rollback that discards no work leaves loaded rows in the session, and begins no transaction.

    A rollback that discards work expires them.
    """
    db = Database(f"sqlite:///{tmp_path}/test.db", metadata=Base.metadata, policy=manual, autobegin=autobegin)
    db.create_all()
    with db.session_scope() as session:
        if not autobegin:
            session.begin()
        session.add(Parent(name="tea"))
        session.commit()
        session.begin()
        row = session.scalar(select(Parent))
        assert row is not None
        db.scope.settle(Outcome())
        assert not inspect(row).expired_attributes and row in session
        assert not session.in_transaction()

        session.begin()
        row.name = "coffee"
        db.scope.settle(Outcome())
        assert inspect(row).expired_attributes
        assert not session.in_transaction()
    db.dispose()


def test_a_row_can_be_added_to_the_next_unit_of_work(units: Units) -> None:
    """A loaded row is detached when its unit of work ends, even if something still references the session."""
    units.run(insert("tea"))
    loaded: list[Any] = []
    units.run(lambda session: loaded.extend([session.scalar(select(Parent)), session]))

    def rename(session: Session) -> None:
        session.add(loaded[0])
        loaded[0].name = "coffee"

    units.run(rename)
    assert units.store.names() == ["coffee"]


def test_only_a_settling_expires_nothing(tmp_path: Path) -> None:
    """Settling expires no rows, but an explicit commit afterwards follows the session's ``expire_on_commit``."""
    db = Database(f"sqlite:///{tmp_path / 'shop.db'}", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add(row := Parent(name="tea"))
        db.scope.settle(Outcome())
        assert not inspect(row).expired_attributes
        row.name = "coffee"
        session.commit()
        assert inspect(row).expired_attributes
    db.dispose()


@on(*POSTGRESQL)
def test_isolation_level_of_a_policy(units: Units) -> None:
    """The isolation level of a policy applies to one transaction and is not left on the connection."""
    from dataclasses import replace

    serializable = replace(commit_on_success, isolation_level="SERIALIZABLE")
    levels: list[Any] = []

    def show(session: Session) -> None:
        levels.append(session.scalar(text("SHOW transaction_isolation")))

    def work(session: Session) -> None:
        units.db.use(serializable)
        show(session)

    units.run(work)
    units.run(show)
    assert levels == ["serializable", "read committed"]


def test_transactions_that_begin_alike_share_a_variant_of_the_engine() -> None:
    """The engine variant for a kind of transaction is created once, for the first that needs it."""
    db, made = Database("sqlite://"), []
    event.listen(db.engine, "set_engine_execution_options", lambda engine, options: made.append(options))
    for policy in (commit_on_success, manual, read_only, read_only):
        with db.session_scope() as session:
            db.use(policy)
            session.connection()
    assert len(made) == 2
    db.dispose()


@pytest.mark.parametrize("connected", [True, False])
def test_a_doomed_scope_refuses_an_explicit_commit(units: Units, connected: bool) -> None:
    """A doomed unit of work refuses `commit()` and rolls back, whether it was doomed before or after it connected."""

    def work(session: Session) -> None:
        if connected:
            session.connection()
        units.db.doom("dry run")
        insert("tea")(session)
        with pytest.raises(TransactionAbortedError, match="dry run"):
            session.commit()

    units.run(work)
    assert units.store.names() == []


def test_the_log_shows_the_decision_and_its_reason(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """Each end is logged with its reason.

    COMMIT, and ROLLBACK without work, are logged at DEBUG.  Discarded work is logged at INFO after an error, and at
    WARNING after a success.
    """
    caplog.set_level(logging.DEBUG, "session_plugin")

    def fail(session: Session) -> None:
        insert("tea")(session)
        boom(session)

    def dooms(session: Session) -> None:
        add("tea")(session)
        units.db.doom("dry run")

    def only_reads(session: Session) -> None:
        session.execute(text("SELECT 1"))
        units.db.doom("nothing new")

    units.run(insert("milk"))
    with pytest.raises(BoomError):
        units.run(fail)
    units.run(dooms)
    units.run(only_reads)
    logged = [(record.levelname, record.getMessage().split(": ", 1)[1]) for record in caplog.records]
    assert [level_and_message for level_and_message in logged if "journal" not in level_and_message[1]] == [
        ("DEBUG", "COMMIT (success)"),
        ("INFO", "ROLLBACK, its work is discarded (BoomError)"),
        ("WARNING", "ROLLBACK, its work is discarded (doomed: dry run)"),
        ("DEBUG", "ROLLBACK (doomed: nothing new)"),
    ]


# -- 10: hooks -------------------------------------------------------------------------------------


def test_hooks_belong_to_the_commit_that_follows(units: Units) -> None:
    """Commit hooks run once, in order, after the next commit, explicit or not."""
    log: list[Any] = []

    def work(session: Session) -> None:
        insert("a")(session)
        units.db.on_commit(log.append, 1)
        units.db.on_commit(log.append, 2)
        session.commit()
        assert log == [1, 2]
        units.db.on_commit(log.append, 3)

    units.run(work)
    assert log == [1, 2, 3]


def test_hooks_of_a_savepoint_that_rolls_back_are_dropped(units: Units) -> None:
    """A savepoint that rolls back drops its commit hooks, at any depth; its rollback hooks run at the end.

    Hooks of a released savepoint wait for the commit.
    """
    log: list[Any] = []

    def work(session: Session) -> None:
        units.db.on_commit(log.append, "outer")
        insert("kept")(session)
        with session.begin_nested():
            units.db.on_commit(log.append, "released")
            with pytest.raises(BoomError), session.begin_nested():
                units.db.on_commit(log.append, "dropped")
                units.db.on_rollback(log.append, "undone")
                with session.begin_nested():
                    units.db.on_commit(log.append, "dropped with what encloses it")
                boom(session)
        assert log == []

    units.run(work)
    assert log == ["outer", "released", "undone"]


def test_hooks_of_a_savepoint_inside_a_flush_belong_to_the_outer_savepoint(units: Units) -> None:
    """Hooks of a savepoint inside a flush are dropped with the savepoint around the flush.

    SQLAlchemy puts the flush's own transaction between the two.
    """
    log: list[Any] = []

    def work(session: Session) -> None:
        @event.listens_for(session, "after_flush")
        def in_a_savepoint(session: Session, context: Any) -> None:
            with session.begin_nested():
                units.db.on_commit(log.append, "dropped with what encloses it")

        with pytest.raises(BoomError), session.begin_nested():
            insert("lost")(session)
            boom(session)

    units.run(work)
    assert log == []


def test_a_rollback_hook_runs_if_its_own_savepoint_rolls_back(units: Units) -> None:
    """A rollback hook runs if its savepoint rolls back; that of a released savepoint is dropped on commit."""
    log: list[Any] = []

    def work(session: Session) -> None:
        with session.begin_nested():
            units.db.on_rollback(log.append, "released")
        with pytest.raises(BoomError), session.begin_nested():
            units.db.on_rollback(log.append, "undone")
            boom(session)

    units.run(work)
    assert log == ["undone"]


def test_hooks_do_not_run_on_the_release_of_a_savepoint(units: Units) -> None:
    log: list[Any] = []

    def work(session: Session) -> None:
        with session.begin_nested():
            units.db.on_commit(log.append, "never")
        boom(session)

    with pytest.raises(BoomError):
        units.run(work)
    assert log == []


def test_hooks_without_a_transaction_run_at_the_end(units: Units) -> None:
    log: list[Any] = []
    units.run(lambda session: units.db.on_commit(log.append, "commit"))
    assert log == ["commit"]

    def fail(session: Session) -> None:
        units.db.on_rollback(log.append, "rollback")
        boom(session)

    with pytest.raises(BoomError):
        units.run(fail)
    assert log == ["commit", "rollback"]


def test_a_hook_may_be_registered_before_the_session_is_asked_for() -> None:
    """A hook that is registered before a session exists runs after the settling."""
    db, ran = Database("sqlite://"), []
    scope = open_unit_of_work(core_of(db), origin="POST /orders")
    with Entered(scope):
        db.on_commit(ran.append, "tea")
    ending.settle(scope, Outcome())
    ending.close(scope)
    assert ran == ["tea"]
    db.dispose()


def test_a_hook_has_a_separate_unit_of_work(units: Units) -> None:
    """Each hook's work with the session is committed separately; a hook that fails does not affect the others."""

    def hook(name: str, *, fail: bool = False) -> Any:
        def sync_hook() -> None:
            units.db.session.add(Parent(name=name))
            if fail:
                raise BoomError

        async def async_hook() -> None:
            sync_hook()

        return async_hook if units.is_async else sync_hook

    def work(session: Session) -> None:
        insert("order")(session)
        units.db.on_commit(hook("first"))
        units.db.on_commit(hook("failed", fail=True))
        units.db.on_commit(hook("last"))

    units.run(work)
    assert units.store.names() == ["first", "last", "order"]


def test_hooks_run_after_with_begin(units: Units) -> None:
    """Hooks registered in a ``with session.begin()`` block run after it, outside the unit of work that continues."""
    seen: list[Any] = []

    def hook() -> None:
        seen.append(units.db.scope)

    def work(session: Session) -> None:
        with session.begin():
            insert("tea")(session)
            units.db.on_commit(hook)
        assert seen != [units.db.scope]

    units.run(work)
    assert len(seen) == 1


def test_a_hook_must_be_callable(units: Units) -> None:
    def work(session: Session) -> None:
        with pytest.raises(ConfigurationError, match="cannot be called"):
            units.db.on_commit(None)

    units.run(work)


@on(*SYNC)
def test_a_sync_database_refuses_coroutine_hooks(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """A sync database refuses a coroutine function at registration.

    A callable that returns a coroutine is logged, and the coroutine is closed.
    """

    async def hook() -> None:
        raise AssertionError("never awaited")

    def work(session: Session) -> None:
        with pytest.raises(ConfigurationError, match="AsyncDatabase"):
            units.db.on_commit(hook)
        units.db.on_commit(lambda: hook())

    units.run(work)
    assert "returned a coroutine" in caplog.text


# -- 7: early release ------------------------------------------------------------------------------


def test_the_connection_is_back_before_the_hooks(units: Units) -> None:
    held: list[int] = []

    def work(session: Session) -> None:
        insert("tea")(session)
        units.db.on_commit(lambda: held.append(units.sync_engine.pool.checkedout()))

    units.run(work)
    assert held == [0]


# -- 11: after the end, and two at once ------------------------------------------------------------


def test_a_closed_session_refuses_everything_that_would_reopen_it(units: Units) -> None:
    """A closed session refuses everything that would reopen it, whatever its ``close_resets_only`` option."""
    kept: list[Session] = []

    def work(session: Session) -> None:
        insert("tea")(session)
        kept.append(session)

    units.run(work)
    session = kept[0]
    for use in (
        lambda: session.execute(text("SELECT 1")),
        lambda: session.connection(),
        lambda: session.begin(),
        lambda: session.commit(),
        lambda: session.add(Parent(name="milk")),
        lambda: session.get(Parent, "tea"),
    ):
        with pytest.raises(ScopeClosedError, match="has ended"):
            use()
        assert not session.in_transaction()


def test_close_by_the_user_resets_as_sqlalchemy_does(units: Units) -> None:
    def work(session: Session) -> None:
        insert("lost")(session)
        session.close()
        insert("kept")(session)

    units.run(work)
    assert units.store.names() == ["kept"]


def test_two_tasks_at_once_are_refused() -> None:
    """Two tasks in one session at once are refused with advice to use `new=True`, and no connection is lost."""

    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://")

        async def branch(new: bool) -> None:
            async with db.session_scope(new=new) as session:
                for _ in range(5):
                    await session.execute(text("SELECT 1"))

        async with db.session_scope():
            results = await asyncio.gather(branch(False), branch(False), return_exceptions=True)
        assert any(isinstance(result, ConcurrentUseError | InvalidRequestError) for result in results)
        assert any("session_scope(new=True)" in str(result) for result in results)
        assert await asyncio.gather(branch(True), branch(True)) == [None, None]
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await db.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("driver", ["psycopg_async", "asyncpg"])
def test_two_tasks_at_once_on_postgresql(postgresql: Any, driver: str) -> None:
    """The end of a unit of work waits for another task's query that is still running."""

    async def main() -> None:
        db = AsyncDatabase(postgresql.url(driver), pool_size=2, max_overflow=0)

        async with db.session_scope() as session:
            await session.execute(text("SELECT 1"))
            sleeping = asyncio.create_task(session.execute(text("SELECT pg_sleep(0.3)")))
            while not db._unit_of_work().transaction.busy:
                await asyncio.sleep(0.01)
            with pytest.raises(ConcurrentUseError, match="session_scope"):
                await session.execute(text("SELECT 1"))
            db.use(manual)
        assert sleeping.done()
        assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        for _ in range(4):
            async with db.session_scope() as session:
                assert await session.scalar(text("SELECT 1")) == 1
        await db.dispose()

    asyncio.run(main())


@pytest.mark.parametrize("policy", [commit_on_success, read_only_autocommit], ids=lambda policy: policy.name)
def test_two_threads_at_once_are_refused(postgresql: Any, policy: Policy) -> None:
    db = Database(postgresql.url("psycopg"), pool_size=2, max_overflow=0, policy=policy)
    with db.session_scope() as session:
        session.execute(text("SELECT 1"))
        started = threading.Event()

        def sibling() -> None:
            started.set()
            session.execute(text("SELECT pg_sleep(0.5)"))

        thread = threading.Thread(target=sibling)
        thread.start()
        started.wait()
        while not db._unit_of_work().transaction.busy:
            assert thread.is_alive()
        with pytest.raises(ConcurrentUseError, match="session_scope"):
            session.execute(text("SELECT 1"))
        thread.join()
        assert session.scalar(text("SELECT 1")) == 1
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


def test_the_end_waits_for_the_statement_of_a_thread(postgresql: Any) -> None:
    db = Database(postgresql.url("psycopg"), pool_size=1, max_overflow=0)
    results = []
    with pytest.raises(ConcurrentUseError), db.session_scope() as session:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        statement = text("SELECT pg_backend_pid() FROM pg_sleep(0.3)")
        thread = threading.Thread(target=lambda: results.append(session.scalar(statement)))
        thread.start()
        while not db._unit_of_work().transaction.busy:
            assert thread.is_alive()
    thread.join()
    with db.session_scope() as session:
        assert [session.scalar(text("SELECT pg_backend_pid()"))] == results == [pid]
    db.dispose()


def test_all_accessors_return_the_same_session(units: Units) -> None:
    def work(session: Session) -> None:
        scoped = units.db.scoped_session
        own = scoped.registry()
        assert units.db.session is own
        assert units.db.scope.session is own
        scoped.remove if units.is_async else scoped.remove()
        assert units.db.session is own

    units.run(work)


@on(*SYNC)
def test_settling_keeps_loaded_attributes(units: Units) -> None:
    """Inside the block ``expire_on_commit`` works as in SQLAlchemy; the settling itself expires nothing."""
    rows: list[Parent] = []

    def work(session: Session) -> None:
        insert("tea")(session)
        rows.extend(session.scalars(select(Parent)))
        session.commit()
        assert "name" not in rows[0].__dict__
        assert rows[0].name == "tea"

    units.run(work)
    assert rows[0].name == "tea"
    assert units.run(count) == 1


def test_one_async_database_serves_one_event_loop_after_the_other() -> None:
    """An async database works on one event loop after another, as in tests; on two at once it raises an error."""
    db = AsyncDatabase("sqlite+aiosqlite://", metadata=Base.metadata)

    async def live(name: str) -> None:
        await db.create_all()
        async with db.session_scope() as session:
            await session.run_sync(insert(name))

    async def live_and_dispose(name: str) -> None:
        await live(name)
        await db.dispose()

    asyncio.run(live_and_dispose("first"))
    asyncio.run(live_and_dispose("second"))

    async def elsewhere() -> None:
        async with db.session_scope():
            with pytest.raises(SessionPluginError, match="one AsyncDatabase per loop"):
                await asyncio.to_thread(asyncio.run, live("third"))
        await db.dispose()

    asyncio.run(elsewhere())


def test_an_async_database_gets_a_new_pool_after_its_loop_was_closed() -> None:
    """On a new event loop an async database gets a new pool, even if it was not disposed of on the closed loop."""
    db = AsyncDatabase("sqlite+aiosqlite://", poolclass=NullPool)

    async def pool() -> Any:
        async with db.session_scope() as session:
            await session.execute(text("SELECT 1"))
        return db.engine.sync_engine.pool

    assert asyncio.run(pool()) is not asyncio.run(pool())


def test_the_connections_of_a_closed_loop_are_left_alone() -> None:
    """Connections of a closed event loop are not closed, because that would need the loop."""
    db = AsyncDatabase("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool)
    closed: list[Any] = []
    event.listen(db.engine.sync_engine, "close", lambda *more: closed.append(more))

    async def work() -> None:
        async with db.session_scope() as session:
            connection: Any = (await (await session.connection()).get_raw_connection()).driver_connection
        await connection.close()  # closed directly, while its pool still has it

    asyncio.run(work())
    asyncio.run(work())
    assert closed == []


def test_a_raised_redirect_that_leaves_a_joined_block_dooms_nothing(units: Units) -> None:
    """A raised redirect is a response, not an error, so leaving a joined block with it does not doom the outer one."""
    if units.is_async:

        async def main() -> None:
            async with units.db.session_scope() as session:
                await session.run_sync(insert("tea"))
                with pytest.raises(HTTPException):
                    async with units.db.session_scope():
                        raise HTTPException(302)

        units.runner.run(main())
    else:
        with units.db.session_scope() as session:
            insert("tea")(session)
            with pytest.raises(HTTPException), units.db.session_scope():
                raise HTTPException(302)
    assert units.store.names() == ["tea"]


def test_a_scope_that_ended_without_a_session_creates_none(units: Units) -> None:
    async def aend(scope: Any) -> None:
        await ending.aclose(scope)

    scope: Any = open_unit_of_work(core_of(units.db), origin="GET /")
    if units.is_async:
        units.runner.run(aend(scope))
    else:
        ending.close(scope)
    with pytest.raises(ScopeClosedError, match=r"GET /\) has ended"):
        _ = scope.session


def test_two_threads_that_ask_at_once_get_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    db = Database("sqlite://")
    scope = open_unit_of_work(core_of(db), origin="test")
    sessions: list[Any] = []
    make = core_of(db).new_session
    second = threading.Thread(target=lambda: sessions.append(scope.session))

    def make_while_the_second_waits(unit: Any) -> Session:
        second.start()
        while sys._current_frames()[second.ident or 0].f_code.co_name != "session":
            pass
        return make(unit)

    monkeypatch.setattr(core_of(db), "new_session", make_while_the_second_waits)
    sessions.append(scope.session)
    second.join()
    assert sessions[0] is sessions[1]
    ending.close(scope)
    db.dispose()


def test_a_read_only_scope_may_flush_what_has_not_changed(units: Units) -> None:
    units.run(insert("tea"))

    def work(session: Session) -> None:
        units.db.use(read_only)
        row = session.get(Parent, "tea")
        row.name = "tea"  # type: ignore[union-attr]
        session.flush()

    units.run(work)


def test_work_after_the_response_that_is_not_saved_is_an_error_in_the_log(
    units: Units, caplog: pytest.LogCaptureFixture
) -> None:
    """Work after the response that is not saved is logged as an error, because no response can report it."""

    def orphan(session: Session) -> None:
        add_orphan(session)

    async def asettle(work: Any, outcome: Outcome) -> None:
        scope: Any = open_unit_of_work(core_of(units.db), origin="POST /orders")
        try:
            await scope.session.run_sync(work)
            await ending.asettle(scope, outcome)
        finally:
            await ending.aclose(scope)

    def settle(work: Any, outcome: Outcome) -> None:
        scope: Any = open_unit_of_work(core_of(units.db), origin="POST /orders")
        try:
            work(scope.session)
            ending.settle(scope, outcome)
        finally:
            ending.close(scope)

    def end(work: Any, outcome: Outcome) -> None:
        units.runner.run(asettle(work, outcome)) if units.is_async else settle(work, outcome)

    with pytest.raises(units.store.commit_error):
        end(orphan, Outcome(background=True))
    end(insert("tea"), Outcome(error=BoomError(), background=True))
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors[0] == f"POST /orders: the work after the response was not saved ({units.store.commit_error.__name__})"
    assert errors[1] == "POST /orders: ROLLBACK, its work is discarded (BoomError)"
    assert units.store.names() == []


def test_a_guard_removes_only_itself_from_its_connection(units: Units) -> None:
    """If two guards share a connection, releasing the first leaves the second in place."""
    with units.store.engine.connect() as connection:
        first, second = ConnectionGuard(connection, {}, int), ConnectionGuard(connection, {}, int)
        first.release()
        assert guard_of(connection) is second
        second.release()
        assert guard_of(connection) is None


@pytest.mark.parametrize("how", ["plain", "many", "no parameters"])
def test_a_statement_is_guarded_however_it_is_sent(units: Units, how: str) -> None:
    """An INSERT counts as work that would be lost, whichever driver method sends it."""

    def send(session: Session) -> None:
        plain = text("INSERT INTO parent (name) VALUES ('tea')")
        if how == "many":
            session.execute(text("INSERT INTO parent (name) VALUES (:name)"), [{"name": "tea"}, {"name": "milk"}])
        else:
            session.execute(plain, execution_options={"no_parameters": True} if how == "no parameters" else {})

    def work(session: Session) -> None:
        send(session)
        assert units.db.scope.wrote
        with pytest.raises(DBAPIError):
            send(session)
        units.db.doom("seen")

    units.run(work)
    assert units.store.names() == []


def test_a_later_read_does_not_reset_wrote() -> None:
    """A statement that only reads does not reset `scope.wrote`, even if it begins with WITH."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
        session.execute(text("WITH one AS (SELECT 1) SELECT * FROM one"))
        assert db.scope.wrote
    db.dispose()


def test_engines_of_one_dialect_are_guarded_once(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    Database(engine)
    commit = engine.dialect.do_commit
    Database(engine.execution_options(logging_token="reports"))
    assert engine.dialect.do_commit is commit


def test_a_returned_connection_has_no_guard(units: Units) -> None:
    """A returned connection has no guard, even if something such as a traceback still references the guard."""
    guards: list[Any] = []
    units.run(lambda session: guards.append(guard_of(session.connection())))
    connections: list[Any] = []
    event.listen(units.sync_engine, "checkout", lambda driver, record, proxy: connections.append(dict(record.info)))
    units.run(lambda session: session.connection())
    assert guards[0] is not None
    assert guards[0] not in [held() for info in connections for held in info.values() if callable(held)]


def test_a_settled_scope_cannot_be_joined() -> None:
    """A settled unit of work cannot be joined, even if it had nothing to settle; later work is late work."""
    db = Database("sqlite://")
    scope = open_unit_of_work(core_of(db), origin="test")
    ending.settle(scope, Outcome())
    assert not scope.can_be_joined
    ending.close(scope)
    db.dispose()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_transaction_ended_by_hand_needs_no_settling(end: str) -> None:
    """After an explicit commit or rollback there is nothing to settle until the next statement."""
    db = Database("sqlite://")
    scope = open_unit_of_work(core_of(db), origin="test")
    for _ in range(2):
        scope.session.execute(text("SELECT 1"))
        assert scope.active
        getattr(scope.session, end)()
        assert not scope.active
    ending.close(scope)
    db.dispose()


@pytest.mark.parametrize(
    ("statement", "status", "saved"),
    [("SELECT 1", 200, False), ("DELETE FROM parent", 200, True), ("DELETE FROM parent", 404, False)],
)
def test_a_scope_has_saved_what_a_settling_committed(statement: str, status: int, saved: bool) -> None:
    """`scope.saved` is True once a settling has committed writes, so no response may claim that nothing was saved."""
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    scope = open_unit_of_work(core_of(db), origin="test")
    scope.session.execute(text(statement))
    ending.settle(scope, Outcome(status))
    assert scope.saved is saved
    ending.close(scope)
    db.dispose()


@pytest.mark.parametrize("change", ["new", "dirty", "deleted"])
def test_a_flush_beside_a_task_that_takes_the_connection_is_refused_before_it_begins(change: str) -> None:
    """A flush while another task takes the connection is refused before it begins.

    If it failed later, it would end the other task's transaction.  An empty flush needs no connection.
    """

    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://", metadata=Base.metadata)
        await db.create_all()
        connecting, gate = asyncio.Event(), asyncio.Event()

        def wait(*connection: Any) -> None:
            connecting.set()
            await_only(gate.wait())

        async with db.session_scope() as session:
            session.add(tea := Parent(name="tea"))
            await session.commit()
            event.listen(db.engine.sync_engine, "checkout", wait)
            asking = asyncio.create_task(session.scalar(text("SELECT 42")))
            await connecting.wait()
            await session.flush()
            if change == "new":
                session.add(Parent(name="milk"))
            elif change == "dirty":
                tea.name = "milk"
            else:
                session.sync_session.delete(tea)
            with pytest.raises(ConcurrentUseError):
                await session.flush()
            gate.set()
            assert await asking == 42
        await db.dispose()

    asyncio.run(main())


def test_two_threads_at_once_are_refused_on_two_engines_too() -> None:
    """While one thread waits on a connection, another thread may not use the session on another engine either."""
    db = Database({"default": "sqlite://", "other": "sqlite://"})
    asked, gate = threading.Event(), threading.Event()

    def wait() -> bool:
        asked.set()
        return gate.wait(10)

    with db.session_scope() as session, ThreadPoolExecutor(1) as elsewhere:
        session.connection().connection.driver_connection.create_function("wait", 0, wait)  # type: ignore[union-attr]
        waiting = elsewhere.submit(session.scalar, text("SELECT wait()"))
        try:
            assert asked.wait(10)
            with pytest.raises(ConcurrentUseError):
                session.execute(text("SELECT 1"), bind_arguments={"bind": db.engines["other"]})
        finally:
            gate.set()
        assert waiting.result()
    db.dispose()


def test_a_statement_is_not_concurrent_with_itself() -> None:
    """A call that a statement makes in its own thread, such as a SQLite function, is not concurrent use."""
    db = Database("sqlite://")
    with db.session_scope() as session:
        connection: Any = session.connection().connection.driver_connection
        connection.create_function("is_busy", 0, lambda: db._unit_of_work().transaction.busy)
        assert not session.scalar(text("SELECT is_busy()"))
    db.dispose()


@pytest.mark.parametrize("statuses", [(HTTPStatus.CREATED, 201), (202, HTTPStatus.ACCEPTED)])
def test_an_outcome_has_the_status_that_was_given(statuses: tuple[int, int]) -> None:
    """An outcome keeps the status object that it was given, not an equal one of another request."""
    for status in statuses:
        assert Outcome.of_response(status, None, "GET").status is status
        assert commit_on_success.decide(Outcome(status)).reason == f"status {status}"


def test_requests_that_end_alike_share_their_outcome_and_its_decision() -> None:
    """Equal outcomes and decisions are shared: they are frozen, and creating them is the slowest part of a decision."""
    first, second = (Outcome.of_response(200, None, "GET") for _ in range(2))
    assert first is second
    assert commit_on_success.decide(first) is commit_on_success.decide(second)


def test_a_refused_flush_is_refused_again() -> None:
    """A thread is refused to flush for as long as another one is flushing."""
    work = TransactionState(Session())
    work.begin_flush()

    def flush() -> None:
        for _ in range(2):
            with pytest.raises(ConcurrentUseError):
                work.begin_flush()

    with ThreadPoolExecutor(1) as other:
        other.submit(flush).result()


@on("sqlite+aiosqlite")
def test_a_scope_cannot_be_joined_while_it_is_being_settled(units: Units) -> None:
    """A unit of work cannot be joined from the moment on at which its settling is requested."""

    async def main() -> None:
        scope = open_unit_of_work(core_of(units.db), origin="test")
        await scope.session.run_sync(insert("tea"))
        settling = asyncio.create_task(ending.asettle(scope, Outcome()))
        await asyncio.sleep(0)
        assert not scope.can_be_joined
        await settling
        await ending.aclose(scope)

    units.runner.run(main())


def test_each_scope_takes_one_permit_and_returns_it() -> None:
    """A permit that is requested twice, or granted only after the end of its unit of work, is returned."""
    db = Database("sqlite://", pool_size=2, max_overflow=0)

    async def main() -> None:
        first, second, asked_twice, ends_early, last = (open_unit_of_work(core_of(db), origin="test") for _ in range(5))
        await wait_for_permit(first)
        await wait_for_permit(second)
        waiting = [asyncio.create_task(wait_for_permit(scope)) for scope in (asked_twice, asked_twice, ends_early)]
        await asyncio.sleep(0)
        await ending.aclose(ends_early)
        await ending.aclose(first)
        await ending.aclose(second)
        await asyncio.wait_for(asyncio.gather(*waiting), 5)
        await wait_for_permit(asked_twice)
        await wait_for_permit(ends_early)
        await asyncio.wait_for(wait_for_permit(last), 5)
        await ending.aclose(asked_twice)
        await ending.aclose(last)

    asyncio.run(main())
    db.dispose()


def test_a_scope_may_be_left_in_another_context(units: Units) -> None:
    """A unit of work may be entered and left in different contexts, as in a fixture whose halves run in two tasks."""
    scope: Any = open_unit_of_work(core_of(units.db), origin="test")
    block = Entered(scope)
    contextvars.copy_context().run(block.__enter__)
    block.__exit__(None, None, None)
    with pytest.raises(NoScopeError):
        _ = units.db.session


@on(*SYNC)
def test_no_transaction_begins_while_an_unused_session_is_discarded(units: Units) -> None:
    """A session that is being discarded refuses a new transaction, which would never be closed."""
    scope: Any = open_unit_of_work(core_of(units.db), origin="test")
    session = scope.session
    refused: list[BaseException] = []

    def begin() -> None:
        with pytest.raises(ScopeClosedError) as caught:
            insert("lost")(session)
        refused.append(caught.value)

    scope.permit = begin
    ending.close(scope)
    assert len(refused) == 1


def test_closing_an_unsettled_scope_returns_its_permit() -> None:
    """Closing an unsettled unit of work returns the connection, then the permit, and discards the session."""
    db = Database("sqlite://")
    scope: Any = open_unit_of_work(core_of(db), origin="test")
    scope.session.connection()
    held: list[int] = []
    scope.permit = lambda: held.append(db.engine.pool.checkedout())  # type: ignore[attr-defined]
    ending.close(scope)
    assert held == [0]
    with pytest.raises(ScopeClosedError):
        _ = scope.session
    db.dispose()


def test_a_transaction_is_tracked_though_an_earlier_listener_hid_its_begin() -> None:
    """If an earlier listener fails at the begin, the work is still committed and the connection is returned."""
    failures = [BoomError()]

    def fail_once(session: Session, transaction: Any) -> None:
        if failures:
            raise failures.pop()

    event.listen(Session, "after_transaction_create", fail_once, insert=True)
    try:
        db = Database("sqlite://", metadata=Base.metadata, pool_size=1, max_overflow=0)
        db.create_all()
        with db.session_scope() as session:
            with pytest.raises(BoomError):
                session.begin()
            insert("tea")(session)
        with db.session_scope() as session:
            assert count(session) == 1
    finally:
        event.remove(Session, "after_transaction_create", fail_once)
    db.dispose()


def test_listeners_from_before_the_import_do_not_hide_a_transaction() -> None:
    """If a listener from before the import fails at the begin, the work of the transaction is committed anyway.

    This holds even if no statement has been executed yet.
    """
    program = """
from sqlalchemy import event
from sqlalchemy.orm import Session

failures = [ValueError()]

@event.listens_for(Session, "after_transaction_create")
def fail_once(session, transaction):
    if failures:
        raise failures.pop()

from session_plugin import Database
from tests.harness import Base, add, count

db = Database("sqlite://", metadata=Base.metadata)
db.create_all()
with db.session_scope() as session:
    try:
        session.begin()
    except ValueError:
        add("tea")(session)
with db.session_scope() as session:
    print(count(session))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"


@pytest.mark.parametrize("name", ["after_commit", "after_transaction_end"])
def test_listeners_from_before_the_import_do_not_hide_a_commit(name: str) -> None:
    """An error of a listener from before the import does not leave the block after COMMIT, and the hooks run."""
    program = f"""
from sqlalchemy import event, text
from sqlalchemy.orm import Session

failures = [ValueError()]

@event.listens_for(Session, "{name}")
def fail_once(session, *ended):
    if failures:
        raise failures.pop()

from session_plugin import Database
from tests.harness import Base, count

db = Database("sqlite://", metadata=Base.metadata)
db.create_all()
with db.session_scope() as session:
    session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
    db.on_commit(print, "committed")
with db.session_scope() as session:
    print(count(session))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "committed\n1\n"


@on(*SYNC)
def test_a_doom_before_the_session(units: Units) -> None:
    scope: Any = open_unit_of_work(core_of(units.db), origin="test")
    scope.doom("dry run")
    insert("lost")(scope.session)
    ending.settle(scope, Outcome())
    ending.close(scope)
    assert units.store.names() == []


def test_unsaved_work_of_a_joined_block_that_outlives_its_scope() -> None:
    db = Database("sqlite://")
    scope = open_unit_of_work(core_of(db), origin="test")
    with Entered(scope), pytest.raises(ScopeClosedError), db.session_scope() as session:
        session.add(Parent(name="lost"))
        scope.closed = True
    ending.close(scope)
    db.dispose()


@pytest.mark.parametrize(("code", "names"), [(None, ["tea"]), (0, ["tea"]), (1, []), ("failed", [])])
def test_leaving_a_block_with_exit_code_0_is_a_success(code: Any, names: list[str], units: Units) -> None:
    """``sys.exit(0)`` ends a job well and commits; any other exit code rolls back."""

    def work(session: Session) -> None:
        insert("tea")(session)
        sys.exit(code)

    with pytest.raises(SystemExit):
        units.run(work)
    assert units.store.names() == names


@pytest.mark.parametrize("new", [True, False])
def test_an_exit_in_a_request_rolls_back(new: bool, tmp_path: Path) -> None:
    """In a request `SystemExit` means that the server stops its worker: nothing is committed, whatever its code."""
    db = Database(f"sqlite:///{tmp_path}/shop.db", metadata=Base.metadata)
    db.create_all()
    unit = open_unit_of_work(core_of(db), origin="POST /orders", method="POST")
    with Entered(unit), pytest.raises(SystemExit), db.session_scope(new=new) as session:
        insert("tea")(session)
        sys.exit(0)
    assert new or unit.doomed is not None
    ending.settle(unit, Outcome(status=201))
    ending.close(unit)
    with db.session_scope() as session:
        assert session.scalars(select(Parent)).all() == []
    db.dispose()


@pytest.mark.parametrize("flushes", [True, False])
def test_closing_the_session_with_work_warns(flushes: bool, units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """A ``close()`` or ``with session:`` of old code that discards work is named in the log."""

    def work(session: Session) -> None:
        with session:
            session.add(Parent(name="tea"))
            if flushes:
                session.flush()

    units.run(work)
    assert units.store.names() == []
    assert ["closed with work that was not committed" in record.message for record in caplog.records] == [True]


def test_closing_the_session_without_work_is_silent(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """A ``close()`` after a commit, or after reading, discards nothing and is not logged."""

    def work(session: Session) -> None:
        count(session)
        session.close()
        insert("tea")(session)
        session.commit()
        session.close()

    units.run(work)
    assert units.store.names() == ["tea"]
    assert not caplog.records


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the drivers
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@on("postgresql+asyncpg", "postgresql+psycopg_async")
def test_the_connections_of_a_closed_loop_are_closed(units: Units) -> None:
    """A database that meets one event loop after the other keeps open the connections of the last one only."""

    async def work() -> None:
        async with units.db.session_scope() as session:
            await session.execute(text("SELECT 1 AS of_a_loop"))

    with units.store.engine.connect() as admin:
        find = text(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%' || 'of_a' || '_loop%' OR state = 'idle'"
        )
        counts = []
        for _ in range(6):
            asyncio.run(work())
            admin.rollback()
            counts.append(admin.scalar(find))

    async def last() -> None:
        await work()
        await units.db.dispose()

    asyncio.run(last())
    gc.collect()  # here, where the drivers may warn
    assert max(counts) - counts[0] <= 1, counts


def test_the_message_about_another_loop_says_what_it_does(tmp_path: Path) -> None:
    """The error says whether the other event loop still runs, or has stopped and was not closed."""
    db = AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path}/shop.db")

    async def work() -> None:
        async with db.session_scope():
            pass

    loop = asyncio.new_event_loop()
    loop.run_until_complete(work())
    with pytest.raises(ConfigurationError, match="has stopped and was not closed"):
        asyncio.run(work())
    loop.close()
    asyncio.run(work())
    asyncio.run(db.dispose())


def test_the_scope_that_an_app_sees() -> None:
    """``db.scope`` is the same for the same unit of work, and shows whether it is settled."""
    db = Database("sqlite://")
    with db.session_scope():
        scope = db.scope
        assert {scope, db.scope} == {scope}
        scope.use(manual)
        assert (scope.policy, scope.settled, scope.closed) == (manual, False, False)
        with db.session_scope(new=True):
            assert db.scope != scope
    assert (scope.settled, scope.closed) == (True, True)
