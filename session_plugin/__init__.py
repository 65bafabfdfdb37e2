"""Request-scoped SQLAlchemy sessions whose response tells the truth.

A success means committed, an error means nothing was written, and no connection is held for
longer than it is used.
"""

from .database import AsyncDatabase, Database
from .exceptions import (
    ConcurrentUseError,
    ConfigurationError,
    IsolationError,
    NoScopeError,
    PolicyError,
    ReadOnlyError,
    ReleaseError,
    ScopeClosedError,
    SessionPluginError,
    TransactionAbortedError,
)
from .policy import Decision, Outcome, Policy, by_method, commit_on_success, manual, read_only, read_only_autocommit
from .scope import SessionScope

__all__ = [
    "AsyncDatabase",
    "ConcurrentUseError",
    "ConfigurationError",
    "Database",
    "Decision",
    "IsolationError",
    "NoScopeError",
    "Outcome",
    "Policy",
    "PolicyError",
    "ReadOnlyError",
    "ReleaseError",
    "ScopeClosedError",
    "SessionPluginError",
    "SessionScope",
    "TransactionAbortedError",
    "by_method",
    "commit_on_success",
    "manual",
    "read_only",
    "read_only_autocommit",
]
