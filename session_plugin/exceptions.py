"""Every exception of session_plugin; each message says what happened and then what to do.

::

    SessionPluginError
    ├── ConfigurationError          the set-up is wrong; raised before the first request
    ├── NoScopeError                a session was asked for where no unit of work is open
    ├── ScopeClosedError            a session was used after its unit of work had ended
    ├── ConcurrentUseError          two threads or tasks used one session at the same time
    ├── TransactionAbortedError     COMMIT was refused: the server had aborted the transaction, or it was doomed
    ├── ReadOnlyError               a read-only policy was about to write
    ├── ReleaseError                ``db.release()`` would have lost something
    ├── PolicyError                 a policy was chosen too late, raised, or returned no Decision
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
    "ReleaseError",
    "ScopeClosedError",
    "SessionPluginError",
    "TransactionAbortedError",
]


class SessionPluginError(Exception):
    """The base class of every exception that session_plugin itself raises."""


class ConfigurationError(SessionPluginError):
    """The database, its options or an adapter is set up in a way that cannot work."""


class NoScopeError(SessionPluginError, AttributeError):
    """A session was asked for outside any request, ``session_scope()`` or app context.

    It is an `AttributeError` so that ``hasattr(db, "session")`` returns False at import time, which
    libraries such as Flask-Admin rely on.
    """


class ScopeClosedError(SessionPluginError, InvalidRequestError):
    """A session or scope was used after its unit of work had ended."""


class ConcurrentUseError(SessionPluginError, InvalidRequestError):
    """Two threads or tasks used one session at the same time."""


class TransactionAbortedError(SessionPluginError, PendingRollbackError):
    """COMMIT was refused: the server had already aborted the transaction, or its unit of work is doomed.

    PostgreSQL turns COMMIT of an aborted transaction into a ROLLBACK and reports no error.  MySQL and
    MariaDB roll back after a deadlock and go on in a new transaction; SQLite does so after some errors.
    The exception that was caught and ignored is ``__cause__``.  A block that had joined a unit of work raises
    it too, if that one rolled back before the block ended.
    """


class ReadOnlyError(SessionPluginError, InvalidRequestError):
    """The session was about to write although its policy is read-only."""


class ReleaseError(SessionPluginError, InvalidRequestError):
    """``db.release()`` was refused: the transaction has work, a lock or a result that would be lost."""


class PolicyError(SessionPluginError):
    """A policy was chosen after it could take effect, raised, or returned no `Decision`."""


class IsolationError(SessionPluginError):
    """Inside ``db.isolated()``, or with the test kit, something was done that it cannot undo or cannot show."""


def url_for_message(url: URL) -> str:
    """Render ``url`` for a message, without its secrets.

    They are its password, its query, in which drivers accept passwords, and whatever precedes an ``@`` in its
    host: the end of a password that was not quoted.
    """
    host = None if url.host is None else url.host.rpartition("@")[2]
    return url.set(host=host, query={}).render_as_string(hide_password=True)
