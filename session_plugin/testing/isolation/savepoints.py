"""`Savepoints`: the savepoints that stand for transactions, which one was begun, and what a ROLLBACK TO becomes."""

from __future__ import annotations

import re

from sqlalchemy import Connection

_BEGIN = re.compile(r"SAVEPOINT (\S+)")
_ROLL_BACK = re.compile(r"ROLLBACK TO SAVEPOINT (\S+)")


class Savepoints:
    """Sees every statement that is sent on the connections of an isolation.

    Attributes:
        last: the name of the one that was begun last.
    """

    def __init__(self) -> None:
        self.last: str = ""
        self._to_release = ""
        self._unfinished: dict[Connection, str] = {}

    def release_instead(self, name: str) -> None:
        """Send a RELEASE in place of the next ROLLBACK TO ``name``, so that nothing is undone."""
        self._to_release = name

    def rolls_back(self, connection: Connection, name: str) -> None:
        """Note that a transaction is about to be rolled back; it may be cancelled before its statement is sent."""
        self._unfinished[connection] = name

    def finish(self, connection: Connection) -> None:
        """Do the rollback that was noted, if it has not been done."""
        name = self._unfinished.get(connection)
        if name is not None:
            connection.dialect.do_rollback_to_savepoint(connection, name)

    def before(self, statement: str) -> str:
        """Return what to send in place of ``statement``."""
        if begun := _BEGIN.match(statement):
            self.last = begun[1]
        rolled_back = _ROLL_BACK.match(statement)
        if rolled_back and rolled_back[1] == self._to_release:
            self._to_release = ""
            return f"RELEASE SAVEPOINT {rolled_back[1]}"
        return statement

    def after(self, connection: Connection, statement: str) -> None:
        """Note that ``statement`` was executed."""
        if statement.endswith(f"SAVEPOINT {self._unfinished.get(connection)}"):
            del self._unfinished[connection]
