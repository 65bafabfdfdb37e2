"""What a statement may do, read off its text."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from sqlalchemy import column, func, select, table, text
from sqlalchemy.dialects import mysql, postgresql, sqlite

from session_plugin.engines import statements
from session_plugin.engines.backends import backend_for
from session_plugin.engines.statements import Effects, Kind, effects, kind

READ = Effects(may_write=False, writes=False, holds=False, changes_session=False)
LOCK = READ._replace(holds=True)
LOCAL = LOCK
SESSION = READ._replace(holds=True, changes_session=True)
CALL = Effects(may_write=True, writes=False, holds=True, changes_session=True)
WRITE = Effects(may_write=True, writes=True, holds=True, changes_session=False)
EVERYTHING = WRITE._replace(changes_session=True)
EVERYWHERE = ("postgresql", "mysql", "sqlite", "oracle")


def on(dialect: str, statement: str) -> Effects:
    return effects(statement, backend_for(dialect).syntax)


READS = [
    "SELECT 1",
    "",
    "-- only a comment",
    "SELECT t.a AS t_a, count(*) AS n FROM t WHERE t.b IN (%(b_1)s, %(b_2)s) GROUP BY t.a HAVING sum(t.c) > %s",
    "(SELECT 1) UNION ALL (SELECT coalesce(a, 2) FROM t) ORDER BY 1",
    "VALUES (1), (2)",
    "TABLE t",
    "WITH a AS (SELECT 1) SELECT * FROM a",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n), m (j) AS (SELECT 1) SELECT * FROM n, m",
    "SELECT * FROM (VALUES (1, 2)) AS v(a, b) WHERE EXISTS (SELECT 1) AND NOT (a = ANY (SELECT 2))",
    "SELECT CAST(a AS NUMERIC(10, 2)), row_number() OVER (PARTITION BY a) FROM t",
    "SELECT max(a) FILTER (WHERE a > 1) OVER (ORDER BY b) FROM t",
    "SELECT ';', 'INSERT INTO t', \"update\", t.insert, t.into FROM t; SELECT 2;",
    "SELECT 'it''s f()' -- f()\n, 1.5e3, 0x1F /* g() */",
    "SELECT a FROM t WHERE b LIKE '/%' ESCAPE ('/') GROUP BY GROUPING SETS ((a), (b)) ORDER BY (a)",
    "SHOW server_version",
    "EXPLAIN SELECT * FROM t",
    "EXPLAIN INSERT INTO t (a) VALUES (1)",
    "EXPLAIN DELETE FROM t",
    "DESCRIBE t",
    "EXPLAIN ANALYZE SELECT count(*) FROM t",
    "SAVEPOINT sa_savepoint_1",
    "ROLLBACK TO SAVEPOINT sa_savepoint_1",
    "RELEASE SAVEPOINT sa_savepoint_1",
    "COMMIT",
    "PREPARE TRANSACTION 'x'",
    "COMMIT PREPARED 'x'",
    "XA END 'x'",
]
BEGINS = [
    "BEGIN IMMEDIATE",
    "START TRANSACTION READ ONLY",
    "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ WRITE",
    "SAVEPOINT a",
    'SAVEPOINT "a"',
    "SELECT 1; SAVEPOINT a; SAVEPOINT sa_savepoint_1",
    "XA START 'x'",
    "XA BEGIN 'x'; XA END 'x'",
]
WRITES = [
    "INSERT INTO t (a, b) VALUES (1, lower('x'))",
    "/* route=/orders */ INSERT INTO t VALUES (1)",
    "-- a comment\n  update t set n = 1",
    "DELETE FROM t WHERE a IN (SELECT max(a) FROM t)",
    "MERGE INTO t USING u ON (t.a = u.a) WHEN NOT MATCHED THEN INSERT (a) VALUES (1)",
    "REPLACE INTO t (a) VALUES (1)",
    "INSERT INTO t (a) VALUES (1) ON CONFLICT (a) DO UPDATE SET (b, c) = (1, 2) RETURNING (a)",
    "INSERT INTO s.t (a) SELECT a FROM u",
    "WITH a AS (INSERT INTO t (n) VALUES (1) RETURNING n) SELECT * FROM a",
    "WITH a(i) AS (SELECT 1), b AS (DELETE FROM t RETURNING n) SELECT * FROM a",
    "SELECT 1; DELETE FROM t",
    "SELECT NEXT VALUE FOR s",
    "SELECT s.a, NEXTVAL FROM s",
]
CALLS = [
    "SELECT f()",
    "SELECT f ( 1 )",
    "VALUES (f())",
    "WITH x AS (SELECT f()) SELECT * FROM x",
    "SELECT * FROM t WHERE a IN (1, f(2))",
    "SELECT * FROM f(1) AS f",
    "SELECT s.count(1)",
    'SELECT "f"(1)',
    'SELECT "count"(1)',
    "SELECT DISTINCT ON (a) f(b) FROM t",
    "SELECT count/* c */\n(DISTINCT f(a)) FROM t",
    "SELECT pg_advisory_lock(1), get_lock('a', 1)",
    "SELECT pg_notify('a', 'b')",
    "SELECT setval('s', 1)",
    "SHOW TABLES WHERE f()",
    "EXPLAIN ANALYZE SELECT f()",
    "SELECT over(1), filter(2)",
    "SELECT escape('x'), a",  # words that are reserved nowhere
    "SELECT a, sets(1)",
    "SELECT by(1)",
    "SELECT system('x')",
    "SELECT bernoulli(1)",
    "SELECT varying(1), materialized(2)",
    "SELECT minus(1, 2)",
    "SELECT columns(1)",
    "SELECT €sum(1)",
    "SELECT \u017fum(1)",  # its upper case is SUM
    "SELECT $count(1)",
    "WITH a AS (SELECT 1) SELECT max(b), f(b) FROM a",
    "SELECT a FROM t GROUP BY a WITH ROLLUP, f(1)",
    "SELECT a %scount(b)",
    "SELECT set_config2('a', 'b', TRUE)",
]
EVERYTHINGS = [
    "CREATE TABLE more (n INTEGER)",
    "CREATE TEMP TABLE more (n INTEGER)",
    "DROP TABLE t",
    "TRUNCATE t",
    "REFRESH MATERIALIZED VIEW v",
    "GRANT SELECT ON t TO somebody",
    "LOCK TABLE t",
    "NOTIFY a, 'b'",
    "LISTEN a",
    "CALL p()",
    "DO $$ BEGIN PERFORM f(); END $$",
    "DO f()",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "DISCARD ALL",
    "COPY t FROM STDIN",
    "VACUUM",
    "ANALYZE INSERT INTO t VALUES (1)",
    "EXPLAIN ANALYZE INSERT INTO t VALUES (1)",
    "EXPLAIN (FORMAT JSON, ANALYZE, VERBOSE) UPDATE t SET a = 1",
    "EXPLAIN ANALYZE EXECUTE p",
    'EXPLAIN (VERBOSE, "analyze") DELETE FROM t',
    "SELECT * INTO u FROM t",
    "WITH x AS (INSERT INTO t VALUES (1) RETURNING a) SELECT a INTO u FROM x",
    "INSERT INTO t VALUES (f())",
    "INSERT INTO t SELECT f() FROM u",
    "UPDATE t SET a = f()",
    "BEGIN NOT ATOMIC DELETE FROM t; END",
    "BEGIN p(); END",
    "START REPLICA",
    "SET STATEMENT max_statement_time = 1 FOR UPDATE t SET a = 1",
    "SET GLOBAL x = 1",
    "SET PASSWORD = 'x'",
    "SELECT 1; HANDLER t OPEN",
]


@pytest.mark.parametrize("dialect", EVERYWHERE[:3])
@pytest.mark.parametrize("statement", READS)
def test_plain_reads_and_what_begins_or_ends_a_transaction_write_nothing(statement: str, dialect: str) -> None:
    """A rollback of them discards nothing."""
    assert on(dialect, statement) == READ
    assert kind(statement, backend_for(dialect).syntax) is Kind.READ


@pytest.mark.parametrize("dialect", EVERYWHERE)
@pytest.mark.parametrize("statement", BEGINS)
def test_a_transaction_or_a_savepoint_that_the_app_begins_is_held(statement: str, dialect: str) -> None:
    """The session knows nothing of it, other than of its own savepoints."""
    assert on(dialect, statement) == LOCK
    assert kind(statement, backend_for(dialect).syntax) is Kind.HOLDS


@pytest.mark.parametrize("dialect", EVERYWHERE)
@pytest.mark.parametrize(
    ("statement", "expected"),
    [(each, WRITE) for each in WRITES] + [(each, EVERYTHING) for each in EVERYTHINGS],
)
def test_what_is_no_plain_read_may_write(statement: str, expected: Effects, dialect: str) -> None:
    """Whether its words say so or are not known."""
    found = on(dialect, statement)
    assert found.may_write
    assert found.holds
    assert found.changes_session or not expected.changes_session
    assert kind(statement, backend_for(dialect).syntax) is Kind.MAY_WRITE


@pytest.mark.parametrize("dialect", EVERYWHERE)
@pytest.mark.parametrize("statement", CALLS)
def test_a_function_of_which_nothing_is_known_may_do_everything(statement: str, dialect: str) -> None:
    """A name that is known elsewhere only, or in another schema, is not known."""
    assert on(dialect, statement) == CALL
    assert kind(statement, backend_for(dialect).syntax) is Kind.MAY_WRITE


@pytest.mark.parametrize(
    ("dialect", "statement", "expected"),
    [
        # locks
        ("postgresql", "SELECT * FROM t FOR UPDATE OF t NOWAIT", LOCK),
        ("postgresql", "SELECT * FROM t FOR NO KEY UPDATE", LOCK),
        ("postgresql", "SELECT * FROM t FOR KEY SHARE SKIP LOCKED", LOCK),
        ("mysql", "SELECT * FROM t LOCK IN SHARE MODE", LOCK),
        ("mysql", "SELECT * FROM t FOR SHARE", LOCK),
        ("postgresql", "SELECT substring(a FROM 2 FOR 3), share FROM t", READ),
        ("mssql", "SELECT a FROM t WITH (UPDLOCK, ROWLOCK)", LOCK),
        ("mssql", "SELECT a FROM t WITH (NOLOCK)", READ),
        ("mysql", "SELECT SQL_CALC_FOUND_ROWS a FROM t LIMIT 1", LOCK),
        # the state of the session
        ("postgresql", "SET LOCAL app.tenant = 'me'", LOCAL),
        ("postgresql", "SET TRANSACTION READ ONLY", LOCAL),
        ("postgresql", "SET CONSTRAINTS ALL IMMEDIATE", LOCAL),
        ("postgresql", "SET search_path TO a, b", SESSION),
        ("postgresql", "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", SESSION),
        ("postgresql", "RESET ROLE", SESSION),
        ("mysql", "SET LOCAL sql_mode = DEFAULT", SESSION),
        ("mysql", "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED", SESSION),
        ("mysql", "SET @a = 1", SESSION),
        ("mysql", "SET @a = f()", CALL),
        ("mysql", "SELECT @a := 1", SESSION),
        ("mysql", "SELECT 1 INTO @a", EVERYTHING),
        ("mysql", "USE other", SESSION),
        ("postgresql", "SELECT set_config('a', %(b)s, TRUE)", LOCAL),
        ("postgresql", "SELECT pg_catalog.set_config($1, $2, true)", LOCAL),
        ("postgresql", "SELECT set_config(%(a)s, %(b)s, %(c)s)", SESSION),
        ("postgresql", "SELECT set_config('a', 'b', false)", SESSION),
        ("postgresql", "SELECT set_config('a', 'b', is_local => true)", SESSION),
        ("postgresql", "SELECT set_config('a', f(1, true), false), lower(true)", CALL),
        ("postgresql", "SELECT mine.set_config('a', 'b', true)", CALL),
        # names
        ("postgresql", "SELECT pg_catalog.count(*), pg_catalog.lower(a)", READ),
        ("mysql", "SELECT pg_backend_pid()", CALL),
        ("sqlite", "SELECT json_extract(a, '$.b'), strftime('%Y') FROM json_each(%s)", READ),
        ("sqlite", "SELECT uuid()", CALL),
        # quotes and comments
        ("postgresql", "SELECT $$ f() $$, $tag$ $$ ' f() $tag$, $1", READ),
        ("postgresql", "SELECT $tag$ f() $other$", CALL._replace(writes=False)),
        ("postgresql", "SELECT E'it\\'s f()', e'\\\\'", READ),
        ("postgresql", "SELECT E'\\\\', f(), ''", CALL),
        ("postgresql", "SELECT 'C:\\dir\\\\', 1", READ),
        ("postgresql", "SELECT '\\', f(), '\\'", CALL),
        ("postgresql", "SELECT a # f()", CALL),
        ("postgresql", "SELECT a #> b, a->'c', a ? 'd', b[1], (a)::varchar(3)", READ),
        ("postgresql", "SELECT ARRAY[f()]", CALL),
        ("postgresql", "SELECT a[1:f(1)]", CALL),
        ("postgresql", "SELECT 1 /* /* */ f() */", READ),
        ("postgresql", "SELECT 1 /* /* */ , f()", CALL),
        ("postgresql", "SELECT 1 -- c\r, f()", CALL),
        ("postgresql", "SELECT 1--f()", READ),
        ("postgresql", "SELECT `f`(1)", READ),
        ("sqlite", "SELECT 1 /* /* */ , f()", CALL),
        ("sqlite", "SELECT 1 -- c\r, f()", READ),
        ("sqlite", "SELECT '\\', f(), '\\'", CALL),
        ("sqlite", 'SELECT `a f(`, [b f(], "c "" f(" FROM t', READ),
        ("sqlite", "SELECT [f](1)", CALL),
        ("sqlite", "SELECT [f(1)", CALL),
        ("sqlite", "SELECT #f(1)", CALL),
        ("sqlite", "SELECT $$ $$", CALL),
        ("mysql", "SELECT 1--f()", CALL),
        ("mysql", "SELECT 1-- f()", READ),
        ("mysql", "SELECT 1 --", READ),
        ("mysql", "SELECT 1 # f()\n", READ),
        ("mysql", "SELECT 1 # c\n, f()", CALL),
        ("mysql", "SELECT 'it\\'s'", CALL),
        ("mysql", 'SELECT "it\\"s"', CALL),
        ("mysql", "SELECT 1 /*! , f() */", CALL),
        ("mysql", "SELECT 1 /*M! , f() */", CALL),
        ("mysql", "SELECT /*+ NO_ICP(t) */ 1", READ),
        ("mysql", "SELECT `a` FROM `t` USE INDEX (a) WHERE MATCH (a) AGAINST ('b')", READ),
        ("mysql", "SELECT `f`(1)", CALL),
        ("mysql", "SELECT `f(1)", CALL),
        ("mysql", "INSERT INTO t (a) VALUES (1) ON DUPLICATE KEY UPDATE a = VALUES(a)", WRITE),
        # of a database of which nothing is known
        ("oracle", "SELECT a FROM t WHERE b = :b_1 AND c = 'd'", READ),
        ("oracle", "SELECT [a] FROM t", CALL),
        ("oracle", "SELECT `a` FROM t", CALL),
        ("oracle", "SELECT 1 # 2", CALL),
        ("oracle", "SELECT 1--2", CALL),
        ("oracle", "SELECT 1 /* /* */", CALL),
        ("oracle", "SELECT 1 /* a */ -- b", READ),
        ("oracle", "SELECT s.nextval FROM dual", WRITE),
        # what is no statement
        ("postgresql", "SELECT 1into t", CALL),
        ("postgresql", "SELECT 'a", CALL),
        ("postgresql", "SELECT 1 /* a", CALL),
        ("postgresql", "SELECT 1)", CALL),
        ("postgresql", ") SELECT 1", EVERYTHING),
        # pragmas
        ("sqlite", "PRAGMA journal_mode", READ),
        ("sqlite", 'PRAGMA main.table_info("t")', READ),
        ("sqlite", "PRAGMA query_only = ON", SESSION),
        ("sqlite", "PRAGMA journal_mode = WAL", EVERYTHING),
        ("sqlite", "PRAGMA main.journal_mode(WAL)", EVERYTHING),
        ("sqlite", "PRAGMA optimize", EVERYTHING),
    ],
)
def test_each_database_reads_in_its_own_way(dialect: str, statement: str, expected: Effects) -> None:
    """Where its text can be read in two ways, a statement may do everything."""
    assert on(dialect, statement) == expected
    expected_kind = Kind.MAY_WRITE if expected.may_write else Kind.HOLDS if expected.holds else Kind.READ
    assert kind(statement, backend_for(dialect).syntax) is expected_kind


ROWS = table("rows", column("id"), column("name"))


@pytest.mark.parametrize("dialect", [postgresql.psycopg.dialect(), postgresql.asyncpg.dialect(), mysql.dialect(),
                                     sqlite.dialect()])  # fmt: skip
def test_what_sqlalchemy_compiles_is_a_plain_read(dialect: Any) -> None:
    """With parameters, CTEs, aliases, windows and subqueries."""
    cte = select(ROWS.c.id.label("n")).where(ROWS.c.name == "a").cte("more", recursive=True)
    cte = cte.union_all(select(cte.c.n + 1).where(cte.c.n < 3))
    ranked = select(ROWS, func.row_number().over(partition_by=ROWS.c.name, order_by=ROWS.c.id).label("r")).subquery()
    query = (
        select(ranked, func.count().filter(ranked.c.id > 1), func.coalesce(func.max(cte.c.n), 0))
        .join(cte, cte.c.n == ranked.c.id)
        .where(ranked.c.name.in_(["a", "b"]), ranked.c.id.not_in(select(ROWS.c.id)))
        .group_by(*ranked.c)
        .limit(3)
        .offset(1)
    )
    for statement in (query, query.with_for_update()):
        compiled = str(statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True}))
        assert not on(dialect.name, compiled).may_write, compiled
        assert not on(dialect.name, compiled).changes_session


def steps(statement: str, syntax: Any) -> int:
    """The lines that reading ``statement`` executes."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == statements.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        statements._effects.__wrapped__(statement, syntax)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("dialect", EVERYWHERE)
