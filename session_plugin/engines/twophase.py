"""The ids of two-phase transactions: those of one unit of work share a stem, by which an operator can pair them.

``session_plugin-20261201T020304Z-1f2e3d4c5b6a-2-1`` is the first engine of the second transaction of a unit of work
that began its first one at 02:03:04 UTC.  MySQL allows 64 bytes, and PostgreSQL 200.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from secrets import token_hex

_next_id: ContextVar[str | None] = ContextVar("session_plugin_next_xid", default=None)


class TransactionIds:
    """The ids of one unit of work."""

    def __init__(self) -> None:
        self._stem = f"session_plugin-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{token_hex(6)}"
        self._transactions = 0
        self._engines = 0

    def announce(self, *, first: bool) -> None:
        """Let the next transaction that is begun in this context have the next id.

        Args:
            first: it is on the first engine of a new transaction of the unit of work.
        """
        if first:
            self._transactions += 1
            self._engines = 0
        self._engines += 1
        _next_id.set(f"{self._stem}-{self._transactions}-{self._engines}")


def wrap_create_xid(create: Callable[[], str]) -> Callable[[], str]:
    """Wrap the dialect's method, which is called without arguments: it cannot know the session that asks."""

    def create_xid() -> str:
        announced = _next_id.get()
        if announced is None:
            return create()
        _next_id.set(None)
        return announced

    return create_xid
