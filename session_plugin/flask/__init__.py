"""The adapter for Flask: an extension with ``init_app``."""

from .plugin import SessionPlugin

__all__ = ["SessionPlugin"]
