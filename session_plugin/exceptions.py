"""What can go wrong, in one tree; each message says what happened and then what to do.

::

    SessionPluginError
    ├── ConfigurationError          wrong before the first request
    ├── NoScopeError                asked for a session where no unit of work is open
    ├── ScopeClosedError            used a session after its unit of work ended
    ├── ConcurrentUseError          two threads or tasks used one session at once
    ├── TransactionAbortedError     the server had given the transaction up, or it was doomed
    ├── ReadOnlyError               wrote under a read-only policy
    ├── PolicyError                 a policy was chosen too late, raised, or answered nonsense
    └── IsolationError              a test did what ``db.isolated()`` cannot undo or cannot show

SQLAlchemy's own exceptions always pass through unwrapped.
"""

from sqlalchemy import URL
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError

__all__ = [
    "ConcurrentUseError",
    "ConfigurationError",
    "IsolationError",
    "NoScopeError",
    "PolicyError",
    "ReadOnlyError",
    "ScopeClosedError",
    "SessionPluginError",
    "TransactionAbortedError",
]


class SessionPluginError(Exception):
    """The base of every exception that session_plugin raises itself."""


class ConfigurationError(SessionPluginError):
    """The database, its options or an adapter is set up in a way that cannot work."""


class NoScopeError(SessionPluginError, AttributeError):
    """A session was asked for outside any request, ``session_scope()`` or app context.

    It is an `AttributeError` so that ``hasattr(db, "session")`` answers False at import
    time, which libraries such as Flask-Admin rely on.
    """


class ScopeClosedError(SessionPluginError, InvalidRequestError):
    """A session or scope was used after its unit of work had ended."""


class ConcurrentUseError(SessionPluginError, InvalidRequestError):
    """Two threads or tasks used one session at the same time."""


class TransactionAbortedError(SessionPluginError, PendingRollbackError):
    """COMMIT was refused: the server had already aborted the transaction, or its unit of work is doomed.

    PostgreSQL answers COMMIT of an aborted transaction with a ROLLBACK and no error; MySQL and
    MariaDB roll back after a deadlock and go on in a new transaction, and SQLite after some
    errors.  The swallowed error is ``__cause__``.
    """


class ReadOnlyError(SessionPluginError, InvalidRequestError):
    """The session was about to write although its policy is read-only."""


class PolicyError(SessionPluginError):
    """A policy was chosen after it could take effect, raised, or returned no `Decision`."""


class IsolationError(SessionPluginError):
    """Inside ``db.isolated()``, or with the test kit, something was done that it cannot undo or cannot show."""


def shown(url: URL) -> str:
    """What a message says of ``url``: not its password, nor its query, in which drivers take passwords too."""
    return url.set(query={}).render_as_string(hide_password=True)
