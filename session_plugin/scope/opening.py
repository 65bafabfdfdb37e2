"""How a unit of work is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..policy import Policy
from .current import find_open, held, innermost
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
    inherited = innermost.get()
    outer = None if inherited is None and not held else find_open()
    unit: UnitOfWork[Any] = UnitOfWork(database, outer=outer, origin=origin, method=method, find_policy=find_policy)
    while inherited is not None and inherited.closed:
        inherited = inherited.inherited
    if inherited is not None:
        unit.inherited = inherited
    return unit
