"""How a unit of work is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..policy import Policy
from .current import find_open, innermost
from .unit_of_work import ScopeDatabase, UnitOfWork


def open_unit_of_work(
    database: ScopeDatabase,
    *,
    origin: str,
    method: str | None = None,
    find_policy: Callable[[], Policy | None] | None = None,
) -> UnitOfWork[Any]:
    """Open a unit of work inside the innermost one that is open; it has no session yet.

    Args:
        database: the database.
        origin: where it is opened, for logs and warnings: ``"POST /orders"``.
        method: the HTTP method, or None outside HTTP.
        find_policy: called once, at the first statement, for the policy of the endpoint.
    """
    outer = innermost.get() and find_open()
    return UnitOfWork(database, outer=outer, origin=origin, method=method, find_policy=find_policy)
