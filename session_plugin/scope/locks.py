"""What is added to the error of a statement that has waited in vain for the transaction of its own request."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import Connection, Engine

from ..engines.backends import backend_for
from ..engines.commits import add_note
from .current import units_around


def explain_locks(engines: Iterable[Engine]) -> None:
    """Have errors on databases such as those of ``engines`` name the unit of work that holds the lock."""
    for engine in engines:
        backend_for(engine.dialect.name).listen_for_locks(_explain)


def _explain(error: BaseException, is_locking: Callable[[Connection], bool]) -> None:
    for unit in units_around():
        if unit.has_session and any(map(is_locking, unit.transaction.connections)):
            add_note(
                error,
                f"The transaction of {unit!r} is open on the same file, and this code runs inside it: it waits for "
                "itself. Use the session of that unit of work, do this in db.on_commit(...), or put these tables "
                "into a file of their own.",
            )
            break
