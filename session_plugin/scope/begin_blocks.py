"""Blocks of ``session.begin()`` and ``begin_nested()`` that are open while the unit of work ends their transaction.

A ``yield`` dependency or a middleware holds such a block around the endpoint, and leaves it after the response has
been sent, which has ended the transaction.  Until then SQLAlchemy refuses everything on the session: a streamed body
and a background task could not use it.  So whoever ends the transaction leaves the block too, by SQLAlchemy's own
``__exit__()``; late work has a transaction of its own, and to leave the block once more does nothing.

A task or a thread beside the request may be in the middle of such a block.  If its first half was rolled back, its
second half must not be saved: unless the block is known to be around the code that settles, late work is doomed.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any
from weakref import ref

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import SessionTransaction

from .unit_of_work import UnitOfWork

LEFT_TOO_LATE = (
    "a session.begin() block was still open when its transaction was rolled back; remove session.begin(), since the "
    "session of a unit of work begins and commits by itself"
)
_begun_here: ContextVar[ref[SessionTransaction] | None] = ContextVar("session_plugin_begun", default=None)


def note_begun(unit: UnitOfWork[Any], transaction: SessionTransaction) -> None:
    """Note that the user's code has begun ``transaction``, which a ``with`` block may hold from now on."""
    unit.last_begun = transaction
    _begun_here.set(ref(transaction))


def leave_blocks(unit: UnitOfWork[Any], *, lost: bool) -> None:
    """Leave the blocks whose transaction has ended; to leave one that is not open does nothing.

    Args:
        unit: one that has noted a transaction.
        lost: True if work may have been discarded, unless that transaction was committed.
    """
    innermost = transaction = unit.last_begun
    if transaction is None or unit.sync_session.in_transaction():
        return
    blocks = [transaction]
    while (transaction := transaction.parent) is not None:
        blocks.append(transaction)
    here = _begun_here.get()
    is_around = here is not None and here() is innermost
    if lost and not is_around and unit.transaction.committed is not blocks[-1] and _is_inside_a_block(unit):
        unit.doom(LEFT_TOO_LATE)
    for block in blocks:
        block.__exit__(None, None, None)
    unit.last_begun = None


def _is_inside_a_block(unit: UnitOfWork[Any]) -> bool:
    """Return True if SQLAlchemy refuses to begin, since a block whose transaction has ended is open."""
    waiting, unit.hooks.waiting = unit.hooks.waiting, []  # not for the transaction that ends here
    try:
        unit.sync_session.begin().close()
    except InvalidRequestError:
        return True
    finally:
        unit.hooks.waiting = waiting
    return False
