"""MariaDB, where the statement after a lost transaction silently begins another one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from session_plugin import Database, TransactionAbortedError, read_only
from session_plugin.engines.backends import MySQL

from .drivers import MARIADB
from .harness import POOL, Parent, insert
from .units import Units, on


def rename(name: str, to: str) -> Callable[[Session], Any]:
    return lambda session: session.execute(update(Parent).where(Parent.name == name).values(name=to))


def deadlock(units: Units) -> Callable[[Session], None]:
    """Work that deadlocks; InnoDB chooses it as the victim because the other transaction has written more."""

    def work(session: Session) -> None:
        rename("tea", "tea 1")(session)
        has_locked, other = threading.Event(), units.store.sessions()

        def lock_in_the_other_order() -> None:
            with other:
                other.add_all(Parent(name=f"row {number}") for number in range(20))
                rename("milk", "milk 2")(other)
                has_locked.set()
                rename("tea", "tea 2")(other)
                other.rollback()

        thread = threading.Thread(target=lock_in_the_other_order)
        thread.start()
        assert has_locked.wait(5)
        try:
            rename("milk", "milk 1")(session)
        finally:
            thread.join(5)

    return work


def lock_wait_timeout(units: Units) -> Callable[[Session], None]:
    """Work that times out on a lock; with ``innodb_rollback_on_timeout`` the server rolls it back."""

    def work(session: Session) -> None:
        with units.store.sessions() as other:
            rename("milk", "milk 2")(other)
            rename("milk", "milk 1")(session)

    return work


def changed_since_the_snapshot(units: Units) -> Callable[[Session], None]:
    """Work whose row has changed since its snapshot; ``innodb_snapshot_isolation`` is the default of newer servers."""

    def work(session: Session) -> None:
        session.execute(text("SET SESSION innodb_snapshot_isolation = ON"))
        session.execute(select(Parent)).all()
        with units.store.sessions.begin() as other:
            rename("milk", "milk 2")(other)
        session.execute(text("UPDATE parent SET name = 'milk 1' WHERE name LIKE 'milk%'"))

    return work


LOSSES = [deadlock, lock_wait_timeout, changed_since_the_snapshot]


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.__name__)
def lose(request: pytest.FixtureRequest) -> Any:
    return request.param


def continue_after(lose: Callable[[Session], None], session: Session) -> None:
    insert("first half")(session)
    with pytest.raises(OperationalError):
        lose(session)


@on("mariadb+pymysql")
def test_plain_sqlalchemy_commits_the_second_half(units: Units, lose: Any) -> None:
    """Without the plugin, MariaDB commits only what follows the lost transaction; the next tests guard against it."""
    units.run(insert("tea"))
    units.run(insert("milk"))
    with units.db.sessionmaker() as session:
        continue_after(lose(units), session)
        insert("second half")(session)
        session.commit()
    assert "second half" in units.store.names()
    assert "first half" not in units.store.names()


@on(*MARIADB)
def test_after_a_lost_transaction_nothing_is_executed(units: Units, lose: Any) -> None:
    """After a lost transaction no further statement writes, and the unit of work raises the cause."""
    units.run(insert("tea"))
    units.run(insert("milk"))

    def work(session: Session) -> None:
        continue_after(lose(units), session)
        for _ in range(2):
            insert("second half")(session)

    with pytest.raises(TransactionAbortedError, match="OperationalError") as caught:
        units.run(work)
    assert isinstance(caught.value.__cause__, OperationalError)
    assert {"first half", "second half"}.isdisjoint(units.store.names())


@on(*MARIADB)
def test_a_lost_transaction_is_not_committed(units: Units) -> None:
    """A unit of work whose last statement lost the transaction raises TransactionAbortedError at its end."""
    units.run(insert("tea"))
    units.run(insert("milk"))
    with pytest.raises(TransactionAbortedError):
        units.run(lambda session: continue_after(deadlock(units), session))
    units.run(insert("next"))
    assert units.store.names() == ["milk", "next", "tea"]


def test_a_full_lock_table_loses_the_transaction_too() -> None:
    """MariaDB's error 1206 (lock table full) counts as a lost transaction; a duplicate key does not.

    The test uses the error's number, because a lock table cannot be filled here.
    """
    pooled: Any = None
    dialect: Any = None
    assert MySQL().is_aborted(pooled, OperationalError("", {}, Exception(1206, "lock table full")), dialect)
    assert not MySQL().is_aborted(pooled, OperationalError("", {}, Exception(1062, "duplicate entry")), dialect)


@on(*MARIADB)
def test_rollback_recovers_from_a_deadlock(units: Units) -> None:
    """After `session.rollback()` a unit of work that deadlocked can write and commit again, as retry loops do."""
    units.run(insert("tea"))
    units.run(insert("milk"))

    def work(session: Session) -> None:
        continue_after(deadlock(units), session)
        session.rollback()
        insert("again")(session)

    units.run(work)
    assert units.store.names() == ["again", "milk", "tea"]


@on(*MARIADB)
def test_a_savepoint_does_not_survive_a_deadlock(units: Units) -> None:
    """A deadlock inside a savepoint loses the whole transaction, so nothing is committed."""
    units.run(insert("tea"))
    units.run(insert("milk"))

    def work(session: Session) -> None:
        insert("first half")(session)
        with session.begin_nested():
            deadlock(units)(session)

    with pytest.raises(TransactionAbortedError):
        units.run(work)
    assert "first half" not in units.store.names()


@on("mariadb+pymysql")
def test_read_only_lets_ddl_through(units: Units) -> None:
    """MariaDB commits before DDL, which ends the READ ONLY transaction; the DDL itself is not refused."""

    def create(session: Session) -> None:
        units.db.use(read_only)
        session.execute(text("CREATE TABLE more (id INTEGER)"))

    units.run(create)
    units.run(lambda session: session.execute(text("DROP TABLE more")))


def test_the_mysql_dialect_is_the_same(mariadb: Any) -> None:
    """Under a ``mysql://`` URL the read_only policy begins a READ ONLY transaction too."""
    url = mariadb.url("pymysql", mariadb.shared_database).replace("mariadb+", "mysql+")
    db = Database(url, **POOL)
    with pytest.raises(OperationalError, match="READ ONLY"), db.session_scope() as session:
        db.use(read_only)
        session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
    db.dispose()
