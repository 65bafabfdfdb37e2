"""PgBouncer in transaction mode, where each transaction may run on a different server connection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from session_plugin import ReadOnlyError, commit_on_success, read_only

from .apps import AsyncFastAPIHarness, FlaskHarness
from .asgi_site import Site
from .contract import Contract, on
from .harness import Harness, Parent, Store, insert, wait_for
from .servers import PgBouncer, PostgreSQL
from .units import Units

CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "postgresql+psycopg": {"prepare_threshold": None},
    "postgresql+psycopg_async": {"prepare_threshold": None},
    "postgresql+psycopg2": {},
    "postgresql+asyncpg": {"statement_cache_size": 0, "prepared_statement_cache_size": 0},
}


class BouncedStore(Store):
    """A database that the app connects to through PgBouncer, and the test directly."""

    def __init__(self, driver: str, postgresql: PostgreSQL, pgbouncer: PgBouncer) -> None:
        super().__init__(driver, postgresql)
        self.pgbouncer = pgbouncer
        self.name = postgresql.shared_database
        url = pgbouncer.url(driver.split("+")[1], self.name)
        self.url = {"default": {"url": url, "connect_args": CONNECT_ARGS[driver]}}
        self.clear()

    def server_connections(self) -> tuple[int, int]:
        """How many server connections are in use, and how many clients wait for one, according to PgBouncer."""
        console = self.pgbouncer.url("psycopg", "pgbouncer").replace("+psycopg", "")
        with psycopg.connect(console, autocommit=True, row_factory=dict_row) as connection:
            pools = {pool["database"]: pool for pool in connection.execute("SHOW POOLS")}
        return pools[self.name]["sv_active"], pools[self.name]["cl_waiting"]


@pytest.fixture(scope="class")
def running(request: pytest.FixtureRequest, postgresql: PostgreSQL, pgbouncer: PgBouncer) -> Iterator[Harness]:
    harness_class, driver = request.param
    store = BouncedStore(driver, postgresql, pgbouncer)
    harness = harness_class(store)
    harness.start()
    yield harness
    harness.stop()
    store.engine.dispose()


class FlaskOnPsycopg2(FlaskHarness):
    drivers = ("postgresql+psycopg2",)


class AsyncOnAsyncpg(AsyncFastAPIHarness):
    drivers = ("postgresql+asyncpg",)


@on(FlaskOnPsycopg2)
class TestFlask(Contract):
    pass


@on(AsyncOnAsyncpg)
class TestAsyncFastAPI(Contract):
    pass


@pytest.fixture
def units(request: pytest.FixtureRequest, postgresql: PostgreSQL, pgbouncer: PgBouncer) -> Iterator[Units]:
    units = Units(request.param, BouncedStore(request.param, postgresql, pgbouncer), pool_size=2)
    yield units
    units.close()


on_each = pytest.mark.parametrize("units", CONNECT_ARGS, indirect=True)


STATE = text(
    "SELECT current_setting('transaction_read_only'), current_setting('default_transaction_read_only'), "
    "current_setting('transaction_isolation'), current_setting('default_transaction_isolation'), "
    "(SELECT count(*) FROM pg_prepared_statements)"
)
UNTOUCHED = ("off", "off", "read committed", "read committed", 0)


def states(units: Units) -> dict[int, tuple[Any, ...]]:
    """The settings that a unit of work under the default policy finds on each of PgBouncer's server connections."""
    found: dict[int, tuple[Any, ...]] = {}

    def look(session: Session) -> None:
        state = tuple(session.execute(STATE).one())
        found[session.scalar(text("SELECT pg_backend_pid()"))] = state

    if not units.is_async:
        with units.db.session_scope() as one, units.db.session_scope(new=True) as other:
            look(one)
            look(other)
        return found

    async def both() -> None:
        async with units.db.session_scope() as one, units.db.session_scope(new=True) as other:
            await one.run_sync(look)
            await other.run_sync(look)

    units.runner.run(both())
    return found


