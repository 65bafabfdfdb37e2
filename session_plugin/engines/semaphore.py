"""`FairSemaphore`: a permit for each connection, and a queue for those who find none left.

Each pool hands out its connections by permits (`pools`).  A sync unit of work under an event loop also
takes a permit of its database before it takes a connection, and keeps it until the connection is back.
A thread that waits for one is replaced by another one (`ExtraThreads`), up to a limit: so threads never
wait for a connection while those that hold one wait for a thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeAlias
from weakref import ref

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .event_loop import running_loop

MAX_PENDING_SESSIONS = 256
"""How many sync sessions may be pending under an event loop: asked for, and without a connection yet."""
SPARE_THREADS = 20
"""Half of anyio's 40 threads: as many connections may be held before further threads are allowed for the rest."""
DEFAULT_TIMEOUT = 30.0
"""SQLAlchemy's ``pool_timeout``, for a pool that has no limit and so none of its own."""


class WaitingThread:
    """A thread in the queue."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()

    def wake(self) -> bool:
        """Wake the thread, which now has a permit."""
        self._gate.release()
        return True

    def wait(self, seconds: float | None) -> bool:
        """Return False if no permit has come after ``seconds``."""
        return self._gate.acquire(timeout=-1 if seconds is None else max(seconds, 0))


class WaitingTask:
    """A task in the queue."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[bool] = self._loop.create_future()

    def wake(self) -> bool:
        """Wake the task, which now has a permit, from any thread; return False if its event loop is closed."""
        if running_loop() is self._loop:
            self._set_result(True)
            return True
        try:
            self._loop.call_soon_threadsafe(self._set_result, True)
        except RuntimeError:
            return False
        return True

    async def wait(self, seconds: float | None) -> bool:
        """Return False if no permit has come after ``seconds``."""
        timer = None if seconds is None else self._loop.call_later(seconds, self._set_result, False)
        try:
            return await self._result
        finally:
            if timer is not None:
                timer.cancel()

    def _set_result(self, has_permit: bool) -> None:
        if not self._result.done():
            self._result.set_result(has_permit)


Waiting: TypeAlias = WaitingThread | WaitingTask


