"""Failures of production, by name, for the tests of an app; inside ``db.isolated()`` only."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeAlias

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError

from ..database.core import HasDatabase
from ..engines.backends import backend_for
from ..exceptions import IsolationError
from .isolation.isolation import Isolation, isolation_of

CommitFailure: TypeAlias = type[IntegrityError] | Literal["serialization", "disconnect"]


def fail_next_commit(db: HasDatabase, failure: CommitFailure = IntegrityError) -> None:
    """Make the app's next commit raise what the driver would, and commit nothing.

    Args:
        db: an isolated database, or a plugin that has one.
        failure: `IntegrityError`, ``"serialization"`` (on SQLite "database is locked") or
            ``"disconnect"``, which SQLite does not have: the answer to COMMIT is lost, so that its outcome is
            unknown and ``on_unknown`` hooks run.

    Raises:
        IsolationError: the database is not isolated, or the test ends without a commit.
    """
    isolation = isolation_of(db)
    isolation.next_commits.append(partial(_fail, isolation, failure))


def kill_connection(db: HasDatabase, *, after: int = 0) -> None:
    """End the app's connection at its next statement, or ``after`` that many more; its unit of work is lost with it.

    Raises:
        IsolationError: the database is not isolated or has no connections to lose, or the test ends before.
    """
    isolation = isolation_of(db)
    isolation.next_statements += [_let_pass] * after + [partial(_disconnect, isolation)]


@contextmanager
def exhausted_pool(db: HasDatabase) -> Generator[None]:
    """Let the app get no connection in the block: the time-out error of the pool is raised, at once.

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
        try:
            _disconnect(isolation, connection)
        except DBAPIError as error:
            isolation.commit_unanswered(connection, error)
            raise
    else:
        kind: Literal["integrity", "serialization"] = "serialization" if failure == "serialization" else "integrity"
        try:
            backend_for(connection.dialect.name).raise_commit_failure(connection, kind)
        except NotImplementedError:
            raise _unknown(connection) from None


def _disconnect(isolation: Isolation, connection: Connection) -> None:
    """Raise what the driver does when its connection is lost: another one is ended, as this one is the test's."""
    statement = backend_for(connection.dialect.name).disconnect_statement
    if statement is None:
        raise _unknown(connection)
    with isolation.connect_beside(connection.engine) as beside:
        beside.exec_driver_sql(statement)


def _unknown(connection: Connection) -> IsolationError:
    return IsolationError(
        f"session_plugin does not know how to cause this failure on {connection.dialect.name}. Choose another one, or "
        "raise it in an event listener of your own."
    )


def _let_pass(connection: Connection) -> None:
    """Let this statement be executed."""
