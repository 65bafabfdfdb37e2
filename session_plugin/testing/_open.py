"""The isolations that are open in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .._threads import after_fork_in_child
from ..exceptions import IsolationError

if TYPE_CHECKING:
    from ..access import HasDatabase
    from ..database import BaseDatabase
    from ._isolation import Isolation

open_isolations: WeakKeyDictionary[BaseDatabase[Any], Isolation] = WeakKeyDictionary()
_inherited: list[Isolation] = []
"""Those of the parent process: if their connections were collected, a ROLLBACK would go out on the parent's sockets."""


def isolation_of(db: HasDatabase) -> Isolation:
    """The isolation of a database, or of the one that a plugin has.

    Raises:
        IsolationError: there is none.
    """
    isolation = open_isolations.get(db.database)
    if isolation is None:
        raise IsolationError("This works on an isolated database only. Open `with db.isolated():` around it.")
    return isolation


def leave_to_parent() -> None:
    """In a forked child: the connections are not its own."""
    for isolation in list(open_isolations.values()):
        isolation.leave_to_parent()
        _inherited.append(isolation)


after_fork_in_child(leave_to_parent)
