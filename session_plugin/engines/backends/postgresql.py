"""PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import Dialect
from sqlalchemy.pool import PoolProxiedConnection

from ..autocommit import is_autocommit
from .interface import Backend, CommitFailure
from .syntax import HARMLESS, Syntax, words

CHECK_CONSTRAINTS = """DO $$ BEGIN
    BEGIN
        SET CONSTRAINTS ALL IMMEDIATE;
        RAISE 'checked' USING ERRCODE = 'SP000';
    EXCEPTION WHEN SQLSTATE 'SP000' THEN
        NULL;
    END;
END $$"""
"""Checks all deferred constraints, and leaves them deferred: the error that ends the inner block restores that."""

_SETTINGS = """SELECT name, setting FROM pg_catalog.pg_settings
WHERE source = 'session' AND context IN ('user', 'superuser') AND left(name, 12) <> 'transaction_'
UNION ALL
SELECT name, pg_catalog.current_setting(name, true) FROM unnest(ARRAY[{}]::text[]) AS name"""
_ROLES = ("session_authorization", "role")
"""In this order, since the first resets the second; pg_settings does not show them, nor custom settings."""
_RESTORE_CONSTRAINTS = """DO $$ DECLARE found record; BEGIN
    FOR found IN
        SELECT format('%I.%I', nspname, conname) AS name,
            CASE WHEN condeferred THEN 'DEFERRED' ELSE 'IMMEDIATE' END AS mode
        FROM pg_catalog.pg_constraint JOIN pg_catalog.pg_namespace ON pg_namespace.oid = connamespace
        WHERE condeferrable
    LOOP
        EXECUTE 'SET CONSTRAINTS ' || found.name || ' ' || found.mode;
    END LOOP;
END $$"""

SYNTAX = Syntax(
    hash_comments=False,
    nested_comments=True,
    dollar_quotes=True,
    backticks=False,
    brackets=False,
    dashes_need_space=False,
    line_ends="\r\n",
    escape_strings=True,
    local_ends_with_transaction=True,
    harmless=HARMLESS
    | words("""
        acos age any_value array_agg array_append array_cat array_dims array_length array_lower array_ndims
        array_position array_positions array_prepend array_remove array_replace array_to_json array_to_string
        array_upper ascii asin atan atan2 bit_and bit_length bit_or bool_and bool_or btrim cardinality cbrt chr
        clock_timestamp col_description corr cos covar_pop covar_samp current_database current_schema current_schemas
        current_setting currval date_bin date_part date_trunc daterange decode degrees div encode format format_type
        gen_random_uuid generate_series generate_subscripts has_column_privilege has_schema_privilege
        has_table_privilege inet_client_addr initcap int4range int8range isempty isfinite json_agg json_array_elements
        json_array_elements_text json_array_length json_build_array json_build_object json_each json_each_text
        json_extract_path json_extract_path_text json_object json_object_agg json_object_keys json_to_record
        json_to_recordset json_typeof jsonb_agg jsonb_array_elements jsonb_array_elements_text jsonb_array_length
        jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path jsonb_extract_path_text
        jsonb_insert jsonb_object jsonb_object_agg jsonb_object_keys jsonb_path_exists jsonb_path_match
        jsonb_path_query jsonb_path_query_array jsonb_path_query_first jsonb_pretty jsonb_set jsonb_strip_nulls
        jsonb_to_record jsonb_to_recordset jsonb_typeof justify_days justify_hours justify_interval lastval left
        lower_inc lower_inf lpad make_date make_interval make_time make_timestamp make_timestamptz md5 mode num_nonnulls
        num_nulls numnode numrange obj_description percentile_cont percentile_disc pg_backend_pid pg_column_size
        pg_current_xact_id_if_assigned pg_database_size pg_encoding_to_char pg_get_constraintdef pg_get_expr
        pg_get_indexdef pg_get_serial_sequence pg_get_userbyid pg_get_viewdef pg_indexes_size pg_is_in_recovery
        pg_postmaster_start_time pg_relation_size pg_size_pretty pg_sleep pg_sleep_for pg_table_is_visible pg_table_size
        pg_total_relation_size pg_type_is_visible pg_typeof phraseto_tsquery pi plainto_tsquery quote_ident
        quote_literal quote_nullable radians random range_agg range_merge regexp_count regexp_instr regexp_like
        regexp_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table regexp_substr
        regr_intercept regr_r2 regr_slope repeat reverse right row_to_json rpad session_user setweight sha224 sha256
        sha384 sha512 sin split_part starts_with statement_timestamp stddev stddev_pop stddev_samp string_agg
        string_to_array string_to_table strpos tan timeofday to_char to_date to_json to_jsonb to_number to_regclass
        to_timestamp to_tsquery to_tsvector transaction_timestamp translate trunc ts_headline ts_rank ts_rank_cd
        tsrange tstzrange txid_current_if_assigned unnest upper_inc upper_inf var_pop var_samp variance
        websearch_to_tsquery width_bucket
    """),
    operators=words("bernoulli similar system"),
)

_IN_ERROR = 3
"""libpq's PQTRANS_INERROR."""
_NO_REFUSAL = re.compile("08|40003|57P|58|XX")
"""The SQLSTATEs of lost connections, of "statement completion unknown", of sessions that the server ended (shutdown,
crash, idle time-out), and of failures inside the server; poolers use some of these too."""


