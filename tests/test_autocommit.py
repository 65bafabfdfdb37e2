"""Reading without a transaction, under a policy that the database enforces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, create_mock_engine, func, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from bench.proxy import Proxy
from session_plugin import (
    ConfigurationError,
    Database,
    Outcome,
    ReadOnlyError,
    SessionScope,
    read_only,
    read_only_autocommit,
)
from session_plugin.database.interface import core_of
from session_plugin.engines.variants import forbid_writing
from session_plugin.scope import ending
from session_plugin.scope.opening import open_unit_of_work

from .drivers import POSTGRESQL, SYNC
from .harness import Parent, add, insert
from .units import Units, on

SETTING = {
    "sqlite": "PRAGMA query_only",
    "postgresql": "SHOW default_transaction_read_only",
    "mariadb": "SELECT @@session.tx_read_only",
}


def reading(units: Units, work: Callable[[Session], Any]) -> Any:
    """A unit of work under the policy."""

    def read(session: Session) -> Any:
        units.db.use(read_only_autocommit)
        return work(session)

    return units.run(read)


def names(session: Session) -> list[str]:
    return [*session.scalars(select(Parent.name))]


def dispose(units: Units) -> None:
    if units.is_async:
        units.runner.run(units.db.dispose())
    else:
        units.db.dispose()


def pools(units: Units) -> list[Any]:
    return [engine.pool for engine in core_of(units.db).engines.known]


def test_it_reads_what_is_committed(units: Units) -> None:
    """And gives its connection back; what is loaded stays readable."""
    units.run(add("tea"))
    parent = reading(units, lambda session: session.scalars(select(Parent)).one())
    assert parent.name == "tea"
    assert len(pools(units)) == 2
    assert [pool.checkedout() for pool in pools(units)] == [0, 0]


@on(*POSTGRESQL)
def test_no_transaction_is_begun(units: Units) -> None:
    """Each statement has a time, and so a transaction, of its own."""

    def moments(session: Session) -> int:
        return len({session.scalar(select(func.now())) for _ in range(3)})

    assert units.run(moments) == 1
    assert reading(units, moments) == 3


@on(*POSTGRESQL)
def test_a_query_is_one_round_trip(units: Units) -> None:
    """None goes to BEGIN and COMMIT, and none to the setting, once the connection is there."""
    units.run(add("tea"))
    with Proxy(units.store.url) as proxy:
        store = copy(units.store)
        store.url = proxy.url
        through = Units(units.driver, store)
        reading(through, names)
        proxy.count()
        assert reading(through, names) == ["tea"]
        assert proxy.count() == 1
        assert reading(through, lambda session: [names(session), names(session)]) == [["tea"], ["tea"]]
        assert proxy.count() == 2
        through.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO parent (name) VALUES ('lost')",
        "DELETE FROM parent",
        "CREATE TABLE more (id INTEGER)",
        "DROP TABLE child",
    ],
)
def test_the_database_refuses_what_would_write(units: Units, statement: str) -> None:
    """For certain, and the next unit of work on this database writes as ever."""
    units.run(add("tea"))
    with pytest.raises(DBAPIError):
        reading(units, lambda session: session.execute(text(statement)))
    assert not inspect(units.store.engine).has_table("more")
    units.run(insert("after"))
    assert units.store.names() == ["after", "tea"]


def test_the_session_refuses_to_flush(units: Units) -> None:
    with pytest.raises(ReadOnlyError):
        reading(units, lambda session: [session.add(Parent(name="lost")), session.flush()])
    assert units.store.names() == []


def test_an_error_that_is_caught_spoils_nothing(units: Units) -> None:
    """There is no transaction that it could have aborted."""

    def work(session: Session) -> Any:
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT * FROM nowhere"))
        return session.scalar(select(func.count()).select_from(Parent))

    assert reading(units, work) == 0


def test_no_setting_stays_behind(units: Units) -> None:
    """Neither is told to the connections of the others."""
    backend = units.driver.partition("+")[0]

    def setting(session: Session) -> bool:
        return session.scalar(text(SETTING[backend])) in (1, "on")

    assert not units.run(setting)
    assert reading(units, setting)
    assert not units.run(setting)


def test_it_ends_with_its_database(units: Units) -> None:
    """`dispose` closes its connections too, and later ones are made anew."""
    reading(units, names)
    dispose(units)
    assert [pool.checkedin() for pool in pools(units)] == [0, 0]
    assert reading(units, names) == []


@on(*SYNC)
def test_requests_and_jobs_share_the_connections(units: Units) -> None:
    reading(units, names)
    scope: SessionScope[Any] = open_unit_of_work(core_of(units.db), origin="GET /", method="GET")
    scope.use(read_only_autocommit)
    assert names(scope.session) == []
    ending.settle(scope, Outcome(200))
    ending.close(scope)
    assert [pool.checkedin() for pool in pools(units)].count(1) == 1


@on("sqlite+aiosqlite", "postgresql+asyncpg")
def test_on_another_event_loop(units: Units) -> None:
    """The connections of one that is closed are left alone."""
    reading(units, names)
    dispose(units)
    units.runner.close()
    units.runner = asyncio.Runner()
    assert reading(units, names) == []


def test_one_policy_of_this_kind_is_any_policy_of_this_kind(units: Units) -> None:
    """What makes it is that it is read-only, and without transactions."""
    own = replace(read_only, name="own", isolation_level="AUTOCOMMIT")

    def work(session: Session) -> None:
        units.db.use(own)
        session.execute(text("CREATE TABLE more (id INTEGER)"))

    with pytest.raises(DBAPIError):
        units.run(work)


def test_an_engine_made_elsewhere_is_told(tmp_path: Path) -> None:
    """How to connect to its database is not known; nothing is done by half."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    db = Database(engine)
    with pytest.raises(ConfigurationError, match="that you created yourself"), db.session_scope() as session:
        db.use(read_only_autocommit)
        session.execute(text("SELECT 1"))
    engine.dispose()


def test_a_database_that_cannot_be_told_is_named() -> None:
    engine = create_mock_engine("mssql+pyodbc://", lambda *statement: None)
    with pytest.raises(ConfigurationError, match="outside a transaction on mssql"):
        forbid_writing(engine)  # type: ignore[arg-type]
