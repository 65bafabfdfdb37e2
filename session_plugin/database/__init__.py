"""A database: its configuration, the interface that an app calls, and what happens to it at a fork and at exit."""

from . import forks as forks  # registers what a forked child and the exit of the process do
from .async_database import AsyncDatabase
from .sync_database import Database

__all__ = ["AsyncDatabase", "Database"]
