"""What the middlewares for WSGI and ASGI check before their first request."""

from __future__ import annotations

import inspect
from typing import Any

from ..exceptions import ConfigurationError


def check_middleware(app: Any, database: Any, find_policy: Any) -> None:
    """Check the arguments of a middleware.

    Raises:
        ConfigurationError: one of them has a wrong type.
    """
    if inspect.getattr_static(database, "database", None) is None:  # static: a plugin without an app would raise
        raise ConfigurationError(
            f"SessionScopeMiddleware was given an object of type {type(database).__name__} as its database. Write "
            "SessionScopeMiddleware(app, database), with a Database, an AsyncDatabase or a plugin."
        )
    for given in (app, find_policy or app):
        if not callable(given):
            raise ConfigurationError(
                f"SessionScopeMiddleware calls its app and its find_policy, and {type(given).__name__} objects "
                "cannot be called. Give a function or an app."
            )
