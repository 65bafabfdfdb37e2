"""The policy `read_only_autocommit`: reading without a transaction, on connections that refuse to write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, create_mock_engine, event, func, inspect, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import (
    ORMExecuteState,
    Session,
    joinedload,
    selectinload,
    subqueryload,
)

from bench.proxy import Proxy
from session_plugin import (
    ConfigurationError,
    Database,
    Outcome,
    Policy,
    ReadOnlyError,
    SessionScope,
    read_only,
    read_only_autocommit,
)
from session_plugin.database.interface import core_of
from session_plugin.engines.backends.interface import Backend
from session_plugin.engines.variants import forbid_writing
from session_plugin.scope import ending
from session_plugin.scope.opening import open_unit_of_work

from .drivers import MARIADB, POSTGRESQL, SQLITE, SYNC
from .harness import Parent, add, insert
from .library import Author, Book, Library
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


def held(units: Units) -> int:
    return sum(pool.checkedout() for pool in pools(units))


def test_a_connection_is_held_for_a_statement_only(units: Units) -> None:
    """Its rows are fetched, and it goes back before they are read; so it does after each kind of statement."""
    units.run(lambda session: session.add_all([Parent(name="tea"), Parent(name="milk")]))

    def work(session: Session) -> None:
        result = session.execute(select(Parent).order_by(Parent.name))
        assert held(units) == 0
        milk = next(result).Parent
        assert [row.Parent.name for row in result] == ["tea"]
        assert session.get(Parent, "tea") is session.get(Parent, "tea", populate_existing=True)
        session.refresh(milk)
        assert session.execute(text("SELECT 1")).scalar() == 1
        assert session.execute(select(Parent.name)).keys() == ["name"]
        assert held(units) == 0

    reading(units, work)


@on(*SQLITE, *MARIADB)
def test_a_stream_holds_its_connection(units: Units) -> None:
    """Until it was read to its end and another statement was executed; on PostgreSQL it needs a transaction."""
    units.run(lambda session: session.add_all([Parent(name=str(number)) for number in range(10)]))

    def work(session: Session) -> None:
        result = session.execute(select(Parent), execution_options={"yield_per": 2})
        first = next(result)
        assert held(units) == 1
        assert len([first, *result]) == 10
        names(session)
        assert held(units) == 0

    reading(units, work)


def test_a_connection_that_the_app_has_is_kept(units: Units) -> None:
    """Until the end of the unit of work, or release()."""

    def work(session: Session) -> None:
        connection = session.connection()
        names(session)
        assert held(units) == 1
        assert connection.execute(select(Parent.name)).all() == []

    reading(units, work)
    assert held(units) == 0


@on(*POSTGRESQL)
def test_a_lock_of_the_session_is_kept(units: Units) -> None:
    """Whatever may depend on the connection keeps it until the end."""

    def work(session: Session) -> None:
        session.execute(text("SELECT pg_advisory_lock(1)"))
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        assert held(units) == 1
        assert session.scalar(text("SELECT pg_backend_pid()")) == pid
        session.execute(text("SELECT pg_advisory_unlock(1)"))

    reading(units, work)


def test_an_error_gives_the_connection_back(units: Units) -> None:
    """It is raised where the statement is executed, and the next statement is executed all the same."""

    def work(session: Session) -> None:
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT * FROM nowhere"))
        assert held(units) == 0
        assert names(session) == []
        assert held(units) == 0
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT nowhere()"))  # which might have done anything
        assert held(units) == (1 if units.store.backend != "sqlite" else held(units))

    reading(units, work)


@on(*POSTGRESQL)
def test_a_connection_that_was_lost_between_statements(units: Units) -> None:
    """One statement fails, and the next one takes another connection."""

    def work(session: Session) -> None:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        with units.store.engine.connect() as other:
            assert other.scalar(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        with pytest.raises(DBAPIError):
            names(session)
        assert names(session) == []

    reading(units, work)


def test_a_block_of_the_app_keeps_its_connection(units: Units) -> None:
    """It is a transaction of SQLAlchemy's, in whose block nothing could be executed once it has ended."""

    def work(session: Session) -> None:
        with session.begin():
            assert names(session) == names(session) == []
            assert held(units) == 1
        names(session)
        assert held(units) == 0

    reading(units, work)


def test_a_transaction_that_is_begun_in_sql(units: Units) -> None:
    """A snapshot for two statements: it holds the connection."""

    def work(session: Session) -> None:
        session.execute(text("BEGIN"))
        names(session)
        assert held(units) == 1
        session.execute(text("COMMIT"))

    reading(units, work)


@on(*MARIADB)
def test_what_the_next_statement_asks_for(units: Units) -> None:
    """The connection knows how many rows there are without the LIMIT."""
    units.run(lambda session: session.add_all([Parent(name=str(number)) for number in range(10)]))

    def work(session: Session) -> None:
        session.execute(text("SELECT SQL_CALC_FOUND_ROWS name FROM parent LIMIT 2")).all()
        assert held(units) == 1
        assert session.scalar(text("SELECT FOUND_ROWS()")) == 10

    reading(units, work)


