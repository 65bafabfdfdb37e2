"""What a statement may do, read off its text: `effects()`.

Whatever is not known to be a plain read counts as a write: a SELECT too may call a function that writes.  The
text is read once, from left to right, by a scanner that never goes back: a backtracking expression can take
exponential time on a few comments, and holds the GIL meanwhile.  Where the text can be read in two ways, for
example because a setting of the server decides what a backslash means, the statement may do everything.

What triggers, rules, views, operators, and functions that are known here by name do inside is not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from .backends.syntax import Syntax, words

LONGEST_CACHED = 32_000
"""Characters: longer statements are read anew each time, so that they do not fill the memory."""


class Effects(NamedTuple):
    """What a statement may do.

    Attributes:
        may_write: False for a plain read, and for what only begins, ends or sets up a transaction.
        writes: True if the statement itself is or contains an INSERT or the like; if only ``may_write`` is True,
            it calls a function of which nothing is known, or its text can be read in two ways.
        holds: True if giving the connection back would lose something: what it may have written, a lock, or a
            setting.
        changes_session: True if it may leave something behind that outlives the transaction: a setting, a prepared
            statement, a temporary table, a lock of the session.
    """

    may_write: bool
    writes: bool
    holds: bool
    changes_session: bool


def effects(statement: str, syntax: Syntax) -> Effects:
    """Return what ``statement``, one or more separated by semicolons, may do on a database with this ``syntax``."""
    read = _effects if len(statement) <= LONGEST_CACHED else _effects.__wrapped__
    return read(statement, syntax)


class Kind(IntEnum):
    """What the guard of a connection asks about a statement.

    Attributes:
        READ: a plain read, which is false in a condition.
        HOLDS: it writes nothing, but giving the connection back would lose a lock or a setting.
        MAY_WRITE: anything else.
    """

    READ = 0
    HOLDS = 1
    MAY_WRITE = 2


def kind(statement: str, syntax: Syntax) -> Kind:
    """Return the kind of ``statement``; one that writes is not read to its end."""
    if len(statement) <= LONGEST_CACHED:
        return _kind(statement, syntax)
    return _kind.__wrapped__(statement, syntax)


@lru_cache(maxsize=512)
def _effects(statement: str, syntax: Syntax) -> Effects:
    try:
        reader = _Reader(syntax)
        for token in tokens(statement, syntax):
            reader.read(token)
    except _NotKnownError as error:
        return Effects(True, not isinstance(error, _UnclearError), True, True)
    may_write = reader.writes or reader.calls
    holds = may_write or reader.holds or reader.changes
    return Effects(may_write, reader.writes, holds, reader.changes)


@lru_cache(maxsize=512)
def _kind(statement: str, syntax: Syntax) -> Kind:
    try:
        reader = _Reader(syntax)
        for token in tokens(statement, syntax):
            reader.read(token)
            if reader.writes or reader.calls:
                return Kind.MAY_WRITE
    except _NotKnownError:
        return Kind.MAY_WRITE
    return Kind.HOLDS if reader.holds or reader.changes else Kind.READ


class _NotKnownError(Exception):
    """The statement is of a kind that is not known here."""


class _UnclearError(_NotKnownError):
    """The text can be read in two ways, or is no statement at all."""


# -- tokens -------------------------------------------------------------------------------------

NAME, STRING, NUMBER = '"', "'", "0"
"""Stand for any quoted identifier, string or number; every other token is its own text, words in upper case."""

_LETTER = r"[A-Za-z0-9_$\x80-\U0010ffff]"
_PARAMETER = rf"(?:%(?:\(\w+\))?s(?!{_LETTER})|\?|\$\d+(?:::\w+)?)"
_TOKEN = re.compile(
    rf"""(?P<skip>(?:[ \t\n\r\f\v]++|{_PARAMETER}(?:,[ ]{_PARAMETER})*+)++)
    |(?P<dollar>\$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*)?\$)
    |(?P<word>[A-Za-z_$\x80-\U0010ffff]{_LETTER}*)
    |(?P<number>(?:0[xX][0-9a-fA-F]+|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)(?P<junk>{_LETTER})?)
    |(?P<comment>--|/\*|\#)
    |(?P<quote>['"`\[])
    |(?P<symbol>::|:=|.)""",
    re.VERBOSE | re.DOTALL,
)
_ENDS_OF_STRING = {"'": re.compile(r"['\\]"), '"': re.compile(r'["\\]')}
_ENDS_OF_LINE = {ends: re.compile(f"[{ends}]") for ends in ("\n", "\r\n")}
_COMMENT_MARKS = re.compile(r"/\*|\*/")


def tokens(statement: str, syntax: Syntax) -> Iterator[str]:
    """Yield the tokens of ``statement`` without its comments and parameters; each character is looked at once or twice.

    Raises:
        _UnclearError: it is not known how the database reads it.
    """
    position, end = 0, len(statement)
    while position < end:
        found = _TOKEN.match(statement, position)
        assert found is not None  # the last alternative takes any character
        kind, text = found.lastgroup, found[0]
        position = found.end()
        if kind == "word":
            escapes = syntax.escape_strings and text in ("E", "e") and statement.startswith("'", position)
            if escapes:
                position = _end_of_string(statement, position, escapes=True)
            yield STRING if escapes else text.upper() if text.isascii() else text
        elif kind == "quote":
            position, token = _end_of_quote(statement, found.start(), syntax)
            yield token
        elif kind == "comment":
            position, token = _end_of_comment(statement, found.start(), syntax)
            if token:
                yield token
        elif kind == "dollar":
            position = _end_of_dollar_quote(statement, found, syntax)
            yield STRING
        elif kind == "number":
            if found["junk"]:
                raise _UnclearError  # "1into t" is a number and a word in one version, an error in another
            yield NUMBER
        elif kind == "symbol":
            yield text


def _end_of_string(statement: str, start: int, *, escapes: bool | None) -> int:
    quote = statement[start]
    position = start + 1
    while True:
        found = _ENDS_OF_STRING[quote].search(statement, position)
        if found is None:
            raise _UnclearError
        position = found.end()
        following = statement[position : position + 1]
        if found[0] == "\\":
            if escapes is None and following == quote:
                raise _UnclearError
            if escapes is not False and following in (quote, "\\"):
                position += 1
        elif following == quote:
            position += 1
        else:
            return position


def _end_of_quote(statement: str, start: int, syntax: Syntax) -> tuple[int, str]:
    quote = statement[start]
    if quote == "'":
        return _end_of_string(statement, start, escapes=syntax.backslash_escapes), STRING
    if quote == '"':  # on MySQL a string, unless a setting of the server makes it an identifier
        return _end_of_string(statement, start, escapes=syntax.backslash_escapes), NAME
    quotes = syntax.backticks if quote == "`" else syntax.brackets
    if quotes is None:
        raise _UnclearError
    if not quotes:
        return start + 1, quote
    end = statement.find(
        "`" if quote == "`" else "]", start + 1
    )  # a doubled backtick makes two names, which does no harm
    if end < 0:
        raise _UnclearError
    return end + 1, NAME


def _end_of_dollar_quote(statement: str, found: re.Match[str], syntax: Syntax) -> int:
    if not syntax.dollar_quotes:
        raise _UnclearError
    end = statement.find(found[0], found.end())
    if end < 0:
        raise _UnclearError
    return end + len(found[0])


def _end_of_comment(statement: str, start: int, syntax: Syntax) -> tuple[int, str]:
    """Return where the comment ends and "", or, if no comment starts here, where this character ends and itself."""
    if statement.startswith("/*", start):
        return _end_of_block_comment(statement, start, syntax), ""
    dashes = statement.startswith("--", start)
    if dashes and syntax.dashes_need_space is not False and statement[start + 2 : start + 3] > " ":
        if syntax.dashes_need_space is None:
            raise _UnclearError
        return start + 1, "-"
    if not dashes and syntax.hash_comments is None:
        raise _UnclearError
    if not dashes and not syntax.hash_comments:
        return start + 1, "#"
    found = _ENDS_OF_LINE[syntax.line_ends].search(statement, start)
    return len(statement) if found is None else found.end(), ""


def _end_of_block_comment(statement: str, start: int, syntax: Syntax) -> int:
    if statement.startswith(("/*!", "/*M!"), start):
        raise _UnclearError  # MySQL executes it
    depth, position = 1, start + 2
    while depth:
        found = _COMMENT_MARKS.search(statement, position)
        if found is None:
            raise _UnclearError
        position = found.end()
        if found[0] == "*/":
            depth -= 1
        elif syntax.nested_comments is None:
            raise _UnclearError
        elif syntax.nested_comments:
            depth += 1
    return position


# -- statements ---------------------------------------------------------------------------------

_QUERIES = words("SELECT VALUES TABLE WITH SHOW")
_CHANGES_OF_ROWS = words("INSERT UPDATE DELETE MERGE REPLACE")
_TRANSACTION = words("SAVEPOINT RELEASE ROLLBACK COMMIT END ABORT XA")
_AFTER_BEGIN = words("""
    TRANSACTION WORK DEFERRED IMMEDIATE EXCLUSIVE CONCURRENT ISOLATION LEVEL READ WRITE ONLY COMMITTED UNCOMMITTED
    REPEATABLE SERIALIZABLE NOT DEFERRABLE WITH CONSISTENT SNAPSHOT
""")
_EXPLAINS = words("EXPLAIN DESCRIBE DESC")
_AFTER_EXPLAIN = words("""
    ANALYZE ANALYSE VERBOSE COSTS SETTINGS GENERIC_PLAN BUFFERS SERIALIZE WAL TIMING SUMMARY MEMORY FORMAT TEXT XML JSON
    YAML TREE TRADITIONAL QUERY PLAN EXTENDED PARTITIONS TRUE FALSE ON OFF NONE BINARY
""")
_HARMLESS_PRAGMAS = words("""
    collation_list compile_options database_list foreign_key_check foreign_key_list function_list index_info index_list
    index_xinfo integrity_check module_list pragma_list query_only quick_check table_info table_list table_xinfo
""")
_WRITING_PRAGMAS = words("optimize wal_checkpoint incremental_vacuum shrink_memory")
_OWN_SAVEPOINT = "SA_SAVEPOINT_"
"""How the names begin that SQLAlchemy gives to its savepoints, which its session knows of."""
_LOCK_HINTS = words("HOLDLOCK TABLOCK TABLOCKX UPDLOCK XLOCK")
_SERVER_SETTINGS = words("GLOBAL PERSIST PERSIST_ONLY")
_OTHER_SETTINGS = words("PASSWORD STATEMENT DEFAULT RESOURCE")
_BEFORE_TARGET = words("INSERT REPLACE MERGE IGNORE ABORT FAIL ROLLBACK LOW_PRIORITY HIGH_PRIORITY DELAYED")
_IN_LIST_OF_CTES = words("RECURSIVE AS NOT MATERIALIZED")
_BEFORE_PARENTHESIS = words("""
    ALL AND ANY ARRAY AS BETWEEN BY CASE CROSS CUBE DISTINCT ELSE END ESCAPE EXCEPT EXISTS FROM GROUP HAVING
    ILIKE IN INNER INTERSECT IS JOIN LATERAL LIKE LIMIT MATERIALIZED NOT OFFSET ON ONLY OR ORDER OVERLAPS
    RETURNING ROLLUP ROW SELECT SETS SOME TABLE THEN TO UNION UNIQUE USING VALUES WHEN WHERE WITH
    BIT BPCHAR CHAR CHARACTER DEC DECIMAL FLOAT INTERVAL NCHAR NUMERIC PRECISION TIMESTAMPTZ VARBIT VARCHAR VARYING
""")
_ONLY_AFTER = {
    "BERNOULLI": words("TABLESAMPLE"),
    "BY": words("GROUP ORDER PARTITION"),
    "COLUMNS": frozenset({STRING}),
    "ESCAPE": words("LIKE ILIKE TO") | {STRING},
    "MATERIALIZED": words("AS NOT"),
    "SETS": words("GROUPING"),
    "SYSTEM": words("TABLESAMPLE"),
    "VARYING": words("BIT CHAR CHARACTER NCHAR"),
}
"""Words that are reserved nowhere, and what stands before each where it is not the name of a function."""
_BEFORE_COLUMNS = words("CONFLICT SET INSERT UPDATE KEY")
"""As `_BEFORE_PARENTHESIS`, where rows are changed."""


class _Reader:
    """Reads statements, token by token.

    Attributes:
        writes: True if an INSERT or the like stands there.
        calls: True if a function is called of which nothing is known.
        holds: True if rows are locked, something is set for the transaction, or a transaction or savepoint begins.
        changes: True if the state of the session may change.
    """

    def __init__(self, syntax: Syntax) -> None:
        self.writes = self.calls = self.holds = self.changes = False
        self._syntax = syntax
        self._begin()

    def _begin(self) -> None:
        self._state: Callable[[str], None] = self._read_head
        self._before, self._before_that, self._still_earlier = "", "", ""
        self._parentheses: list[str] = []  # the function that each belongs to, if it matters
        self._lists_of_ctes: set[int] = set()  # how deep in parentheses those are that are being read
        self._target = False  # the table of an INSERT is being named; a PRAGMA is harmless
        self._analyzes = False
        self._changes_rows = False

    def read(self, token: str) -> None:
        """Read the next token."""
        if token == ";":
            self._begin()
            return
        self._state(token)
        self._before, self._before_that, self._still_earlier = token, self._before, self._before_that

    # -- its first words ------------------------------------------------------------------------

    def _read_head(self, token: str) -> None:
        if token == "(":
            return self._read_query(token)
        if token in _QUERIES:
            self._state = self._read_query
            return self._read_query(token)
        if token in _CHANGES_OF_ROWS:
            self.writes = self._changes_rows = True
            self._state = self._read_query
        elif token in _EXPLAINS:
            self._state = self._read_explain
        elif token in ("BEGIN", "START"):
            self.holds = True
            self._state = self._read_begin
        else:
            states = {
                "SET": self._read_set,
                "PRAGMA": self._read_pragma,
                "PREPARE": self._read_prepare,
                "SAVEPOINT": self._read_savepoint,
                "XA": self._read_xa,
            }
            self._state = states.get(token, self._skip)
            if token in ("USE", "RESET"):
                self.changes = True
            elif token not in states and token not in _TRANSACTION:
                raise _NotKnownError
        return None

    def _skip(self, token: str) -> None:
        """Read what changes nothing any more."""

    def _read_savepoint(self, token: str) -> None:
        self.holds = self.holds or not token.startswith(_OWN_SAVEPOINT)
        self._state = self._skip

    def _read_xa(self, token: str) -> None:
        self.holds = self.holds or token in ("BEGIN", "START")
        self._state = self._skip

    def _read_begin(self, token: str) -> None:
        if token != "," and token not in _AFTER_BEGIN:
            raise _NotKnownError

    def _read_prepare(self, token: str) -> None:
        if token != "TRANSACTION":
            raise _NotKnownError
        self._state = self._skip

    def _read_set(self, token: str) -> None:
        self._state = self._read_query
        if token == "CONSTRAINTS":
            self.holds = True
            self._state = self._skip
        elif token in ("LOCAL", "TRANSACTION") and self._syntax.local_ends_with_transaction:
            self.holds = True
        else:
            self.changes = True
            if token in _OTHER_SETTINGS:
                raise _NotKnownError
            self._state = self._read_setting
            self._read_setting(token)

    def _read_setting(self, token: str) -> None:
        if token in _SERVER_SETTINGS:
            raise _NotKnownError
        self._read_query(token)

    def _read_pragma(self, token: str) -> None:
        if self._before == "PRAGMA" or self._before == ".":
            self._target = token in _HARMLESS_PRAGMAS
            if token in _WRITING_PRAGMAS:
                raise _NotKnownError
        elif token == "=":
            self.changes = True
            self.writes = self.writes or not self._target
        elif token == "(" and not self._target:
            raise _NotKnownError

    def _read_explain(self, token: str) -> None:
        if token in ("ANALYZE", "ANALYSE") or (token == NAME and self._before in ("(", ",")):
            self._analyzes = True  # PostgreSQL takes a quoted "analyze" too
        elif token in _QUERIES:
            self._state = self._read_query
            self._before = ""
            self._read_query(token)
        elif self._analyzes and _is_word(token) and token not in _AFTER_EXPLAIN:
            raise _NotKnownError

    # -- queries, and what is written like one --------------------------------------------------

    def _read_query(self, token: str) -> None:
        if token == "(":
            self._open()
        elif token == ")":
            self._close()
        elif token == ":=":
            self.changes = True
        elif token == "WITH" and self._before in ("", "("):
            self._lists_of_ctes.add(len(self._parentheses))
        elif _is_word(token):
            self._read_word(token)
        elif token not in (".", NAME):
            self._target = False

    def _read_word(self, token: str) -> None:
        before = self._before
        depth = len(self._parentheses)
        if depth in self._lists_of_ctes and token not in _IN_LIST_OF_CTES and not self._names_cte(before):
            self._lists_of_ctes.discard(depth)
        if token == "NEXTVAL" or (token == "VALUE" and before == "NEXT"):
            self.writes = True
        elif before == ".":
            return
        elif token == "INTO":
            self.writes = True
            self._target = before in _BEFORE_TARGET
            self.changes = self.changes or not self._target  # a variable, or a table that may be a temporary one
        elif token == "UPDATE" and before in ("FOR", "KEY"):
            self.holds = True
        elif token in ("INSERT", "UPDATE", "DELETE", "MERGE"):
            self.writes = self._changes_rows = True
        elif token == "SQL_CALC_FOUND_ROWS" or token in _LOCK_HINTS:
            self.holds = True
        elif token == "SHARE":
            self.holds = self.holds or before in ("FOR", "KEY", "IN")
        elif token in _BEFORE_PARENTHESIS:
            self._target = False

    def _names_cte(self, before: str) -> bool:
        return before in ("WITH", "RECURSIVE", ",")

    def _open(self) -> None:
        function = self._before
        special = ""
        if (function == NAME or _is_word(function)) and not self._is_no_call(function):
            qualified = self._before_that == "." and self._still_earlier != "PG_CATALOG"
            if function == "SET_CONFIG" and not qualified:
                special = function
            elif qualified or function not in self._syntax.harmless:
                self.calls = self.changes = True
        self._target = False
        self._parentheses.append(special)

    def _is_no_call(self, name: str) -> bool:
        """Return True if ``name``, before a parenthesis, is a keyword, an alias, a type or a table."""
        before = self._before_that
        if self._target or before in ("AS", "::"):
            return True
        if len(self._parentheses) in self._lists_of_ctes and self._names_cte(before):
            return True
        if before == ".":
            return False
        if name in _BEFORE_PARENTHESIS or name in self._syntax.operators:
            return name not in _ONLY_AFTER or before in _ONLY_AFTER[name]
        if name in ("OVER", "FILTER"):
            return before in (")", "NULLS")
        return self._changes_rows and name in _BEFORE_COLUMNS

    def _close(self) -> None:
        if not self._parentheses:
            raise _UnclearError
        self._lists_of_ctes.discard(len(self._parentheses))
        if self._parentheses.pop():  # it is set for the session unless the last argument says otherwise
            self.holds = True
            self.changes = self.changes or (self._before, self._before_that) != ("TRUE", ",")
        self._target = False


def _is_word(token: str) -> bool:
    """Return True for a word that is not quoted."""
    return token[:1].isalpha() or token[:1] in ("_", "$") or token[:1] >= "\x80"
