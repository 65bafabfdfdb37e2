"""The test kit: `Database.isolated` undoes what an app commits, and the functions here inspect it and make it fail."""

from .clients import Left, aleave_midstream, leave_midstream
from .databases import worker_database
from .failures import exhausted_pool, fail_next_commit, kill_connection
from .hooks import CapturedHooks, captured_hooks
from .isolation.isolation import Isolation as Isolation  # for `session_plugin.database.isolation`
from .isolation.isolation import IsolationWarning
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