def test_results_are_those_of_any_session(units: Units) -> None:
    """Whatever is asked of them."""
    units.run(lambda session: session.add_all([Parent(name=str(number)) for number in range(5)]))
    questions: list[Callable[[Any], Any]] = [
        lambda result: (result.fetchmany(2), result.fetchone(), result.all(), result.fetchone()),
        lambda result: (result.fetchmany(), result.all()),
        lambda result: (result.freeze()().all(), result.closed),
        lambda result: (result.first(), result.closed),
        lambda result: (result.fetchone(), result.close(), result.closed),
        lambda result: [*result.partitions(2)],
        lambda result: [*result.yield_per(2).partitions()],
        lambda result: [*result.mappings()],
        lambda result: getattr(result, "rowcount", None),
    ]

    def ask(session: Session) -> list[str]:
        statements: list[Any] = [select(Parent.name), select(Parent.__table__), text("SELECT name FROM parent")]
        return [str(question(session.execute(statement))) for statement in statements for question in questions]

    assert reading(units, ask) == units.run(ask)


@on("mariadb+pymysql")
def test_a_result_that_may_depend_on_the_connection_is_left_alone(units: Units) -> None:
    """Its cursor has further results."""

    def work(session: Session) -> None:
        with pytest.raises(DBAPIError):
            session.execute(text("CALL nowhere()"))
        result: Any = session.execute(text("SELECT last_value(1, 2)"))
        assert result.cursor is not None
        assert held(units) == 1

    reading(units, work)


def test_a_result_of_a_cache(units: Units) -> None:
    """A listener of the app's may serve a statement from rows that it has kept."""
    units.run(add("tea"))
    kept: list[Any] = []

    def serve(state: ORMExecuteState) -> Any:
        if not kept:
            kept.append(state.invoke_statement().freeze())
        return kept[0]()

    def work(session: Session) -> None:
        event.listen(session, "do_orm_execute", serve)
        assert [names(session), names(session)] == [["tea"], ["tea"]]
        assert held(units) == 0

    reading(units, work)


def test_a_connection_that_another_thread_has_begun_to_use(units: Units) -> None:
    """Its statement comes first; the connection goes back after the next one."""

    def work(session: Session) -> None:
        [*locks] = []

        def take(state: ORMExecuteState) -> Any:
            result = state.invoke_statement()
            [guard] = session._unit_of_work.transaction._guards.values()  # type: ignore[attr-defined]
            guard._lock.acquire()
            guard._owner = locks
            locks.append(guard._lock)
            return result

        event.listen(session, "do_orm_execute", take, once=True)
        result = session.execute(select(Parent.name))
        assert held(units) == 1
        locks.pop().release()
        assert result.all() == names(session) == []
        assert held(units) == 0

    reading(units, work)


@on("sqlite+pysqlite")
def test_a_statement_of_core_that_streams(units: Units) -> None:
    """Its rows are not fetched before they are read."""
    units.run(add("tea"))

    def work(session: Session) -> None:
        result = session.execute(text("SELECT name FROM parent"), execution_options={"stream_results": True})
        assert held(units) == 1
        assert result.scalars().all() == names(session) == ["tea"]
        assert held(units) == 0

    reading(units, work)


def test_relationships_without_a_transaction() -> None:
    """However they are loaded; a result that needs unique() still says so."""
    db = Database("sqlite://", metadata=Library.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add(Author(id=1, books=[Book(id=1), Book(id=2)]))
    with db.session_scope() as session:
        db.use(read_only_autocommit)
        author = session.scalars(select(Author)).one()
        assert [book.id for book in author.books] == [1, 2]
        for option in (selectinload, joinedload, subqueryload):
            session.expunge_all()
            [author] = session.scalars(select(Author).options(option(Author.books))).unique()
            assert [book.author is author for book in author.books] == [True, True]
        with pytest.raises(InvalidRequestError, match=r"unique\(\) method must be invoked"):
            session.execute(select(Author, Author.id).options(joinedload(Author.books))).all()
        assert [engine.pool.checkedout() for engine in core_of(db).engines.known] == [0, 0]
    db.dispose()


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


@pytest.mark.parametrize("policy", [read_only, read_only_autocommit])
def test_a_refused_write_names_the_policy(units: Units, policy: Policy) -> None:
    """The database's error says nothing of it, and a GET may be under it by its method alone."""

    def work(session: Session) -> None:
        units.db.use(policy)
        with pytest.raises(DBAPIError) as raised:
            session.execute(text("INSERT INTO parent (name) VALUES ('lost')"))
        assert [note for note in raised.value.__notes__ if f"the read-only policy {policy.name}. To write" in note]
        with pytest.raises(DBAPIError) as raised:
            session.execute(text("SELECT * FROM nowhere"))
        assert "read-only" not in str(getattr(raised.value, "__notes__", ""))
        session.rollback()

    if not (units.store.backend == "sqlite" and policy is read_only):  # it enforces nothing
        units.run(work)


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


def test_another_database() -> None:
    """Nothing is known of its errors."""
    assert not Backend().has_refused_to_write(KeyError("read only"))
