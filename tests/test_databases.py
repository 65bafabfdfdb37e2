"""Measures how each driver and its database behave, and compares the results with the table in ``docs/databases.md``.

After an intended change, run with SESSION_PLUGIN_TEST_WRITE=1 to write the measured table to the page.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, inspect, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, ResourceClosedError
from sqlalchemy.orm import Session

from session_plugin import ConcurrentUseError, ReadOnlyError, TransactionAbortedError, read_only

from .drivers import ASYNC, SYNC
from .harness import Parent, add, add_orphan, insert, wait_for
from .units import Units

PAGE = Path(__file__).parents[1] / "docs" / "databases.md"
WRITE = "SESSION_PLUGIN_TEST_WRITE"
TABLE = "<!-- measured by the tests -->"
NAP = {"postgresql": "SELECT pg_sleep({})", "mariadb": "SELECT SLEEP({})"}
KILL = {
    "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend({})"),
    "mariadb": ("SELECT CONNECTION_ID()", "KILL CONNECTION {}"),
}

Probe = Callable[[Units], str]


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def raises(error: type[Exception], units: Units, work: Callable[[Session], Any]) -> bool:
    try:
        units.run(work)
    except error:
        return True
    return False


def unused(units: Units) -> str:
    return yes_or_no(units.run(lambda session: units.sync_engine.pool.checkedout()) == 0)


def failed_commit(units: Units) -> str:
    error_raised = raises(units.store.commit_error, units, add_orphan)
    for _ in range(6):
        units.run(lambda session: session.merge(Parent(name="next")))
    return yes_or_no(error_raised and units.store.names() == ["next"])


def swallowed_error(units: Units) -> str:
    def work(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    if raises(TransactionAbortedError, units, work):
        return "COMMIT is refused" if units.store.names() == [] else "half"
    return "is good" if units.store.names() == ["tea"] else "phantom"


def savepoint(units: Units) -> str:
    def work(session: Session) -> None:
        insert("tea")(session)
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))

    units.run(work)
    return yes_or_no(units.store.names() == ["tea"])


def ddl(units: Units) -> str:
    def work(session: Session) -> None:
        session.execute(text("CREATE TABLE more (id INTEGER)"))
        units.db.doom("dry run")

    units.run(work)
    rolled_back = not inspect(units.store.engine).has_table("more")
    with units.store.engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS more"))
    return yes_or_no(rolled_back)


def under_read_only(error: type[Exception], work: Callable[[Session], Any]) -> Probe:
    def probe(units: Units) -> str:
        def write(session: Session) -> None:
            units.db.use(read_only)
            work(session)

        refused = raises(error, units, write)
        units.run(insert("next"))  # the policy has no effect on the next unit of work
        with units.store.engine.begin() as connection:
            connection.execute(text("DROP TABLE IF EXISTS more"))
        return yes_or_no(refused)

    return probe


def stream(units: Units) -> str:
    units.run(lambda session: session.add_all(Parent(name=f"row {number}") for number in range(20)))
    streams = []

    def work(session: Session) -> None:
        streams.append(session.scalars(select(Parent).execution_options(yield_per=5)))
        next(streams[0])

    units.run(work)
    with pytest.raises(ResourceClosedError):
        streams[0].all()
    return "yes"


def two_phases(units: Units) -> str:
    def work(session: Session) -> None:
        with units.sync_engine.connect() as connection, connection.begin_twophase() as transaction:
            connection.execute(Parent.__table__.insert().values(name="tea"))
            transaction.prepare()

    try:
        units.run(work)
    except Exception:
        return "no"
    return yes_or_no(units.store.names() == ["tea"])


def killed(units: Units) -> str:
    if units.store.backend not in KILL:
        return ""
    who, kill = KILL[units.store.backend]

    def work(session: Session) -> None:
        insert("tea")(session)
        own = session.scalar(text(who))
        with units.store.engine.connect() as connection:
            connection.execute(text(kill.format(own)))

    error_raised = raises(DBAPIError, units, work)
    units.run(insert("next"))
    return yes_or_no(error_raised and units.store.names() == ["next"])


def two_at_once(units: Units) -> str:
    if not units.is_async:
        return ""  # tests/test_scope.py tests threads
    slow = select(func.count()).select_from(Parent)
    if units.store.backend in NAP:
        slow = text(NAP[units.store.backend].format(0.2))

    async def both() -> None:
        async with units.db.session_scope() as session:
            await session.execute(select(1))
            await asyncio.gather(session.execute(slow), session.execute(slow))

    with pytest.raises(ConcurrentUseError):
        units.runner.run(both())
    return "yes"


def cancelled(units: Units) -> str:
    if not units.is_async or units.store.backend not in NAP:
        return ""

    async def work() -> None:
        async with units.db.session_scope() as session:
            session.add(Parent(name="tea"))
            await session.flush()
            await session.execute(text(NAP[units.store.backend].format(1.5)))

    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work(), 0.1)

    units.runner.run(cancel())
    assert units.sync_engine.pool.checkedout() == 0
    ended_at_once = wait_for(lambda: units.store.open_transactions() == [], 0.5)
    assert wait_for(lambda: units.store.open_transactions() == [])
    units.run(insert("next"))
    assert units.store.names() == ["next"]
    return "at once" if ended_at_once else "with its statement"


PROBES: dict[str, Probe] = {
    "[2](promises.md#2-no-session-connection-or-wait-unless-used): an unused session takes no connection": unused,
    "[3](promises.md#3-the-response-tells-the-truth), [6](promises.md#6-clean-connections): "
    "a failed COMMIT is reported, and its connection is clean": failed_commit,
    "[4](promises.md#4-no-phantom-commit): after an error that the code caught, the transaction": swallowed_error,
    "[4](promises.md#4-no-phantom-commit): a savepoint takes the error": savepoint,
    "[5](promises.md#5-roll-back-on-errors): DDL is rolled back": ddl,
    "[6](promises.md#6-clean-connections): a connection that the server ends is reported, and the next one works": (
        killed
    ),
    "[6](promises.md#6-clean-connections): cancelled in the middle of a statement, its transaction ends": cancelled,
    "[7](promises.md#7-early-release): an open stream is closed, and says so": stream,
    "[11](promises.md#11-a-closed-session-cannot-be-reused): two tasks at once are refused": two_at_once,
    "[`read_only`](policies.md) refuses to flush": under_read_only(ReadOnlyError, add("tea")),
    "[`read_only`](policies.md): the database refuses to write": under_read_only(
        DBAPIError, lambda session: session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
    ),
    "[`read_only`](policies.md): the database refuses DDL": under_read_only(
        DBAPIError, lambda session: session.execute(text("CREATE TABLE more (id INTEGER)"))
    ),
    "[Two phases](guide.md#two-phases)": two_phases,
}


def measure(units: Units) -> list[str]:
    column = []
    for probe in PROBES.values():
        units.store.clear()
        column.append(probe(units))
    return column


def table_of(columns: dict[str, list[str]]) -> str:
    names = [driver.partition("+")[2].removesuffix("_async") for driver in columns]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[row, *cells] for row, *cells in zip(PROBES, *columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def documented() -> dict[str, list[str]]:
    lines = PAGE.read_text().partition(TABLE)[2].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")[1:]] for line in lines[: len(PROBES)]]
    return dict(zip([*SYNC, *ASYNC], map(list, zip(*cells, strict=True)), strict=True))


@pytest.fixture(scope="module")
def columns() -> Iterator[dict[str, list[str]]]:
    columns: dict[str, list[str]] = {}
    yield columns
    if os.environ.get(WRITE):
        before, _, after = PAGE.read_text().partition(TABLE)
        rest = after.lstrip("\n").partition("\n\n")[2]
        table = table_of({driver: columns[driver] for driver in [*SYNC, *ASYNC]})
        PAGE.write_text(f"{before}{TABLE}\n\n{table}\n\n{rest}")


def test_the_table_matches_the_measurements(units: Units, columns: dict[str, list[str]]) -> None:
    """The table in ``docs/databases.md`` contains the measured behaviour of each driver."""
    columns[units.driver] = measure(units)
    if not os.environ.get(WRITE):
        assert columns[units.driver] == documented()[units.driver]
