"""What a process owes the connection pools when it begins by a fork, and when it ends."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from ._threads import after_fork_in_child

if TYPE_CHECKING:
    from .database import BaseDatabase
    from .scope import SessionScope

databases: WeakSet[BaseDatabase[Any]] = WeakSet()
"""All that are alive."""
scopes_with_session: WeakSet[SessionScope[Any]] = WeakSet()
_inherited: list[Any] = []
"""The sessions and connections of the parent process: collecting them would send something on the parent's sockets."""


def forget_open_scopes() -> None:
    """In a forked child: end the scopes that were open, without a word to the database."""
    for scope in list(scopes_with_session):
        _inherited.append(scope.abandon())


def forget_inherited_connections() -> None:
    """In a forked child: start with empty pools and no open scope, and leave the parent's sockets alone."""
    forget_open_scopes()
    for database in list(databases):
        for engine in database._known_engines:
            engine.dispose(close=False)
        database._permits = database._make_permits()


def dispose_at_exit() -> None:
    """Close the pooled connections of the engines made here: no server tells a WSGI app that it shuts down.

    Those of an async database end with its event loop, which is gone by now.
    """
    for database in list(databases):
        if not database.is_async:
            database.dispose()


after_fork_in_child(forget_inherited_connections)
atexit.register(dispose_at_exit)
