"""`Syntax`: how a database reads the text of a statement, as far as it decides what the statement may do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def words(text: str) -> frozenset[str]:
    """Return the words of ``text`` in upper case."""
    return frozenset(text.upper().split())


HARMLESS = words("""
    abs avg cast ceil ceiling char_length character_length coalesce concat concat_ws count cume_dist current_date
    current_time current_timestamp date dense_rank every exp extract first_value floor greatest grouping lag last_value
    lead least length ln localtime localtimestamp log lower ltrim max min mod now nth_value ntile nullif octet_length
    overlay percent_rank position power rank replace round row_number rtrim sign sqrt substr substring sum time
    timestamp trim upper version
""")
"""Functions that write nothing, lock nothing and leave the session as it is, on every database that has them."""


@dataclass(frozen=True, eq=False)  # compared by identity, which is what a cache needs
class Syntax:
    """The defaults suit a database of which nothing special is known.

    Attributes:
        backslash_escapes: True if a backslash in a string escapes what follows.
        hash_comments: True if ``#`` begins a comment.
        nested_comments: True if ``/* */`` comments nest.
        dollar_quotes: True if ``$tag$`` begins a string.
        backticks: True if backticks quote an identifier.
        brackets: True if ``[ ]`` quotes an identifier; False if it is a subscript.
        dashes_need_space: True if ``--`` begins a comment only before white space.
        line_ends: the characters that end a ``--`` comment.
        escape_strings: True if ``E'...'`` is a string with backslash escapes.
        local_ends_with_transaction: True if SET LOCAL and SET TRANSACTION are undone at the end of the transaction.
        harmless: the functions that are known to do nothing but compute, in upper case.
        operators: further words before which a parenthesis may stand without a function being called.

    None means that it is not known, or that a setting of the server decides.
    """

    backslash_escapes: bool | None = None
    hash_comments: bool | None = None
    nested_comments: bool | None = None
    dollar_quotes: bool | None = None
    backticks: bool | None = None
    brackets: bool | None = None
    dashes_need_space: bool | None = None
    line_ends: Literal["\n", "\r\n"] = "\n"
    escape_strings: bool = False
    local_ends_with_transaction: bool = False
    harmless: frozenset[str] = HARMLESS
    operators: frozenset[str] = frozenset()
