"""To test an app: `Database.isolated` undoes what it commits, and what is here looks at it and makes it fail."""

from ._isolation import IsolationWarning
from .clients import Left, aleave_midstream, leave_midstream
from .databases import worker_database
from .failures import exhausted_pool, fail_next_commit, kill_connection
from .hooks import CapturedHooks, captured_hooks
from .queries import Query, assert_queries

__all__ = [
    "CapturedHooks",
    "IsolationWarning",
    "Left",
    "Query",
    "aleave_midstream",
    "assert_queries",
    "captured_hooks",
    "exhausted_pool",
    "fail_next_commit",
    "kill_connection",
    "leave_midstream",
    "worker_database",
]
