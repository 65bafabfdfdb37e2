"""Sync sessions under an event loop: one hop to end a scope, and one permit per connection."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

WORKERS = 32
_executors: dict[bool, ThreadPoolExecutor] = {}


def after_fork_in_child(call: Callable[[], None]) -> None:
    """Have ``call`` made in every forked child; where there is no fork, as on Windows, never."""
    register = getattr(os, "register_at_fork", None)
    if register is not None:
        register(after_in_child=call)


after_fork_in_child(_executors.clear)


def in_thread(call: Callable[[], T], *, holds_connection: bool) -> asyncio.Future[T]:
    """Make ``call`` in a worker thread, in a copy of the caller's context.

    Those that hold a connection have workers of their own: they must never queue behind those
    that wait for one.  Neither queues behind the endpoints, whose threads are anyio's.
    """
    executor = _executors.get(holds_connection)
    if executor is None:
        executor = _executors[holds_connection] = ThreadPoolExecutor(WORKERS, "session_plugin")
    context = contextvars.copy_context()
    return asyncio.get_running_loop().run_in_executor(executor, context.run, call)


class Permits:
    """As many permits as the pool has connections, handed out in turn on each event loop."""

    def __init__(self, capacity: int | None) -> None:
        """``capacity`` is the pool's size with its overflow, or None where nothing limits it."""
        self._capacity = capacity
        self._semaphores: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def acquire(self) -> Callable[[], None] | None:
        """Wait for a permit; the answer gives it back, and is None where none is needed."""
        if self._capacity is None:
            return None
        loop = asyncio.get_running_loop()
        semaphore = self._semaphores.get(loop)
        if semaphore is None:
            semaphore = self._semaphores[loop] = asyncio.Semaphore(self._capacity)
        await semaphore.acquire()
        return semaphore.release