@on_each
def test_the_settings_of_a_policy_end_with_its_transaction(units: Units) -> None:
    """READ ONLY and an isolation level apply to one transaction; the next on that server connection has neither."""
    serializable = replace(commit_on_success, isolation_level="SERIALIZABLE")

    def read(session: Session) -> Any:
        units.db.use(replace(read_only, isolation_level="REPEATABLE READ"))
        return tuple(session.execute(STATE).one())[:4]

    def write(session: Session) -> Any:
        units.db.use(serializable)
        insert("tea")(session)
        return tuple(session.execute(STATE).one())[:4]

    for _ in range(3):
        assert units.run(read) == ("on", "off", "repeatable read", "read committed")
    assert units.run(write) == ("off", "off", "serializable", "read committed")
    assert len(found := states(units)) == PgBouncer.SERVER_CONNECTIONS
    assert {*found.values()} == {UNTOUCHED}
    units.run(insert("coffee"))
    assert units.store.names() == ["coffee", "tea"]


@on_each
def test_read_only_is_enforced(units: Units) -> None:
    """Under read_only the session refuses ORM writes, and the server refuses SQL that the session does not see."""

    def sneak(session: Session) -> None:
        units.db.use(read_only)
        session.connection().exec_driver_sql("INSERT INTO parent (name) VALUES ('tea')")

    with pytest.raises(Exception, match="read-only transaction"):
        units.run(sneak)
    with pytest.raises(ReadOnlyError):
        units.run(lambda session: (units.db.use(read_only), insert("tea")(session)))
    assert units.store.names() == []


@on_each
def test_many_statements_on_changing_server_connections(units: Units) -> None:
    """Statements that run on changing server connections never collide with statements prepared for other clients."""
    statements = [f"SELECT :number + {'+'.join(['0'] * (1 + number % 5))}" for number in range(40)]

    def work(session: Session) -> list[Any]:
        return [session.scalar(text(sql), {"number": number}) for number, sql in enumerate(statements)]

    if units.is_async:

        async def crowd() -> Any:
            return await asyncio.gather(*(units.arun(work, new=True) for _ in range(6)))

        results = [units.runner.run(crowd()) for _ in range(2)]
    else:
        with ThreadPoolExecutor(6) as pool:
            results = [list(pool.map(lambda _: units.run(work, new=True), range(6))) for _ in range(2)]
    assert results == [[list(range(40))] * 6] * 2
    assert {state[4] for state in states(units).values()} == {0}


@pytest.mark.parametrize("driver", ["postgresql+psycopg_async", "postgresql+asyncpg"])
def test_slow_readers_hold_no_server_connection(driver: str, postgresql: PostgreSQL, pgbouncer: PgBouncer) -> None:
    """With more unfinished streams than connections, none holds a server connection and other requests are served."""
    store = BouncedStore(driver, postgresql, pgbouncer)
    site = Site(store, pool_size=2)
    gate, reading = threading.Event(), []

    @site.app.get("/slow")
    async def slow() -> Any:
        names = (await site.db.session.scalars(select(Parent.name))).all()

        async def lines() -> Any:
            reading.append(1)
            yield "chunk"
            await asyncio.to_thread(gate.wait, 10)
            yield ",".join(names)

        return StreamingResponse(lines())

    @site.app.post("/{name}", status_code=201)
    async def create(name: str) -> None:
        site.db.session.add(Parent(name=name))

    with site.running(), ThreadPoolExecutor(4) as pool:
        site.get("/tea", "POST")
        readers = [pool.submit(site.get, "/slow") for _ in range(4)]
        try:
            assert wait_for(lambda: len(reading) == 4)
            assert [site.get(f"/{number}", "POST").status for number in range(6)] == [201] * 6
            assert wait_for(lambda: store.server_connections() == (0, 0))
        finally:
            gate.set()
        assert [reader.result().body for reader in readers] == [b"chunktea"] * 4
    store.engine.dispose()
