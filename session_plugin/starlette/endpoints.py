"""Who takes a sync session: coroutine functions run on the event loop, where nothing must wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..policy import is_coroutine_function


def is_taken_by_coroutine(dependant: Any, get_session: Callable[..., Any]) -> bool:
    """Return True if a coroutine function has the session as a parameter.

    FastAPI documents no way to learn this: ``dependant`` is the ``dependant`` of its `APIRoute`, a tree of calls
    with the names of their parameters.  A dependency without a name is one that a router adds to all of its
    endpoints, which may or may not use the session.

    Args:
        dependant: the endpoint or a dependency, with what it depends on.
        get_session: the dependency to look for.
    """
    takes_it = any(each.call == get_session and each.name is not None for each in dependant.dependencies)
    if takes_it and is_coroutine_function(dependant.call):
        return True
    return any(is_taken_by_coroutine(each, get_session) for each in dependant.dependencies)
