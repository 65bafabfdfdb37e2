"""The adapter for any WSGI app: `SessionScopeMiddleware`."""

from .middleware import SessionScopeMiddleware

__all__ = ["SessionScopeMiddleware"]