@pytest.mark.parametrize(
    "part",
    [
        "/* a line of a header */\n", "-- a comment\n", "# a comment\n", "/*", "/* ", "*/", "'", '"', "`", "[", "$$",
        "$a$", "$a", "(", ")", "''", "\\'", "E'", "(SELECT ", "WITH a AS (", "WITH INSERT ", "a.", "%(a)s, ",
        "?, ", "1", "1 ",
        "f(", ", a AS (", "\r", "--", "/*!", ";", "a ", "€", "set_config(", "SELECT 1;", "EXPLAIN ", "PRAGMA x.",
    ],
)  # fmt: skip
def test_reading_is_linear(part: str, dialect: str) -> None:
    """However it is written: twice the text takes at most twice the steps, and no step looks at it all."""
    syntax = backend_for(dialect).syntax
    for before in ("", "SELECT "):
        short, long = (steps(before + part * count, syntax) for count in (200, 400))
        assert long <= 2 * short + 50


def test_a_token_is_found_without_going_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the regular expressions look at is at most a small multiple of the text."""
    looked = 0

    class Counting:
        def __init__(self, pattern: Any) -> None:
            self.pattern = pattern

        def search(self, text: str, start: int) -> Any:
            nonlocal looked
            found = self.pattern.search(text, start)
            looked += (len(text) if found is None else found.end()) - start
            return found

    for name in ("_ENDS_OF_STRING", "_ENDS_OF_LINE"):
        counting = {key: Counting(pattern) for key, pattern in getattr(statements, name).items()}
        monkeypatch.setattr(statements, name, counting)
    monkeypatch.setattr(statements, "_COMMENT_MARKS", Counting(statements._COMMENT_MARKS))
    for dialect in EVERYWHERE:
        for part in ("-- a\n", "/* /* */ */ ", "'a' ", "'a''b' ", '"a" ', "'\\\\' "):
            text, looked = "SELECT " + part * 500, 0
            statements._effects.__wrapped__(text, backend_for(dialect).syntax)
            assert looked <= 2 * len(text)


def test_long_statements_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would fill the memory; the others are read once."""
    syntax = backend_for("sqlite").syntax
    monkeypatch.setattr(statements, "LONGEST_CACHED", 20)
    statements._effects.cache_clear()
    statements._kind.cache_clear()
    for _ in range(2):
        for statement in ("SELECT 1", "SELECT 1 /* and a comment */"):
            assert effects(statement, syntax) == READ
            assert kind(statement, syntax) is Kind.READ
    for cached in (statements._effects, statements._kind):
        assert cached.cache_info()[:2] == (1, 1)
        assert cached.cache_info().maxsize


def test_text_is_read_as_the_driver_receives_it() -> None:
    """A colon that SQLAlchemy's text() takes for a parameter is none any more."""
    compiled = str(text("SELECT :a, f(:b)").compile(dialect=postgresql.psycopg.dialect()))
    assert on("postgresql", compiled) == CALL
