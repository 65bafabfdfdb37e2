"""`JoinedBlock`: a ``session_scope()`` inside a unit of work, and what that one does while the block is open.

Such a block may be in a task or a thread that runs beside the code which settles.  If its unit of work rolls
back meanwhile, leaving the block raises.  A block that is around the settling code, as that of a middleware
or a dependency, is left as if nothing had happened: there the response tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_innermost: ContextVar[JoinedBlock | None] = ContextVar("session_plugin_joined", default=None)


class JoinedBlock:
    """One block.

    Attributes:
        task: the task that is inside, or None.
        in_doubt: True if it is not known whether that unit of work had been committed.
        lost: why its unit of work was rolled back from outside the block, or None.
        outlived: True if its unit of work was settled from outside the block.
    """

    __slots__ = ("_outer", "in_doubt", "lost", "outlived", "task")

    def __init__(self, task: asyncio.Task[object] | None) -> None:
        self.task: asyncio.Task[Any] | None = task
        self.in_doubt: bool = False
        self.lost: str | None = None
        self.outlived: bool = False

    def enter(self) -> None:
        """Mark the context as inside this block."""
        self._outer: JoinedBlock | None = _innermost.get()
        _innermost.set(self)

    def leave(self) -> bool:
        """Return False if the block is left in another context than it was entered in, as some dependencies are."""
        is_inside = self in _around()
        if _innermost.get() is self:
            _innermost.set(self._outer)
        return is_inside


def note_settled(blocks: list[JoinedBlock], lost: str | None = None, *, in_doubt: bool = False) -> None:
    """Note for those of ``blocks`` that are not around the running code that their unit of work was settled.

    Args:
        blocks: those that are open.
        lost: why work was rolled back, or None.
        in_doubt: COMMIT was sent before, and it is not known whether the server has committed.
    """
    around = list(_around())
    for block in blocks:
        if block not in around:
            block.outlived = True
            block.lost = block.lost or lost
            block.in_doubt = block.in_doubt or in_doubt


def _around() -> Iterator[JoinedBlock]:
    block = _innermost.get()
    while block is not None:
        yield block
        block = block._outer
