"""What goes wrong in production, named, for the tests of an app; inside ``db.isolated()`` only."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from .._mysql import NAMES
from ..exceptions import IsolationError
from ._isolation import Isolation
from ._open import isolation_of

if TYPE_CHECKING:
    from ..access import HasDatabase

T = TypeVar("T")

CommitFailure: TypeAlias = type[IntegrityError] | Literal["serialization", "disconnect"]

_RAISE: Mapping[str, Mapping[Any, str]] = {
    "postgresql": {
        IntegrityError: "DO $$ BEGIN RAISE EXCEPTION 'a test asked for this' USING ERRCODE = '23505'; END $$",
        "serialization": "DO $$ BEGIN RAISE EXCEPTION 'a test asked for this' USING ERRCODE = '40001'; END $$",
    },
    "mysql": {
        IntegrityError: "SIGNAL SQLSTATE '23000' SET MYSQL_ERRNO = 1062, MESSAGE_TEXT = 'a test asked for this'",
        "serialization": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'a test asked for this'",
    },
}
_DISCONNECT = {"postgresql": "SELECT pg_terminate_backend(pg_backend_pid())", "mysql": "KILL CONNECTION_ID()"}


def fail_next_commit(db: HasDatabase, failure: CommitFailure = IntegrityError) -> None:
    """The app's next commit raises what the driver would, and commits nothing.

    Args:
        db: an isolated database, or a plugin that has one.
        failure: `IntegrityError`, ``"serialization"`` (on SQLite "database is locked") or
            ``"disconnect"``, which SQLite does not have.

    Raises:
        IsolationError: the database is not isolated, or the test ends without a commit.
    """
    isolation = isolation_of(db)
    isolation.next_commits.append(partial(_fail, isolation, failure))


def kill_connection(db: HasDatabase, *, after: int = 0) -> None:
    """The app's connection dies at its next statement, or ``after`` so many more; its unit of work is lost with it.

    Raises:
        IsolationError: the database is not isolated or has no connections to lose, or the test ends before.
    """
    isolation = isolation_of(db)
    isolation.next_statements += [_let_pass] * after + [partial(_disconnect, isolation)]


@contextmanager
def exhausted_pool(db: HasDatabase) -> Generator[None]:
    """In the block the app gets no connection: the pool's time-out is raised, at once.

    Raises:
        IsolationError: the database is not isolated.
    """
    isolation = isolation_of(db)
    isolation.exhausted = True
    try:
        yield
    finally:
        isolation.exhausted = False


def _fail(isolation: Isolation, failure: CommitFailure, connection: Connection) -> None:
    if failure == "disconnect":
        _disconnect(isolation, connection)
    elif connection.dialect.name == "sqlite":
        raise _of_sqlite(connection, failure)
    else:
        connection.exec_driver_sql(_for_dialect(connection, _RAISE)[failure])


def _of_sqlite(connection: Connection, failure: CommitFailure) -> DBAPIError:
    """The two errors that a COMMIT of SQLite raises, which no statement provokes without a second writer."""
    driver = connection.dialect.dbapi
    if failure is IntegrityError:
        return IntegrityError("COMMIT", None, driver.IntegrityError("FOREIGN KEY constraint failed"))  # type: ignore[union-attr]
    return OperationalError("COMMIT", None, driver.OperationalError("database is locked"))  # type: ignore[union-attr]


def _disconnect(isolation: Isolation, connection: Connection) -> None:
    """Raise what the driver does when its connection is lost: it is done to another one, as this one is the test's."""
    statement = _for_dialect(connection, _DISCONNECT)
    with isolation.connect_beside(connection.engine) as beside:
        beside.exec_driver_sql(statement)


def _for_dialect(connection: Connection, by_dialect: Mapping[str, T]) -> T:
    name = connection.dialect.name
    found = by_dialect.get("mysql" if name in NAMES else name)
    if found is None:
        raise IsolationError(
            f"How to fail so on {name} is not known here. Choose another failure, or a listener of your own."
        )
    return found


def _let_pass(connection: Connection) -> None:
    """This statement is executed."""
