"""Results that still read from the connection when their transaction ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import column, event, insert, select, table, text
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.orm import DeclarativeBase, Mapped, ORMExecuteState, Session, mapped_column, relationship
from sqlalchemy.schema import ForeignKey

from session_plugin import Database
from session_plugin.engines.guard import MANY_RESULTS

from .harness import Parent
from .servers import PostgreSQL
from .units import Units, on

ROWS = 60
NAMES = table("parent", column("name"))


def fill(session: Session) -> None:
    session.add_all(Parent(name=f"row {number:03}") for number in range(ROWS))


def by_listener(option: str) -> Callable[[Session], Any]:
    """Another listener chooses streaming; it was registered later."""

    def open_result(session: Session) -> Any:
        def stream(state: ORMExecuteState) -> None:
            state.update_execution_options(**{option: 5 if option == "yield_per" else True})

        event.listen(session, "do_orm_execute", stream)
        try:
            return session.execute(select(Parent.name) if option == "yield_per" else select(NAMES))
        finally:
            event.remove(session, "do_orm_execute", stream)

    return open_result


WAYS: dict[str, Callable[[Session], Any]] = {
    "the statement": lambda session: session.execute(select(Parent.name).execution_options(yield_per=5)),
    "a call": lambda session: session.execute(select(Parent), execution_options={"stream_results": True}),
    "a query": lambda session: session.query(Parent.name).yield_per(5),
    "a listener: yield_per": by_listener("yield_per"),
    "a listener: stream_results": by_listener("stream_results"),
    "the connection": lambda session: session.connection(execution_options={"stream_results": True}).execute(
        select(NAMES)
    ),
    "the session's connection, later": lambda session: (
        session.connection().execution_options(yield_per=5),
        session.execute(text("SELECT name FROM parent")),
    )[1],
    "Core": lambda session: session.connection().execute(
        select(NAMES), execution_options={"stream_results": True, "max_row_buffer": 10}
    ),
    "the driver's text": lambda session: session.connection().exec_driver_sql(
        "SELECT name FROM parent", execution_options={"yield_per": 5}
    ),
}
ENDINGS: dict[str, Callable[[Session], None]] = {
    "settle": lambda session: None,
    "commit": Session.commit,
    "rollback": Session.rollback,
    "close": Session.close,
}


@on("sqlite+pysqlite", "sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg", "mariadb+pymysql")
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_ends_with_its_transaction(units: Units, way: str) -> None:
    """However streaming was chosen: reading on raises ResourceClosedError, and nothing is missing in silence."""
    streams: list[Any] = []

    def work(session: Session, ending: str) -> None:
        rows = iter(WAYS[way](session))
        next(rows)
        streams.append(rows)
        ENDINGS[ending](session)

    units.run(fill)
    for ending in ENDINGS:
        units.run(partial(work, ending=ending))
        units.run(lambda session: session.scalar(text("SELECT 'of somebody else'")))
        try:
            rest = list(streams[-1])
        except ResourceClosedError:
            continue
        assert (way, len(rest)) == ("a call", ROWS - 1)  # without yield_per an ORM result fetches all with the first


@pytest.mark.parametrize("option", [{"stream_results": True}, {"yield_per": 5}])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_stream_of_an_engine_ends_with_its_transaction(
    postgresql: PostgreSQL, option: dict[str, Any], ending: str
) -> None:
    """That streams everything."""
    db = Database(postgresql.url("psycopg"), execution_options=option)
    streams = []
    with db.session_scope() as session:
        streams.append(session.execute(text("SELECT * FROM generate_series(1, 3000)")))
        streams[0].fetchone()
        streams.append(session.connection().execute(text("SELECT * FROM generate_series(1, 3000)")))
        ENDINGS[ending](session)
    for stream in streams:
        with pytest.raises(ResourceClosedError):
            stream.all()
    db.dispose()


@on("sqlite+pysqlite")
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "statement", [select(Parent.name), select(NAMES), text("SELECT name FROM parent")], ids=["orm", "core", "text"]
)
@pytest.mark.parametrize("begun", [True, False])
def test_sqlite_reads_nothing_after_its_transaction(units: Units, statement: Any, ending: str, begun: bool) -> None:
    """Whose cursors are lazy: a later read would show what the next unit of work does on that connection."""
    results: list[Any] = []

    def work(session: Session) -> None:
        result = session.execute(statement)
        results.append(result)
        if begun:
            result.fetchone()
        ENDINGS[ending](session)

    units.run(fill)
    units.run(work)
    units.run(lambda session: session.execute(text("UPDATE parent SET name = 'not yours ' || name")))
    try:
        rest = results[0].all()
    except ResourceClosedError:
        return
    assert (begun, len(rest)) == (True, ROWS - 1)  # an ORM result fetches all rows with the first
    assert "not yours" not in str(rest)


@on("sqlite+pysqlite")
def test_an_explicit_commit_meets_no_open_statement(units: Units) -> None:
    """SQLite commits nothing while a statement is being read: here an INSERT of which one row was fetched."""
    kept: list[Any] = []

    def work(session: Session) -> None:
        new = insert(Parent.__table__).returning(Parent.__table__.c.name)
        kept.append(session.execute(new.values([{"name": "tea"}, {"name": "milk"}, {"name": "bun"}])))
        assert kept[0].fetchone() is not None
        session.execute(new.values([{"name": "jam"}, {"name": "egg"}])).fetchone()
        kept.append(session.connection().execute(text("SELECT name FROM parent")))
        kept.append(session.scalars(select(Parent)))
        session.commit()

    units.run(work)
    assert units.store.names() == ["bun", "egg", "jam", "milk", "tea"]
    for result in kept:
        with pytest.raises(ResourceClosedError):
            result.fetchall() if hasattr(result, "fetchall") else result.all()


@on("sqlite+pysqlite", "postgresql+psycopg", "mariadb+pymysql")
def test_an_isolated_test_sees_the_same(units: Units) -> None:
    """There a transaction is a savepoint, and results end with it all the same."""
    units.run(fill)
    streams: list[Any] = []

    def work(end: Callable[[Session], None]) -> None:
        with units.db.session_scope() as session:
            streams.append(session.execute(select(NAMES), execution_options={"stream_results": True}))
            streams[-1].fetchone()
            end(session)

    with units.db.isolated():
        for end in ENDINGS.values():
            work(end)
            with pytest.raises(ResourceClosedError):
                streams[-1].all()


@on("sqlite+pysqlite")
def test_results_that_are_open_cost_little(units: Units) -> None:
    """Those that were read are dropped now and then, those that are open stay."""

    def work(session: Session) -> None:
        guard = next(iter(units.db._unit_of_work().transaction._guards.values()), None)
        assert guard is None
        session.execute(text("SELECT 1")).all()
        guard = next(iter(units.db._unit_of_work().transaction._guards.values()))
        kept = []
        for _ in range(2 * MANY_RESULTS):
            kept.append(session.execute(text("SELECT name FROM parent")))
            session.execute(text("SELECT 1")).all()
        assert len(units.db._unit_of_work().transaction.open_results) == 2 * MANY_RESULTS
        assert len(guard._results) <= 4 * MANY_RESULTS

    units.run(fill)
    units.run(work)


@on("sqlite+pysqlite")
def test_a_result_of_a_discarded_connection_is_closed(units: Units) -> None:
    """Nothing was sent that could have ended it."""
    results: list[Any] = []

    def work(session: Session) -> None:
        results.append(session.execute(text("SELECT name FROM parent")))
        results[0].fetchone()
        session.invalidate()

    units.run(fill)
    units.run(work)
    with pytest.raises(ResourceClosedError):
        results[0].all()


class Eager(DeclarativeBase):
    pass


class Shelf(Eager):
    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list[Book]] = relationship(lazy="selectin")


class Book(Eager):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("shelf.id"))


@pytest.mark.parametrize("kind", ["session_scope", "isolated"])
def test_yield_per_loads_collections_as_in_a_plain_session(kind: str) -> None:
    """On SQLAlchemy 2.0 a statement that a listener invokes hands ``yield_per`` on to the eager loads."""
    db = Database("sqlite://", metadata=Eager.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add_all(Shelf(books=[Book(), Book()]) for _ in range(5))

    def read() -> int:
        with db.session_scope() as session:
            first = sum(len(shelf.books) for shelf in session.query(Shelf).yield_per(2))
            return first + sum(
                len(shelf.books) for shelf in session.scalars(select(Shelf), execution_options={"yield_per": 2})
            )

    if kind == "isolated":
        with db.isolated():
            assert read() == 20
    else:
        assert read() == 20
    db.dispose()


@on("sqlite+aiosqlite", "postgresql+psycopg", "mariadb+pymysql")
def test_a_result_that_was_fetched_stays_readable(units: Units) -> None:
    """It reads from no connection, and nothing has to close it; an explicit commit neither."""
    results: list[Any] = []

    def work(session: Session) -> None:
        results.append(session.execute(text("SELECT 42")))
        session.commit()

    units.run(work)
    assert results[0].scalar() == 42
