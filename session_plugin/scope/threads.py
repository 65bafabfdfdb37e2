"""Worker threads in which sync sessions end under an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from ..engines.forks import after_fork_in_child
from .log import logger

T = TypeVar("T")

WORKERS = 32
_executors: dict[bool, concurrent.futures.ThreadPoolExecutor] = {}

after_fork_in_child(_executors.clear)


def in_thread(call: Callable[[], T], *, can_wait: bool) -> asyncio.Future[T]:
    """Make ``call`` in a worker thread, in a copy of the caller's context.

    Calls that hold a connection or a permit never wait for one, and have workers of their own: they must
    not queue behind those that can wait.  Neither queue behind the endpoints, whose threads are anyio's.

    If no thread can be started, since the process has reached its limit or is ending, the call is made here: the
    event loop stands still meanwhile, but no connection is left in its transaction.
    """
    executor = _executors.get(can_wait)
    if executor is None:
        executor = concurrent.futures.ThreadPoolExecutor(WORKERS, "session_plugin")  # imported when it is named
        _executors[can_wait] = executor
    work = _Work(call)
    try:
        executor.submit(work)
    except RuntimeError:
        logger.warning("No thread could be started, so a unit of work ends in the thread of the event loop.")
        work()
    return work.future


class _Work(Generic[T]):
    """A call that is made once, although an executor that fails to start a thread keeps it in its queue.

    Attributes:
        future: what it returns or raises.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._context = contextvars.copy_context()
        self._loop = asyncio.get_running_loop()
        self._unmade = threading.Lock()
        self.future: asyncio.Future[T] = self._loop.create_future()

    def __call__(self) -> None:
        """Make the call, unless another thread has begun to, and report to the event loop."""
        if not self._unmade.acquire(blocking=False):
            return
        report: Callable[[], None]
        try:
            report = partial(self.future.set_result, self._context.run(self._call))
        except BaseException as error:
            report = partial(self.future.set_exception, error)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(report)
