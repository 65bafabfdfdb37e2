"""SQLAlchemy's pools, but waiting requests are served in order.

SQLAlchemy's pools wake the first in the queue when a connection comes back, and give it to a newcomer
who asks before that one runs; the first then queues anew, behind all others.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from sqlalchemy import URL
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, Pool, QueuePool
from sqlalchemy.util import await_only

from .semaphore import FairSemaphore

_replacing = threading.Lock()


class FairQueuePool(QueuePool):
    """A `QueuePool` with a permit for each of its connections: whoever has one never waits inside."""

    _sqla_logger_namespace = "sqlalchemy.pool.impl.QueuePool"

    def __init__(
        self, creator: Any, pool_size: int = 5, max_overflow: int = 10, timeout: float = 30.0, **options: Any
    ) -> None:
        super().__init__(creator, pool_size, max_overflow, timeout, **options)
        is_limited = pool_size > 0 and max_overflow >= 0
        self._semaphore = FairSemaphore(pool_size + max_overflow if is_limited else None, timeout)
        self._pid = os.getpid()
        self._in_child: FairQueuePool | None = None

    def _do_get(self) -> ConnectionPoolEntry:
        if self._pid != os.getpid():
            return self._pool_of_this_process()._do_get()
        self._acquire()
        try:
            return super()._do_get()
        except BaseException:
            self._semaphore.release()
            raise

    def _pool_of_this_process(self) -> FairQueuePool:
        """Return the pool that stands for this one, which is the parent's, in a child that C code has forked."""
        with _replacing:
            if self._in_child is None or self._in_child._pid != os.getpid():
                self._in_child = self.recreate()
            return self._in_child

    def recreate(self) -> FairQueuePool:
        """Return a new pool of the same kind, with no connection."""
        pool: Any = super().recreate()
        return pool  # type: ignore[no-any-return]

    def _acquire(self) -> None:
        self._semaphore.wait()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            super()._do_return_conn(record)
        finally:
            self._semaphore.release()


class FairAsyncQueuePool(FairQueuePool, AsyncAdaptedQueuePool):
    """An `AsyncAdaptedQueuePool` of that kind."""

    _sqla_logger_namespace = "sqlalchemy.pool.impl.AsyncAdaptedQueuePool"

    def _acquire(self) -> None:
        if not self._semaphore.take():
            await_only(self._semaphore.await_one())


def fair_pool_class(url: URL, *, is_async: bool) -> type[Pool] | None:
    """Return the pool class for an engine of ``url``; None where SQLAlchemy chooses one in which nobody queues."""
    dialect: Any = url.get_dialect(is_async)
    fair: dict[type[Pool], type[Pool]] = {QueuePool: FairQueuePool, AsyncAdaptedQueuePool: FairAsyncQueuePool}
    return fair.get(dialect.get_pool_class(url))
