"""MySQL and MariaDB: a transaction that cannot write, and the errors that end one.

After those errors the server goes on in a new transaction without a word, so that a COMMIT would
save the second half of the work.  PostgreSQL, which refuses every statement until ROLLBACK, is
asked instead (`_watch`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import PoolProxiedConnection

NAMES = ("mysql", "mariadb")
READ_ONLY_OPTION = "session_plugin_mysql_read_only"
ROLLED_BACK = {1020, 1206, 1213}
"""Changed since the snapshot, lock table full, deadlock: InnoDB rolls the whole transaction back."""
LOCK_WAIT_TIMEOUT = 1205


def prepare(engine: Engine) -> None:
    """Let the transactions of ``engine`` begin as their execution options say."""
    event.listen(engine, "begin", _begin)


def _begin(connection: Connection) -> None:
    if connection.get_execution_options().get(READ_ONLY_OPTION):
        connection.exec_driver_sql("START TRANSACTION READ ONLY")


def has_rolled_back(pooled: PoolProxiedConnection, error: BaseException) -> bool:
    """True if the server ended the transaction when it raised ``error``."""
    code = _code_of(error)
    if code == LOCK_WAIT_TIMEOUT:
        cursor: Any = pooled.cursor()
        try:
            cursor.execute("SELECT @@innodb_rollback_on_timeout")
            return bool(cursor.fetchone()[0])
        finally:
            cursor.close()
    return code in ROLLED_BACK


def _code_of(error: Any) -> Any:
    driver_error = getattr(error, "orig", error)
    return driver_error.args[0] if driver_error.args else None
