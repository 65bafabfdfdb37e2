"""One unit of work: its session, what it has done, its hooks, how it ends, and which one is current."""

from .session_scope import SessionScope

__all__ = ["SessionScope"]
