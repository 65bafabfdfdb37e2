"""The policy `read_only_autocommit`: reading without a transaction, on connections that refuse to write."""

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
    """Run ``work`` in a unit of work with the policy `read_only_autocommit`."""

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


def test_it_reads_committed_rows(units: Units) -> None:
    """A unit of work reads committed rows, releases its connection, and leaves the loaded objects readable."""
    units.run(add("tea"))
    parent = reading(units, lambda session: session.scalars(select(Parent)).one())
    assert parent.name == "tea"
    assert len(pools(units)) == 2
    assert [pool.checkedout() for pool in pools(units)] == [0, 0]


@on(*POSTGRESQL)
def test_no_transaction_is_begun(units: Units) -> None:
    """Each statement runs in its own transaction, so that now() differs between statements."""

    def moments(session: Session) -> int:
        return len({session.scalar(select(func.now())) for _ in range(3)})

    assert units.run(moments) == 1
    assert reading(units, moments) == 3


@on(*POSTGRESQL)
def test_a_query_is_one_round_trip(units: Units) -> None:
    """A query takes one round trip: the driver sends no BEGIN, no COMMIT and no setting on a pooled connection."""
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
def test_the_database_refuses_to_write(units: Units, statement: str) -> None:
    """The database refuses statements that write, and the next unit of work without the policy can write."""
    units.run(add("tea"))
    with pytest.raises(DBAPIError):
        reading(units, lambda session: session.execute(text(statement)))
    assert not inspect(units.store.engine).has_table("more")
    units.run(insert("after"))
    assert units.store.names() == ["after", "tea"]


def test_the_session_refuses_to_flush(units: Units) -> None:
    """A flush raises `ReadOnlyError`."""
    with pytest.raises(ReadOnlyError):
        reading(units, lambda session: [session.add(Parent(name="lost")), session.flush()])
    assert units.store.names() == []


def test_a_caught_error_does_not_prevent_further_statements(units: Units) -> None:
    """An error that is caught does not prevent further statements, because there is no transaction to abort."""

    def work(session: Session) -> Any:
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT * FROM nowhere"))
        return session.scalar(select(func.count()).select_from(Parent))

    assert reading(units, work) == 0


def test_the_read_only_setting_does_not_leak(units: Units) -> None:
    """The read-only setting does not leak to the connections of units of work with another policy."""
    backend = units.driver.partition("+")[0]

    def setting(session: Session) -> bool:
        return session.scalar(text(SETTING[backend])) in (1, "on")

    assert not units.run(setting)
    assert reading(units, setting)
    assert not units.run(setting)


def test_dispose_closes_the_read_only_connections(units: Units) -> None:
    """dispose() closes the read-only connections too, and later units of work open new ones."""
    reading(units, names)
    dispose(units)
    assert [pool.checkedin() for pool in pools(units)] == [0, 0]
    assert reading(units, names) == []


@on(*SYNC)
def test_requests_and_jobs_share_the_connections(units: Units) -> None:
    """Units of work of requests and of jobs use the same read-only pool."""
    reading(units, names)
    scope: SessionScope[Any] = open_unit_of_work(core_of(units.db), origin="GET /", method="GET")
    scope.use(read_only_autocommit)
    assert names(scope.session) == []
    ending.settle(scope, Outcome(200))
    ending.close(scope)
    assert [pool.checkedin() for pool in pools(units)].count(1) == 1


@on("sqlite+aiosqlite", "postgresql+asyncpg")
def test_reuse_on_another_event_loop(units: Units) -> None:
    """A database that was disposed of can be used again on another event loop."""
    reading(units, names)
    dispose(units)
    units.runner.close()
    units.runner = asyncio.Runner()
    assert reading(units, names) == []


def test_a_custom_policy_with_autocommit_is_read_only(units: Units) -> None:
    """Any policy that is read-only and has the isolation level AUTOCOMMIT refuses to write."""
    own = replace(read_only, name="own", isolation_level="AUTOCOMMIT")

    def work(session: Session) -> None:
        units.db.use(own)
        session.execute(text("CREATE TABLE more (id INTEGER)"))

    with pytest.raises(DBAPIError):
        units.run(work)


def test_an_engine_that_the_user_created_raises(tmp_path: Path) -> None:
    """An engine that the user created raises `ConfigurationError`, because its connect options are unknown."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    db = Database(engine)
    with pytest.raises(ConfigurationError, match="that you created yourself"), db.session_scope() as session:
        db.use(read_only_autocommit)
        session.execute(text("SELECT 1"))
    engine.dispose()


def test_an_unsupported_dialect_is_named() -> None:
    """A dialect without a read-only setting raises an error that names it."""
    engine = create_mock_engine("mssql+pyodbc://", lambda *statement: None)
    with pytest.raises(ConfigurationError, match="outside a transaction on mssql"):
        forbid_writing(engine)  # type: ignore[arg-type]