class FairSemaphore:
    """As many permits as the pool has connections, handed out in the order in which they were asked for.

    A connection that is garbage-collected gives its permit back in whatever thread that happens, in the
    middle of anything.  So a thread may take the lock twice, and waits for no other lock while it has it.
    """

    def __init__(self, capacity: int | None, timeout: float | None) -> None:
        """Create a semaphore.

        Args:
            capacity: the pool's size with its overflow, or None if nothing limits it.
            timeout: the pool's own, in seconds.
        """
        self._capacity = capacity
        self._timeout = timeout
        self._free = capacity or 0
        self._lock = threading.RLock()
        self._queue: deque[Waiting] = deque()

    def take(self) -> bool:
        """Take a permit without waiting; return False if all are taken."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            return self._capacity is None

    def release(self) -> None:
        """Give a permit back; the first in the queue gets it."""
        while (first := self._next()) is not None:
            if first.wake():
                return

    def wait(self) -> None:
        """Take a permit, and wait for it in this thread.

        Raises:
            sqlalchemy.exc.TimeoutError: none came within the pool's time-out.
        """
        if self.take():
            return
        waiting = WaitingThread()
        with self._queued(waiting) as has_permit:
            if not (has_permit or waiting.wait(self._timeout)):
                raise self._timed_out()

    async def await_one(self) -> None:
        """Take a permit, and wait for it in this task.

        Raises:
            sqlalchemy.exc.TimeoutError: none came within the pool's time-out.
        """
        if self.take():
            return
        waiting = WaitingTask()
        with self._queued(waiting) as has_permit:
            if not (has_permit or await waiting.wait(self._timeout)):
                raise self._timed_out()

    async def acquire(self) -> Callable[[], None] | None:
        """As `await_one`; returns the function that gives the permit back, or None where none is needed."""
        await self.await_one()
        return None if self._capacity is None else self.release

    def acquire_in_thread(self, threads: ExtraThreads) -> Callable[[], None] | None:
        """As `acquire`, in a worker thread, which is not counted as one while it waits.

        If it were, those that wait would take all the threads that anyio allows, and those that hold a
        connection could not go on.  The thread of the event loop itself must not wait, and takes no permit.
        """
        if threads.is_loop_thread():
            return None
        if not self.take():
            threads.count(waiting=1)
            try:
                self.wait()
            finally:
                threads.count(waiting=-1)
        threads.count(holding=1)

        def give_back() -> None:
            threads.count(holding=-1)
            if self._capacity is not None:
                self.release()

        return give_back

    @contextmanager
    def _queued(self, waiting: Waiting) -> Generator[bool]:
        """Take a place in the queue for the block, which an error gives up again.

        Yields:
            True if a permit has come back meanwhile: then there is nothing to wait for.
        """
        with self._lock:  # and nothing is called in between, where a connection might be collected
            has_permit = self._free > 0
            if has_permit:
                self._free -= 1
            else:
                self._queue.append(waiting)
        try:
            yield has_permit
        except BaseException:
            self._leave(waiting)
            raise

    def _leave(self, waiting: Waiting) -> None:
        """Leave the queue; a permit that has come all the same goes to the next."""
        with self._lock:
            has_permit = waiting not in self._queue
            if not has_permit:
                self._queue.remove(waiting)
        if has_permit:
            self.release()

    def _next(self) -> Waiting | None:
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._free += 1
            return None

    def _timed_out(self) -> PoolTimeoutError:
        return PoolTimeoutError(
            f"No connection became free within the pool_timeout of {self._timeout:g} seconds: all {self._capacity} "
            f"connections of the pool are in use, and other requests wait for one: {max(len(self._queue) - 1, 0)}. "
            "Make transactions shorter or the pool larger, and respond to this exception with status 503.",
            code="3o7r",
        )


class PendingSessions(FairSemaphore):
    """A place for each sync session that was asked for and has no connection yet, and a queue for the requests beyond.

    A place is taken without a thread, and given back when the session gets its permit or ends.
    """

    def _timed_out(self) -> PoolTimeoutError:
        return PoolTimeoutError(
            f"{self._capacity} requests have asked for a session and have no connection yet, as many as "
            f"max_pending_sessions allows, and none of them went on within the pool_timeout of {self._timeout:g} "
            "seconds. Ask for the session where it is used, make transactions shorter, or raise max_pending_sessions.",
            code="3o7r",
        )


class ExtraThreads:
    """The worker threads that anyio runs beyond its own limit, for those that a database makes wait.

    There is one for each thread that waits for a connection, and one for each that holds a connection beyond
    `SPARE_THREADS`: where a pool has many connections or no limit, slow statements would take all threads.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        """Allow no thread yet.

        Args:
            loop: the event loop whose threads they are.
            limit: how many there may be.
        """
        self._loop = ref(loop)
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting = 0
        self._holding = 0
        self._allowed = 0
        self._changing = False

    def is_loop_thread(self) -> bool:
        """Return True in the thread of the event loop."""
        return running_loop() is self._loop()

    def count(self, *, waiting: int = 0, holding: int = 0) -> None:
        """Count so many more threads that wait for a connection, or hold one; the event loop acts on it soon."""
        loop = self._loop()
        to_thread: Any = sys.modules.get("anyio.to_thread")
        can_change = to_thread is not None and loop is not None and not loop.is_closed()
        with self._lock:
            self._waiting += waiting
            self._holding += holding
            if not can_change or self._changing or self._wanted() == self._allowed:
                return
            self._changing = True
        asyncio.run_coroutine_threadsafe(self._change(to_thread), loop)  # type: ignore[arg-type]

    def _wanted(self) -> int:
        return min(self._waiting + max(self._holding - SPARE_THREADS, 0), self._limit)

    async def _change(self, to_thread: Any) -> None:
        limiter = to_thread.current_default_thread_limiter()
        with self._lock:
            more, self._allowed = self._wanted() - self._allowed, self._wanted()
            self._changing = False
        limiter.total_tokens += more
