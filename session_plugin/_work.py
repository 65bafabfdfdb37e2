"""What a scope's session did on its connections, and what it left open there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import Result
from sqlalchemy.orm import SessionTransaction

from ._watch import TWO_AT_ONCE, Watch
from .exceptions import ConcurrentUseError, shown

MANY_STREAMS = 100


class Work:
    """What a scope's session did since its transaction began.

    Attributes:
        committed: the transaction or savepoint that ended last by a commit.
        saved: True if a transaction has committed what it wrote since a settling last looked.
        flushing: the thread or the task that flushes, or None.
        streams: the results that still read from the connection: those opened with ``yield_per`` or
            ``stream``, also for the whole engine, and on SQLite, whose cursors are lazy, those of Core.
        begin_engines: by engine, the twin by which this transaction has begun on it; see `_begin`.
    """

    __slots__ = (
        "_current_owner", "_doomed", "_first", "_watches", "begin_engines", "committed", "flushing", "saved", "streams",
    )  # fmt: skip

    def __init__(self, doomed: str | None = None, *, is_async: bool = False) -> None:
        self._current_owner: Callable[[], object] = _current_task if is_async else threading.get_ident
        self._watches: dict[Connection, Watch] = {}
        self._doomed = doomed
        self._first: asyncio.Task[Any] | None = None
        self.committed: SessionTransaction | None = None
        self.saved: bool = False
        self.flushing: object = None
        self.streams: list[Result[Any]] = []
        self.begin_engines: dict[Engine, Engine] = {}

    @property
    def wrote(self) -> bool:
        """True if a statement of this transaction was an INSERT, UPDATE, DELETE or the like."""
        for watch in self._watches.values():  # noqa: SIM110  a generator costs as much as all else here
            if watch.wrote:
                return True
        return False

    @property
    def connected(self) -> bool:
        """True while the session holds a connection."""
        return bool(self._watches)

    def connection_taken(self, connection: Connection) -> None:
        """The session took ``connection``; a savepoint on one it already has says so again."""
        if connection not in self._watches:
            self._watches[connection] = watch = Watch(connection)
            watch.doomed = self._doomed

    def doom(self, reason: str) -> None:
        """Let no connection of this work commit any more, those that it will yet take included."""
        self._doomed = reason
        for watch in self._watches.values():
            watch.doomed = reason

    def check_alone(self) -> None:
        """Raise `ConcurrentUseError` if another thread or task waits for a statement."""
        for watch in self._watches.values():
            watch.check_alone()

    @property
    def busy(self) -> bool:
        """True while another thread or task waits for a statement of this session."""
        return any(watch.busy for watch in self._watches.values())

    def wait_alone(self) -> None:
        """Wait, within bounds, for the statements of siblings."""
        for watch in self._watches.values():
            watch.wait_alone()

    def check_first(self) -> None:
        """Raise `ConcurrentUseError` if another task is just taking the connection.

        Called where an engine has been chosen: a listener that answers a statement from a cache takes none.
        Only tasks are told apart: a thread may well go on where another one failed to connect.
        """
        if not self._watches:
            first, self._first = self._first, _current_task()
            if first is not None and first is not self._first and not first.done():
                raise ConcurrentUseError(TWO_AT_ONCE)

    def begin_flush(self) -> object:
        """Note who flushes, and answer who did: nobody, or the same, from within.

        Raises:
            ConcurrentUseError: another thread or task does.
        """
        outer, self.flushing = self.flushing, self._current_owner()
        if outer not in (None, self.flushing):
            self.flushing = outer
            raise ConcurrentUseError(TWO_AT_ONCE)
        return outer

    def keep_stream(self, result: Result[Any]) -> None:
        """Close ``result`` with the transaction, unless it is read to its end before."""
        if len(self.streams) >= MANY_STREAMS:
            self.streams = [stream for stream in self.streams if _is_open(stream)]
        if _is_open(result):
            self.streams.append(result)

    def close_streams(self) -> None:
        """Close the results that would otherwise go on reading from a lent connection."""
        for stream in self.streams:
            stream.close()

    def note_partial_commit(self, error: Exception) -> None:
        """Say on the error of a COMMIT which of several engines had committed before it."""
        committed = [
            shown(connection.engine.url)
            for connection, watch in self._watches.items()
            if watch.commit_sent and watch.error is None
        ]
        if committed:
            error.add_note(
                f"This unit of work had already committed on {', '.join(committed)}. Engines that must commit "
                "together need twophase=True."
            )

    def abandon(self) -> list[Any]:
        """Send nothing more on the connections, which another process goes on with; answer the driver's own."""
        for watch in self._watches.values():
            watch.inherited = True
        return [
            connection.connection.dbapi_connection
            for connection in self._watches
            if not (connection.closed or connection.invalidated)
        ]

    def ended(self, *, committed: bool) -> None:
        """The transaction is over and its connections are back in their pools."""
        self.saved = self.saved or (committed and self.wrote)
        watches, self._watches = self._watches, {}
        self._first = None
        self.streams.clear()
        for watch in watches.values():
            watch.release()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None  # no event loop runs here


def _is_open(result: Any) -> bool:
    """False once a result was read to its end, as that of Core tells by its cursor; one of the ORM has that inside."""
    core_result = getattr(result, "raw", result)
    return not result.closed and getattr(core_result, "cursor", core_result) is not None
