"""``python -m bench.isolation``: compare the costs of several ways to undo the changes of a test.

Each way runs the same test: one unit of work that adds a row and commits.  The ways take turns,
and the result is the median over the rounds.  "the test alone" commits for real and leaves its row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from flask import Flask
from flask_sqlalchemy_lite import SQLAlchemy
from sqlalchemy import Column, Engine, Integer, String, Table, text
from sqlalchemy.exc import SAWarning
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from session_plugin import Database

from .machine import postgresql

TABLES = 20


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


for number in range(TABLES - 1):
    Table(f"other_{number}", Base.metadata, Column("id", Integer, primary_key=True))


@dataclass(frozen=True)
class Way:
    """A way to undo the changes of a test: ``around`` is entered around the test, which works in ``work``."""

    name: str
    work: Callable[[], AbstractContextManager[Session]]
    around: Callable[[], AbstractContextManager[object]]


def ways(url: str, stack: ExitStack) -> Iterator[Way]:
    db = Database(url, metadata=Base.metadata)
    stack.callback(db.dispose)
    db.drop_all()
    db.create_all()
    yield Way("the test alone", db.session_scope, nullcontext)
    yield Way("a connection checkout", db.session_scope, db.engine.connect)
    yield Way("session_plugin: db.isolated()", db.session_scope, db.isolated)
    maker = sessionmaker(db.engine)
    yield Way("SQLAlchemy's documentation", maker.begin, lambda: joined(db.engine, maker))
    app = Flask(__name__)
    app.config["SQLALCHEMY_ENGINES"] = {"default": url}
    lite = SQLAlchemy(app)
    stack.enter_context(app.app_context())
    stack.callback(lite.engine.dispose)
    yield Way("Flask-SQLAlchemy-Lite: test_isolation()", lambda: lite_session(lite), lite.test_isolation)
    yield Way(f"truncate {TABLES} tables", db.session_scope, lambda: truncated(db.engine))
    yield Way(f"drop and create {TABLES} tables", db.session_scope, lambda: created_anew(db))


@contextmanager
def joined(engine: Engine, maker: sessionmaker[Session]) -> Iterator[None]:
    """As in "Joining a Session into an External Transaction" of SQLAlchemy's documentation."""
    with engine.connect() as connection:
        transaction = connection.begin()
        maker.configure(bind=connection, join_transaction_mode="create_savepoint")
        try:
            yield
        finally:
            transaction.rollback()
            maker.configure(bind=engine)


@contextmanager
def lite_session(lite: SQLAlchemy) -> Iterator[Session]:
    yield lite.session
    lite.session.commit()


@contextmanager
def truncated(engine: Engine) -> Iterator[None]:
    yield
    with engine.begin() as connection:
        names = [table.name for table in Base.metadata.sorted_tables]
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"TRUNCATE {', '.join(names)}"))
        else:
            for name in names:
                connection.execute(text(f"DELETE FROM {name}"))


@contextmanager
def created_anew(db: Database[Session]) -> Iterator[None]:
    yield
    db.drop_all()
    db.create_all()


def measured(url: str, rounds: int) -> dict[str, float]:
    """The median time of the test for each way, in seconds."""
    with ExitStack() as stack:
        compared = list(ways(url, stack))
        times: dict[str, list[float]] = {way.name: [] for way in compared}
        for _ in range(rounds):
            for way in compared:
                started = time.perf_counter()
                with way.around(), way.work() as session:
                    session.add(Item(name="tea"))
                times[way.name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.isolation", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    warnings.simplefilter("ignore", SAWarning)  # raised by Flask-SQLAlchemy-Lite when it ends a session
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        print_table("SQLite, a file", measured(f"sqlite:///{folder}/test.db", rounds))
    with postgresql() as server:
        print_table("PostgreSQL, psycopg, loopback", measured(server.url("psycopg"), rounds))


def print_table(database: str, costs: dict[str, float]) -> None:
    print(f"\n| {database} | ms per test |\n|---|---:|")
    for name, seconds in costs.items():
        print(f"| {name} | {seconds * 1000:.2f} |")


if __name__ == "__main__":
    main()
