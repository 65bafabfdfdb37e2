"""MySQL and MariaDB."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from .interface import Backend, CommitFailure
from .syntax import HARMLESS, Syntax, words

SYNTAX = Syntax(
    hash_comments=True,
    nested_comments=False,
    dollar_quotes=False,
    backticks=True,
    brackets=False,
    dashes_need_space=True,
    harmless=HARMLESS
    | words("""
        acos adddate addtime any_value ascii asin atan atan2 bin bit_and bit_count bit_length bit_or bit_xor char
        charset coercibility collation compress connection_id conv convert convert_tz cos cot crc32 curdate
        current_user curtime database date_add date_format date_sub datediff day dayname dayofmonth dayofweek dayofyear
        degrees elt field find_in_set format found_rows from_base64 from_days from_unixtime get_format group_concat hex
        hour if ifnull inet6_aton inet6_ntoa inet_aton inet_ntoa instr is_ipv4 is_ipv6 is_uuid isnull json_array
        json_array_append json_array_insert json_arrayagg json_compact json_contains json_contains_path json_depth
        json_detailed json_exists json_extract json_insert json_keys json_length json_merge_patch json_merge_preserve
        json_object json_objectagg json_overlaps json_pretty json_query json_quote json_remove json_replace json_search
        json_set json_table json_type json_unquote json_valid json_value last_day lcase left locate log10 log2 lpad
        make_set makedate maketime match md5 microsecond mid minute month monthname nvl nvl2 oct ord period_add
        period_diff pi pow quarter quote radians rand regexp_instr regexp_like regexp_replace regexp_substr repeat
        reverse right row_count rpad schema sec_to_time second session_user sha sha1 sha2 sin sleep space std stddev
        stddev_pop stddev_samp str_to_date strcmp subdate substring_index subtime sysdate system_user tan time_format
        time_to_sec timediff timestampadd timestampdiff to_base64 to_days to_seconds truncate ucase uncompress unhex
        unix_timestamp user utc_date utc_time utc_timestamp uuid uuid_short var_pop var_samp variance week weekday
        weekofyear year yearweek
    """),
    operators=words("against binary columns div index key partition regexp rlike straight_join xor"),
)
"""What a backslash means depends on the mode NO_BACKSLASH_ESCAPES, and a double quote on ANSI_QUOTES."""

_READ_ONLY_OPTION = "session_plugin_mysql_read_only"
_ENDS_TRANSACTION = {1020, 1206, 1213}
"""Changed since the snapshot, lock table full, deadlock: InnoDB rolls the whole transaction back."""
_LOCK_WAIT_TIMEOUT = 1205
_REFUSALS = {
    1020, 1205, 1206, 1213,  # changed since the snapshot, lock wait timeout, lock table full, deadlock or certification
    1048, 1062, 1169, 1216, 1217, 1451, 1452, 1557, 1586, 1761, 1762, 4025,  # constraints
    1290, 1792, 1836,  # the server or the transaction is read-only
    1402, 1613, 1614,  # XA_RBROLLBACK, XA_RBTIMEOUT, XA_RBDEADLOCK
    1644,  # SIGNAL
    3101,  # group replication has rolled the transaction back
}  # fmt: skip
"""Of what a server sends; the others, such as 1180 (an error during COMMIT) or 1317 (interrupted), prove nothing."""


class MySQL(Backend):
    """After some errors the server rolls back and goes on in a new transaction without reporting that.

    COMMIT would then save the second half of the work only.
    """

    names: tuple[str, ...] = ("mysql", "mariadb")
    syntax = SYNTAX
    has_lazy_cursors: bool = False
    async_driver: str | None = "asyncmy"
    read_only_statement: str | None = "SET SESSION TRANSACTION READ ONLY"
    goes_on_after_abort: bool = True
    cancellation_closes_connection: bool = True
    implicit_commit: re.Pattern[str] | None = re.compile(
        r"\s*(?:CREATE(?!\s+(?:OR\s+REPLACE\s+)?TEMPORARY)|DROP(?!\s+TEMPORARY)|ALTER|TRUNCATE|RENAME|GRANT|REVOKE|"
        r"LOCK\s+TABLES?|(?:ANALYZE|CHECK|OPTIMIZE|REPAIR)\s+(?:NO_WRITE_TO_BINLOG\s+|LOCAL\s+)?TABLES?|FLUSH|RESET|"
        r"INSTALL|UNINSTALL|BACKUP|SET\s+(?:PASSWORD|DEFAULT\s+ROLE)|SET\b[^;]*?\bautocommit\s*:?=)(?:\b|(?<==))",
        re.IGNORECASE,
    )
    mode_of_transaction: re.Pattern[str] | None = re.compile(
        r"\s*SET\s+(?:TRANSACTION\b|@@(?:tx|transaction)_(?=(?:isolation|read_only)\b))"
        r"(?:[^;]*?(?P<read_only>READ\s+ONLY|READ_ONLY\s*:?=\s*(?:1|ON|TRUE))\b)?",
        re.IGNORECASE,
    )
    read_only_error_statement: str = (
        "SIGNAL SQLSTATE '25006' SET MYSQL_ERRNO = 1792, "
        "MESSAGE_TEXT = 'Cannot execute statement in a READ ONLY transaction'"
    )
    error_statements: Mapping[CommitFailure, str] = {
        "integrity": "SIGNAL SQLSTATE '23000' SET MYSQL_ERRNO = 1062, MESSAGE_TEXT = 'a test asked for this'",
        "serialization": "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'a test asked for this'",
    }
    disconnect_statement: str | None = "KILL CONNECTION_ID()"

    def prepare(self, engine: Engine, *, made_here: bool) -> None:
        """Begin READ ONLY where the execution options say so."""
        event.listen(engine, "begin", _begin)

    def begin_options(self, *, read_only: bool, may_write: bool) -> dict[str, Any]:
        """Begin READ ONLY where the policy says so."""
        return {_READ_ONLY_OPTION: True} if read_only else {}

    def begin_for_good(self, connection: Connection) -> None:
        """The driver leaves it to the first statement that reads or writes a table; SAVEPOINT is not one."""
        connection.exec_driver_sql("START TRANSACTION")

    def is_aborted(self, pooled: PoolProxiedConnection, error: BaseException, dialect: Dialect) -> bool:
        """The code of the error says so; for a lock wait timeout, together with a setting of the server."""
        code = _code_of(error)
        if code == _LOCK_WAIT_TIMEOUT:
            cursor: Any = pooled.cursor()
            try:
                cursor.execute("SELECT @@innodb_rollback_on_timeout")
                return bool(cursor.fetchone()[0])
            finally:
                cursor.close()
        return code in _ENDS_TRANSACTION

    def has_refused_commit(self, error: BaseException, dialect: Dialect) -> bool:
        """By the code of the server's error; those of the client begin at 2000."""
        return _code_of(error) in _REFUSALS

    def has_refused_to_write(self, error: BaseException) -> bool:
        """By the code of ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION."""
        return bool(_code_of(error) == 1792)


def _begin(connection: Connection) -> None:
    if connection.get_execution_options().get(_READ_ONLY_OPTION):
        connection.exec_driver_sql("START TRANSACTION READ ONLY")


def _code_of(error: Any) -> Any:
    driver_error = getattr(error, "orig", error)
    return driver_error.args[0] if driver_error.args else None
