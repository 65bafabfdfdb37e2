"""The adapter for Starlette, and for frameworks that are built on it."""

from .plugin import AsyncSessionPlugin, SessionPlugin

__all__ = ["AsyncSessionPlugin", "SessionPlugin"]
