"""What follows from a statement that may have written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from session_plugin import Database, ReadOnlyError, read_only
from session_plugin.engines.backends import backend_for

from .harness import Base, Parent, insert
from .units import Units, on

PAY = """CREATE OR REPLACE FUNCTION pay(old text) RETURNS text LANGUAGE sql AS
    $$ UPDATE parent SET name = 'paid' WHERE name = old RETURNING name $$"""
STATEMENTS = {
    "a function": "SELECT pay('tea')",
    "VALUES": "VALUES (pay('tea'))",
    "a CTE": "WITH x AS (SELECT pay('tea')) SELECT * FROM x",
    "EXPLAIN ANALYZE": "EXPLAIN ANALYZE UPDATE parent SET name = 'paid' WHERE name = 'tea'",
    "DO": "DO $$ BEGIN PERFORM pay('tea'); END $$",
}


@on("postgresql+psycopg", "postgresql+asyncpg")
@pytest.mark.parametrize("statement", STATEMENTS)
def test_what_a_statement_wrote_is_not_shown_after_a_rollback(
    units: Units, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever kind of statement it was; and that work is discarded under a success is a warning."""
    loaded: list[Any] = []

    def work(session: Session) -> None:
        loaded[:] = [session.get(Parent, "tea")]
        session.execute(text(STATEMENTS[statement]))
        assert units.db.scope.wrote
        session.expire(loaded[0])
        assert session.scalar(text("SELECT name FROM parent")) == "paid"
        units.db.doom("dry run")

    with units.store.engine.begin() as connection:
        connection.execute(text(PAY))
    units.run(insert("tea"))
    with caplog.at_level(logging.WARNING, "session_plugin"):
        units.run(work)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert units.store.names() == ["tea"]


def raw(session: Session, sql: str) -> None:
    cursor = session.connection().connection.cursor()
    cursor.execute(sql)
    cursor.close()


@on("postgresql+psycopg", "postgresql+psycopg2", "postgresql+asyncpg", "sqlite+pysqlite", "sqlite+aiosqlite")
@pytest.mark.parametrize(
    ("sql", "level"), [("INSERT INTO parent (name) VALUES ('tea')", "WARNING"), ("SELECT 1", "DEBUG")]
)
def test_raw_cursors_are_looked_at_when_it_matters(
    units: Units, sql: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver, or one question to the server, shows what no statement of SQLAlchemy's did."""

    def work(session: Session) -> None:
        raw(session, sql)
        units.db.doom("dry run")

    with caplog.at_level(logging.DEBUG, "session_plugin"):
        units.run(work)
    assert [record.levelname for record in caplog.records if "ROLLBACK" in record.message] == [level]
    assert units.store.names() == []


@on("postgresql+psycopg", "postgresql+asyncpg")
def test_a_transaction_that_cannot_say_counts_as_one_that_wrote(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """It was aborted."""

    def work(session: Session) -> None:
        connection = session.connection()
        with pytest.raises(Exception, match="nothing_here"):
            connection.exec_driver_sql("SELECT 1 FROM nothing_here")
        units.db.doom("dry run")

    with caplog.at_level(logging.DEBUG, "session_plugin"):
        units.run(work)
    assert "WARNING" in [record.levelname for record in caplog.records]


@on("mariadb+pymysql")
def test_where_nothing_shows_raw_writes_they_are_not_seen(units: Units) -> None:
    """As the promises page says."""

    def work(session: Session) -> None:
        raw(session, "INSERT INTO parent (name) VALUES ('tea')")
        assert not units.db.scope.wrote

    units.run(work)
    assert units.store.names() == ["tea"]


@on("postgresql+psycopg")
def test_a_server_that_cannot_say_counts_as_one_that_wrote(units: Units) -> None:
    """A connection that the server has ended, before the driver knows of it."""
    backend = backend_for("postgresql")
    with units.store.engine.connect() as connection:
        pooled, dialect = connection.connection, connection.dialect
        assert not backend.has_written(pooled, None, dialect)
        ended = connection.scalar(text("SELECT pg_backend_pid()"))
        with units.store.engine.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:ended, 5000)"), {"ended": ended})
        assert backend.has_written(pooled, None, dialect)
        connection.invalidate()


@on("sqlite+pysqlite")
def test_many_comments_are_read_at_once(units: Units) -> None:
    """An expression that goes back took minutes for these, on the event loop."""
    many: Callable[[Session], Any] = lambda session: session.execute(text("/* a header */\n" * 60 + "SELECT 1")).all()  # noqa: E731
    assert units.run(many)


@on("mariadb+pymysql")
def test_a_function_is_not_refused_by_a_read_only_policy(units: Units) -> None:
    """In an isolated test neither: nothing is known of it, and a real server would call it."""

    with units.store.engine.begin() as connection:
        connection.execute(text("CREATE OR REPLACE FUNCTION two() RETURNS int DETERMINISTIC RETURN 2"))
    with units.db.isolated():
        with units.db.session_scope(new=True) as session:
            units.db.use(read_only)
            assert session.scalar(text("SELECT two()")) == 2
            with pytest.raises(ReadOnlyError):
                session.execute(text("WITH x AS (SELECT 1) DELETE FROM parent"))


def test_only_the_connection_that_was_handed_out_is_asked() -> None:
    """What was written through raw cursors is found there, beside a connection that only the session has used."""
    db = Database({"default": "sqlite://", "other": "sqlite://"}, metadata=Base.metadata)
    for engine in db.engines.values():
        Base.metadata.create_all(engine)
    with db.session_scope() as session:
        session.scalar(text("SELECT 1"), bind_arguments={"bind": db.engines["other"]})
        raw(session, "INSERT INTO parent (name) VALUES ('tea')")
        state = db._unit_of_work().transaction
        assert state.may_have_raw_writes
        assert not state.wrote
        state.ask_whether_wrote()
        assert state.wrote
    with db.session_scope() as session:
        assert session.scalars(text("SELECT name FROM parent")).all() == ["tea"]
    db.dispose()
