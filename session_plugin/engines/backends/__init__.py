"""What differs from database to database: one module for each, behind one interface, `Backend`.

A further database is a module here and an entry in `BACKENDS`.
"""

from .interface import Backend
from .mysql import MySQL
from .postgresql import PostgreSQL
from .sqlite import SQLite

__all__ = ["BACKENDS", "Backend", "backend_for"]

BACKENDS: dict[str, Backend] = {
    name: backend for backend in (SQLite(), PostgreSQL(), MySQL()) for name in backend.names
}
"""The backends by the names of SQLAlchemy's dialects."""

_ANY_OTHER = Backend()


def backend_for(dialect_name: str) -> Backend:
    """Return the backend of the dialect with this name; one with default behaviour if the dialect is not known here."""
    return BACKENDS.get(dialect_name, _ANY_OTHER)
