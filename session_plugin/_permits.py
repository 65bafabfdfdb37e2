"""One permit per connection, and a queue for those who find none left.

Each pool hands out its connections by permits (`_pools`).  A sync scope under an event loop has one
of its database's before it takes a connection, and until the connection is back: so threads never
wait for a connection while those that hold one wait for a thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .exceptions import ScopeClosedError

if TYPE_CHECKING:
    from .scope import SessionScope


class WaitingThread:
    """A thread in the queue."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()

    def wake(self) -> bool:
        """Tell it that its permit has come."""
        self._gate.release()
        return True

    def wait(self, seconds: float | None) -> bool:
        """False if the permit did not come within so long."""
        return self._gate.acquire(timeout=-1 if seconds is None else max(seconds, 0))


class WaitingTask:
    """A task in the queue."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._come: asyncio.Future[bool] = self._loop.create_future()

    def wake(self) -> bool:
        """Tell it, from any thread, that its permit has come; False if its event loop is closed."""
        if _is_running_here(self._loop):
            self._note(True)
            return True
        try:
            self._loop.call_soon_threadsafe(self._note, True)
        except RuntimeError:
            return False
        return True

    async def wait(self, seconds: float | None) -> bool:
        """False if the permit did not come within so long."""
        timer = None if seconds is None else self._loop.call_later(seconds, self._note, False)
        try:
            return await self._come
        finally:
            if timer is not None:
                timer.cancel()

    def _note(self, has_come: bool) -> None:
        if not self._come.done():
            self._come.set_result(has_come)


Waiting: TypeAlias = WaitingThread | WaitingTask


class Permits:
    """As many permits as the pool has connections, handed out in the order in which they are asked for.

    A connection that is collected gives its permit back in whatever thread that happens, in the midst
    of anything: so the lock can be taken twice by a thread, and under it none other is waited for.
    """

    def __init__(self, capacity: int | None, timeout: float | None) -> None:
        """``capacity`` is the pool's size with its overflow, or None where nothing limits it.

        ``timeout`` is the pool's own, in seconds.
        """
        self._capacity = capacity
        self._timeout = timeout
        self._free = capacity or 0
        self._lock = threading.RLock()
        self._queue: deque[Waiting] = deque()

    def take(self) -> bool:
        """Take a permit, if there is one to be had without waiting."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            return self._capacity is None

    def release(self) -> None:
        """Hand a permit to the first in the queue."""
        while (first := self._next()) is not None:
            if first.wake():
                return

    def wait(self) -> None:
        """Wait in this thread for a permit.

        Raises:
            sqlalchemy.exc.TimeoutError: none came within the pool's time-out.
        """
        if self.take():
            return
        waiting = WaitingThread()
        with self._queued(waiting) as has_come:
            if not (has_come or waiting.wait(self._timeout)):
                raise self._timed_out()

    async def await_one(self) -> None:
        """Wait in this task for a permit.

        Raises:
            sqlalchemy.exc.TimeoutError: none came within the pool's time-out.
        """
        if self.take():
            return
        waiting = WaitingTask()
        with self._queued(waiting) as has_come:
            if not (has_come or await waiting.wait(self._timeout)):
                raise self._timed_out()

    async def acquire(self) -> Callable[[], None] | None:
        """As `await_one`; the answer gives the permit back, and is None where none is needed."""
        await self.await_one()
        return None if self._capacity is None else self.release

    def acquire_in_thread(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None] | None:
        """As `acquire`, in a worker thread of ``loop``, which does not count as one while it waits.

        Else those that wait would take all the threads that anyio allows, and those that hold a
        connection could not go on.  The thread of ``loop`` itself may not wait, and needs none.
        """
        if self._capacity is None or _is_running_here(loop):
            return None
        if not self.take():
            _allow_threads(loop, 1)
            try:
                self.wait()
            finally:
                _allow_threads(loop, -1)
        return self.release

    @contextmanager
    def _queued(self, waiting: Waiting) -> Generator[bool]:
        """Take a place in the queue for the block, unless a permit has come back meanwhile, and none after an error."""
        with self._lock:  # and no call between the look and the place, in which a connection might be collected
            has_come = self._free > 0
            if has_come:
                self._free -= 1
            else:
                self._queue.append(waiting)
        try:
            yield has_come
        except BaseException:
            self._leave(waiting)
            raise

    def _leave(self, waiting: Waiting) -> None:
        """Leave the queue; a permit that has come all the same goes to the next."""
        with self._lock:
            has_come = waiting not in self._queue
            if not has_come:
                self._queue.remove(waiting)
        if has_come:
            self.release()

    def _next(self) -> Waiting | None:
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._free += 1
            return None

    def _timed_out(self) -> PoolTimeoutError:
        return PoolTimeoutError(
            f"No connection became free within the pool_timeout of {self._timeout:g} seconds: as many requests as the "
            f"pool has connections, {self._capacity}, are at work, and {max(len(self._queue) - 1, 0)} more wait. Make "
            "transactions shorter or the pool larger, and answer this exception with a status of 503.",
            code="3o7r",
        )


async def wait_for_permit(scope: SessionScope[Any]) -> None:
    """Before ``scope`` is used in a thread: wait without one."""
    if scope.permit_held is not None or not scope.can_be_joined:
        return
    permit = await scope.database._permits.acquire()
    if permit is not None and (scope.permit_held is not None or not scope.can_be_joined):
        permit()  # it was asked for twice at once, or is over
    else:
        scope.permit_held = permit


def take_permit(scope: SessionScope[Any], loop: asyncio.AbstractEventLoop) -> None:
    """Before ``scope`` takes a connection without having waited for it: wait in this thread.

    A ``session_scope(new=True)`` inside a request waits like the request would, unless that one has a
    permit already: then it takes the connection that it gets from the pool, beside the request's.
    """
    if _has_permit_around(scope):
        return
    scope.permit_held = scope.database._permits.acquire_in_thread(loop)
    if scope.closed:  # in the meantime: this thread outlives its request
        scope.return_permit()
        raise ScopeClosedError(scope.closed_message)


def _has_permit_around(scope: SessionScope[Any]) -> bool:
    """True if a scope around ``scope`` has a permit of the same database."""
    around = scope.outer
    while around is not None:
        if around.database is scope.database and around.permit_held is not None:
            return True
        around = around.outer
    return False


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _allow_threads(loop: asyncio.AbstractEventLoop, more: int) -> None:
    """Let anyio, where it is used, run that many worker threads more on ``loop``."""
    to_thread = sys.modules.get("anyio.to_thread")
    if to_thread is None or loop.is_closed():
        return

    async def allow() -> None:
        to_thread.current_default_thread_limiter().total_tokens += more

    asyncio.run_coroutine_threadsafe(allow(), loop)
