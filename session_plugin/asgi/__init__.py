"""The adapter for any ASGI app: `SessionScopeMiddleware`."""

from .middleware import SessionScopeMiddleware

__all__ = ["SessionScopeMiddleware"]