class PostgreSQL(Backend):
    """Refuses every statement of an aborted transaction until ROLLBACK."""

    names: tuple[str, ...] = ("postgresql",)
    syntax = SYNTAX
    has_lazy_cursors: bool = False
    sees_raw_writes: bool = True
    async_driver: str | None = "asyncpg"
    read_only_statement: str | None = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"
    enforces_read_only_in_savepoint: bool = True
    error_statements: Mapping[CommitFailure, str] = {
        "integrity": "DO $$ BEGIN RAISE EXCEPTION 'a test asked for this' USING ERRCODE = '23505'; END $$",
        "serialization": "DO $$ BEGIN RAISE EXCEPTION 'a test asked for this' USING ERRCODE = '40001'; END $$",
    }
    disconnect_statement: str | None = "SELECT pg_terminate_backend(pg_backend_pid())"
    drop_statement: str | None = "DROP DATABASE IF EXISTS {} WITH (FORCE)"  # the app may still have connections

    def begin_options(self, *, read_only: bool, may_write: bool) -> dict[str, Any]:
        """Begin READ ONLY where the policy says so."""
        return {"postgresql_readonly": True} if read_only else {}

    def begin_now(self, connection: Connection) -> None:
        """On asyncpg, SQLAlchemy sends BEGIN with the first statement; what the driver sent before commits itself."""
        if connection.dialect.driver == "asyncpg" and not is_autocommit(connection.get_execution_options()):
            driver_connection: Any = connection.connection.driver_connection
            if not driver_connection.is_in_transaction():
                connection.exec_driver_sql("SELECT 1").close()

    def is_known_to_be_aborted(self, pooled: PoolProxiedConnection) -> bool:
        """Psycopg and psycopg2 remember the state of the transaction; errors of raw cursors are seen this way too."""
        driver_connection = pooled.driver_connection
        libpq = getattr(driver_connection, "pgconn", None) or getattr(driver_connection, "info", None)
        return getattr(libpq, "transaction_status", None) == _IN_ERROR

    def has_refused_commit(self, error: BaseException, dialect: Dialect) -> bool:
        """An ERROR says so: the server has rolled back by then.  After a FATAL one the session is gone."""
        sqlstate = _sqlstate_of(error)
        if sqlstate is None:  # so psycopg reports that the server has no room for prepared transactions
            return isinstance(error, dialect.loaded_dbapi.NotSupportedError)
        return not _NO_REFUSAL.match(sqlstate) and _severity_of(error) == "ERROR"

    def has_refused_to_write(self, error: BaseException) -> bool:
        """By its SQLSTATE, read_only_sql_transaction."""
        return _sqlstate_of(error) == "25006"

    def has_written(self, pooled: PoolProxiedConnection, mark: Any, dialect: Dialect) -> bool:
        """A transaction gets its number with the first row that it writes or locks; True if the server cannot say."""
        if self.is_known_to_be_aborted(pooled):
            return True
        cursor: Any = pooled.cursor()
        try:
            cursor.execute("SELECT txid_current_if_assigned()")
            return cursor.fetchone()[0] is not None
        except dialect.loaded_dbapi.Error:
            return True
        finally:
            cursor.close()

    def deferred_constraints_check(self, connection: Connection) -> Callable[[Connection], None]:
        """The same statement checks the constraints of any transaction."""
        return _check_constraints

    def settings(self, pooled: PoolProxiedConnection, names: Iterable[str]) -> dict[str, str]:
        """Ask the server; custom settings can only be asked for by name."""
        rows = _execute(pooled, _SETTINGS.format(", ".join(_quoted(name) for name in [*_ROLES, *names])))
        return {name: value for name, value in rows if value is not None}

    def restore_settings(self, pooled: PoolProxiedConnection, settings: Mapping[str, str]) -> None:
        """RESET ALL also finds what a function has set, but knows nothing of what was set after connecting."""
        others = [name for name in settings if name not in _ROLES]
        calls = (
            f"pg_catalog.set_config({_quoted(name)}, {_quoted(settings[name])}, true)" for name in [*_ROLES, *others]
        )
        _execute(pooled, "RESET ALL")
        _execute(pooled, f"SELECT {', '.join(calls)}")

    def restore_constraints(self, pooled: PoolProxiedConnection) -> None:
        """Set each one to what its definition says."""
        _execute(pooled, _RESTORE_CONSTRAINTS)

    def begin_read_only_savepoint(self, connection: Connection) -> None:
        """PostgreSQL restores the mode of the transaction when the savepoint ends."""
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")


def _execute(pooled: PoolProxiedConnection, statement: str) -> Sequence[Any]:
    """Execute on the driver's cursor, which the guard of the connection and listeners of the user do not see."""
    cursor: Any = pooled.cursor()
    try:
        cursor.execute(statement)
        rows: Sequence[Any] = cursor.fetchall() if cursor.description else ()
        return rows
    finally:
        cursor.close()


def _quoted(value: str) -> str:
    return "E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _check_constraints(connection: Connection) -> None:
    connection.exec_driver_sql(CHECK_CONSTRAINTS)


def _sqlstate_of(error: BaseException) -> str | None:
    sqlstate: str | None = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return sqlstate


def _severity_of(error: Any) -> str | None:
    """Return the severity in English: of psycopg and psycopg2 from ``diag``, of asyncpg from the error it wraps."""
    fields = getattr(error, "diag", None)
    severity: str | None = getattr(fields, "severity_nonlocalized", None) or getattr(
        error.__cause__, "severity_en", None
    )
    return severity
