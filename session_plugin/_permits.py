"""One permit per connection, for sync sessions under an event loop.

A scope has its permit before it takes a connection, and until the connection is back.  So threads
never wait for a connection while those that hold one wait for a thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from .exceptions import ScopeClosedError

if TYPE_CHECKING:
    from .scope import SessionScope


class Permits:
    """As many permits as the pool has connections, handed out in the order in which they are asked for."""

    def __init__(self, capacity: int | None, timeout: float | None) -> None:
        """``capacity`` is the pool's size with its overflow, or None where nothing limits it.

        ``timeout`` is the pool's own, in seconds.
        """
        self._capacity = capacity
        self._timeout = timeout
        self._free = capacity or 0
        self._lock = threading.Lock()
        self._waiting: deque[Future[None]] = deque()

    async def acquire(self) -> Callable[[], None] | None:
        """Wait for a permit without a thread; the answer gives it back, and is None where none is needed.

        Raises:
            sqlalchemy.exc.TimeoutError: none came within the pool's time-out.
        """
        if self._capacity is None:
            return None
        waiter = self._ask()
        if waiter is not None:
            try:
                async with asyncio.timeout(self._timeout):
                    await asyncio.wrap_future(waiter)
            except TimeoutError:
                self._leave(waiter)
                self._raise_timeout()
            except BaseException:
                self._leave(waiter)
                raise
        return self._release

    def acquire_in_thread(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None] | None:
        """As `acquire`, in a worker thread of ``loop``, which does not count as one while it waits.

        Else those that wait would take all the threads that anyio allows, and those that hold a
        connection could not go on.  The thread of ``loop`` itself may not wait, and needs none.

        Raises:
            sqlalchemy.exc.TimeoutError: none came within the pool's time-out.
        """
        if self._capacity is None or _is_running_here(loop):
            return None
        waiter = self._ask()
        if waiter is not None:
            _allow_threads(loop, 1)
            try:
                waiter.result(self._timeout)
            except TimeoutError:
                self._leave(waiter)
                self._raise_timeout()
            finally:
                _allow_threads(loop, -1)
        return self._release

    def _ask(self) -> Future[None] | None:
        """Take a free permit, or else a place in the queue."""
        with self._lock:
            if self._free:
                self._free -= 1
                return None
            waiter: Future[None] = Future()
            self._waiting.append(waiter)
            return waiter

    def _leave(self, waiter: Future[None]) -> None:
        """Leave the queue; a permit that has come all the same goes to the next."""
        with self._lock:
            has_come = not waiter.cancel()
            with suppress(ValueError):
                self._waiting.remove(waiter)
        if has_come:
            self._release()

    def _release(self) -> None:
        """Hand a permit to the first in the queue."""
        with self._lock:
            while self._waiting:
                waiter = self._waiting.popleft()
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(None)
                    return
            self._free += 1

    def _raise_timeout(self) -> NoReturn:
        raise PoolTimeoutError(
            f"No connection became free within the pool_timeout of {self._timeout:g} seconds: as many requests as "
            f"the pool has connections, {self._capacity}, are at work, and {len(self._waiting)} more wait. Make "
            "transactions shorter or the pool larger, and answer this exception with a status of 503.",
            code="3o7r",
        ) from None


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
