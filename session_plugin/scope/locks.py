"""What is added to the error of a statement that has waited in vain for the transaction of its own request."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Engine
from sqlalchemy.engine import ExceptionContext

from ..engines.autocommit import is_autocommit
from ..engines.backends import backend_for
from ..engines.commits import add_note
from .current import units_around


def explain_locks(engines: Iterable[Engine]) -> None:
    """Have errors on databases such as those of ``engines`` name the unit of work that holds the lock."""
    for engine in engines:
        backend_for(engine.dialect.name).listen_for_errors(_explain)


def _explain(context: ExceptionContext) -> None:
    backend = backend_for(context.dialect.name)
    error = context.sqlalchemy_exception
    if error is None or context.engine is None or not backend.is_locked(context.original_exception):
        return
    locked = backend.locked_whole(context.engine)
    if locked is None:
        return
    for unit in units_around():
        for connection in unit.transaction.connections if unit.has_session else ():
            if (
                connection is not context.connection
                and connection.dialect.name == context.dialect.name
                and not is_autocommit(connection.get_execution_options())
                and backend.locked_whole(connection.engine) == locked
            ):
                add_note(
                    error,
                    f"The transaction of {unit!r} is open on the same file, and this code runs inside it: it waits for "
                    "itself. Use the session of that unit of work, do this in db.on_commit(...), or put these tables "
                    "into a file of their own.",
                )
                return
