"""`Backend`: the questions that the rest of the package asks about a database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from re import Pattern
from typing import Any, Literal, TypeAlias

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from .syntax import Syntax

CommitFailure: TypeAlias = Literal["integrity", "serialization"]
LockListener: TypeAlias = Callable[[BaseException, Callable[[Connection], bool]], None]


class Backend:
    """A kind of database.  The defaults suit one of which nothing special is known.

    Attributes:
        names: the names of SQLAlchemy's dialects for it.
        async_driver: the driver that an error message suggests for an async database, or None.
        read_only_statement: makes every later transaction of a connection READ ONLY, or None if that
            cannot be done.
        goes_on_after_abort: True if statements that follow the loss of a transaction are executed, in a
            new transaction, instead of being refused.
        syntax: how it reads the text of a statement.
        sees_raw_writes: True if `has_written` shows what was written through raw cursors.
        has_lazy_cursors: True if rows are read from the database as they are fetched.

    For the test kit:

    Attributes:
        implicit_commit: matches statements that commit by themselves, or None.
        mode_of_transaction: matches statements that set a mode of one transaction, with the group ``read_only`` if
            that is READ ONLY; None if such a mode ends with a savepoint.
        read_only_error_statement: raises the error of a statement that writes in a READ ONLY transaction.
        enforces_read_only_in_savepoint: True if `begin_read_only_savepoint` makes the server refuse writes.
        cancellation_closes_connection: True if drivers close a connection whose statement was cancelled.
        error_statements: statements that raise the error of a failed COMMIT, by its kind.
        disconnect_statement: ends the connection that executes it, or None if there is no connection to lose.
        create_statement, drop_statement: create and drop a database, with ``{}`` for its quoted name; None
            where a database is a file.
    """

    names: tuple[str, ...] = ()
    async_driver: str | None = None
    read_only_statement: str | None = None
    goes_on_after_abort: bool = False
    syntax: Syntax = Syntax()
    sees_raw_writes: bool = False
    has_lazy_cursors: bool = True
    implicit_commit: Pattern[str] | None = None
    mode_of_transaction: Pattern[str] | None = None
    read_only_error_statement: str = ""
    enforces_read_only_in_savepoint: bool = False
    cancellation_closes_connection: bool = False
    error_statements: Mapping[CommitFailure, str] = {}
    disconnect_statement: str | None = None
    create_statement: str | None = "CREATE DATABASE {}"
    drop_statement: str | None = "DROP DATABASE IF EXISTS {}"

    def connect_url(self, url: URL, owner: object) -> URL:
        """Return the URL to connect to; whatever it needs stays alive as long as ``owner``."""
        return url

    def is_in_memory(self, url: URL) -> bool:
        """Return True if ``url`` names a database that exists in this process only."""
        return False

    def in_folder(self, url: URL, folder: str) -> URL:
        """Return ``url`` with its relative path, if it names a file by one, put into ``folder``."""
        return url

    def prepare(self, engine: Engine, *, made_here: bool) -> None:
        """Add the listeners that make the transactions of ``engine`` begin as their execution options say.

        Args:
            engine: any engine of ours or of the user's.
            made_here: False if the user made it: then only what units of work do on it may change.
        """

    def begin_options(self, *, read_only: bool, may_write: bool) -> dict[str, Any]:
        """Return the execution options with which a transaction begins.

        Args:
            read_only: the transaction must not write.
            may_write: the transaction is expected to write.
        """
        return {}

    def begin_now(self, connection: Connection) -> None:
        """Begin the transaction on the server, where the driver would wait for the first statement that it sees."""

    def is_aborted(self, pooled: PoolProxiedConnection, error: BaseException, dialect: Dialect) -> bool:
        """Return True if the server has ended or aborted the transaction in which ``error`` was raised.

        By default the connection is asked: PostgreSQL, for one, refuses every statement until ROLLBACK.
        """
        cursor = pooled.cursor()
        try:
            cursor.execute("SELECT 1")
        except dialect.loaded_dbapi.Error:
            return True
        finally:
            cursor.close()
        return False

    def is_known_to_be_aborted(self, pooled: PoolProxiedConnection) -> bool:
        """Return True if the driver itself knows that the transaction is aborted."""
        return False

    def has_refused_commit(self, error: BaseException, dialect: Dialect) -> bool:
        """Return True if ``error``, which COMMIT raised, proves that the server has not committed.

        Anything else leaves the outcome unknown, so this errs on the side of False.
        """
        return isinstance(error, dialect.loaded_dbapi.IntegrityError)

    def has_refused_to_write(self, error: BaseException) -> bool:
        """Return True if the driver's ``error`` says that the transaction or the connection is read-only."""
        return False

    def listen_for_locks(self, listener: LockListener) -> None:
        """Call ``listener`` whenever a transaction that locks a whole database has kept a statement waiting too long.

        It gets the error, and a function that returns True for a connection with a transaction on that database.
        """

    def write_mark(self, pooled: PoolProxiedConnection) -> Any:
        """Return what `has_written` compares with, without asking the server; None if it compares with nothing."""
        return None

    def has_written(self, pooled: PoolProxiedConnection, mark: Any, dialect: Dialect) -> bool:
        """Return True if something was written in this transaction since ``mark``, through raw cursors too.

        Only what the driver or one question to the server shows; by default, nothing does.
        """
        return False

    def deferred_constraints_check(self, connection: Connection) -> Callable[[Connection], None]:
        """Return a function that raises what COMMIT would raise for deferred constraints.

        It is called when the transaction of ``connection`` has just begun.
        """
        return _check_nothing

    def begin_for_good(self, connection: Connection) -> None:
        """Begin the transaction of ``connection`` on the server, where a savepoint alone does not."""

    def begin_read_only_savepoint(self, connection: Connection) -> None:
        """Let the database refuse writes until the savepoint that has just begun ends."""

    def end_read_only_savepoint(self, connection: Connection) -> None:
        """Undo `begin_read_only_savepoint`, where the end of the savepoint does not."""

    def settings(self, pooled: PoolProxiedConnection, names: Iterable[str]) -> dict[str, str]:
        """Return the settings of the session that it has made itself, and those custom ones of these ``names``."""
        return {}

    def restore_settings(self, pooled: PoolProxiedConnection, settings: Mapping[str, str]) -> None:
        """Set back what `settings` returned, and reset all others, until the transaction ends."""

    def restore_constraints(self, pooled: PoolProxiedConnection) -> None:
        """Undo SET CONSTRAINTS."""

    def raise_commit_failure(self, connection: Connection, failure: CommitFailure) -> None:
        """Raise the error of a failed COMMIT as the driver would.

        Raises:
            NotImplementedError: it is not known how to.
        """
        if failure not in self.error_statements:
            raise NotImplementedError
        connection.exec_driver_sql(self.error_statements[failure])

    def worker_url(self, url: URL, worker: str) -> URL:
        """Return the URL of the database that belongs to one worker of a parallel test run."""
        return url.set(database=f"{url.database}_{worker}")

    def files(self, url: URL) -> list[Path]:
        """Return the files of which the database consists, where it is one that the client itself opens."""
        return []


def _check_nothing(connection: Connection) -> None:
    """No constraint of this database waits for COMMIT."""
