"""Where the caller stands: the scopes that are open around it, the innermost first."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

from .typevars import S

if TYPE_CHECKING:
    from .database import BaseDatabase
    from .scope import SessionScope

depth: ContextVar[int] = ContextVar("session_plugin_depth", default=0)
"""How many middlewares the caller stands inside; an adapter whose middlewares run side by side counts them.

Only the context tells a child of a middleware that passes a message on from a task of the app beside it.
"""

innermost: ContextVar[SessionScope[Any] | None] = ContextVar("session_plugin_scope", default=None)
"""The scope that a block has entered last, closed or not."""


def open_scope() -> SessionScope[Any] | None:
    """The innermost scope that is not closed: a closed one is kept by nobody who opens the next."""
    scope = innermost.get()
    while scope is not None and scope.closed:
        scope = scope.outer
    return scope


def find_scope(database: BaseDatabase[S]) -> SessionScope[S] | None:
    """The scope of ``database`` in which the caller stands, or None.

    A closed one, which a generator or a task has inherited, is found only if none further out is open.
    """
    found: SessionScope[S] | None = None
    scope = innermost.get()
    while scope is not None:
        if scope.database is database:
            found = found or scope
            if not scope.closed:
                return scope
        scope = scope.outer
    return found


def is_session_open() -> bool:
    """True if a scope in which the caller stands has a session."""
    scope = innermost.get()
    while scope is not None:
        if scope.has_session:
            return True
        scope = scope.outer
    return False


def entered_databases() -> Iterator[BaseDatabase[Any]]:
    """The databases in whose scopes the caller stands, the innermost first."""
    scope = innermost.get()
    while scope is not None:
        yield scope.database
        scope = scope.outer


class Entered:
    """Makes ``scope`` the innermost one of a block."""

    __slots__ = ("_scope", "_token")

    def __init__(self, scope: SessionScope[Any]) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        self._token = innermost.set(self._scope)

    def __exit__(self, *exc_info: object) -> None:
        leave(self._token)


def leave(token: Token[SessionScope[Any] | None]) -> None:
    """Make the scope before ``token`` the innermost one again."""
    try:
        innermost.reset(token)
    except ValueError:
        pass  # left in another context, whose copy of the variable ends with it
