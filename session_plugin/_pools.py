"""SQLAlchemy's pools, but whoever asks first is served first.

Theirs wake the first in the queue when a connection comes back, and give it to a newcomer who asks
before that one has run; it then queues anew, behind all others.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, Pool, QueuePool
from sqlalchemy.util import await_only

from ._permits import Permits


class FairQueuePool(QueuePool):
    """A `QueuePool` with a permit for each of its connections: who has one never waits inside."""

    _sqla_logger_namespace = "sqlalchemy.pool.impl.QueuePool"

    def __init__(
        self, creator: Any, pool_size: int = 5, max_overflow: int = 10, timeout: float = 30.0, **options: Any
    ) -> None:
        super().__init__(creator, pool_size, max_overflow, timeout, **options)
        is_limited = pool_size > 0 and max_overflow >= 0
        self._permits = Permits(pool_size + max_overflow if is_limited else None, timeout)

    def _do_get(self) -> ConnectionPoolEntry:
        self._acquire()
        try:
            return super()._do_get()
        except BaseException:
            self._permits.release()
            raise

    def _acquire(self) -> None:
        self._permits.wait()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            super()._do_return_conn(record)
        finally:
            self._permits.release()


class FairAsyncQueuePool(FairQueuePool, AsyncAdaptedQueuePool):
    """An `AsyncAdaptedQueuePool` of that kind."""

    _sqla_logger_namespace = "sqlalchemy.pool.impl.AsyncAdaptedQueuePool"

    def _acquire(self) -> None:
        if not self._permits.take():
            await_only(self._permits.await_one())


def fair_pool_class(url: URL, *, is_async: bool) -> type[Pool] | None:
    """The pool for an engine of ``url``; None if SQLAlchemy chooses one there in which nobody queues."""
    dialect: Any = url.get_dialect(is_async)
    fair: dict[type[Pool], type[Pool]] = {QueuePool: FairQueuePool, AsyncAdaptedQueuePool: FairAsyncQueuePool}
    return fair.get(dialect.get_pool_class(url))
