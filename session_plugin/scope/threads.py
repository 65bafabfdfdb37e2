"""Worker threads in which sync sessions end under an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from ..engines.forks import after_fork_in_child
from .log import logger

T = TypeVar("T")

WORKERS = 32
_executors: dict[bool, concurrent.futures.ThreadPoolExecutor] = {}
_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[bool, Any]] = WeakKeyDictionary()
_carriers: set[asyncio.Task[None]] = set()
"""The tasks of `in_anyio_thread`: an event loop keeps only weak references."""
_in_worker: contextvars.ContextVar[bool] = contextvars.ContextVar("session_plugin_in_worker", default=False)
"""True in the calls of `in_anyio_thread`, and in what these run on the event loop by ``anyio.from_thread``."""

after_fork_in_child(_executors.clear)
after_fork_in_child(_limiters.clear)
after_fork_in_child(_carriers.clear)


def in_thread(call: Callable[[], T], *, can_wait: bool) -> asyncio.Future[T]:
    """Make ``call`` in a worker thread, in a copy of the caller's context.

    Calls that hold a connection or a permit never wait for one, and have workers of their own: they must
    not queue behind those that can wait.  Neither queue behind the endpoints, whose threads are anyio's.

    If no thread can be started, since the process has reached its limit or is ending, the call is made here: the
    event loop stands still meanwhile, but no connection is left in its transaction.
    """
    work = _Work(call)
    _submit(work, can_wait=can_wait)
    return work.future


def in_anyio_thread(call: Callable[[], T], *, can_wait: bool) -> asyncio.Future[T]:
    """As `in_thread`, in a worker thread of anyio if the app uses anyio: for calls that run code of the user.

    ``anyio.from_thread`` works in anyio's own worker threads only.  Such a thread costs more than one of `in_thread`.
    The limits are ours, so that the call does not queue behind the endpoints here either.  One that another such call
    waits for, since a hook calls the app in its own process, has no limit: the two would wait for each other.

    A task of anyio's waits for the thread.  Whatever becomes of that task, the call is made, and its end awaited:
    when an event loop ends, it cancels all of its tasks.
    """
    to_thread = sys.modules.get("anyio.to_thread")
    if to_thread is None:
        return in_thread(call, can_wait=can_wait)
    work = _Work(call)
    carrier = work.loop.create_task(to_thread.run_sync(work.make_here, limiter=_limiter(work.loop, can_wait=can_wait)))
    _carriers.add(carrier)
    carrier.add_done_callback(partial(_carried, work, can_wait))
    return work.future


def _limiter(loop: asyncio.AbstractEventLoop, *, can_wait: bool) -> Any:
    anyio: Any = sys.modules["anyio"]
    if _in_worker.get():
        return anyio.CapacityLimiter(1)
    limiters = _limiters.setdefault(loop, {})
    if can_wait not in limiters:
        limiters[can_wait] = anyio.CapacityLimiter(WORKERS)
    return limiters[can_wait]


def _carried(work: _Work[Any], can_wait: bool, carrier: asyncio.Task[None]) -> None:
    """Make the call elsewhere if the task was cancelled while it waited, or if anyio could not start a thread."""
    _carriers.discard(carrier)
    if not work.has_begun():
        if not carrier.cancelled():
            carrier.exception()  # so that asyncio does not report it
        _submit(work, can_wait=can_wait)


def _submit(work: _Work[Any], *, can_wait: bool) -> None:
    executor = _executors.get(can_wait)
    if executor is None:
        executor = concurrent.futures.ThreadPoolExecutor(WORKERS, "session_plugin")  # imported when it is named
        _executors[can_wait] = executor
    try:
        executor.submit(work)
    except RuntimeError:
        logger.warning("No thread could be started, so a unit of work ends in the thread of the event loop.")
        work()


class _Work(Generic[T]):
    """A call that is made once, although an executor that fails to start a thread keeps it in its queue.

    Attributes:
        loop: the event loop that waits for it.
        future: what the call returns or raises.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._context = contextvars.copy_context()
        self._unmade = threading.Lock()
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()

    def has_begun(self) -> bool:
        """Return True once a thread makes the call, or has made it."""
        return self._unmade.locked()

    def __call__(self) -> None:
        """Make the call in a copy of the context in which the work was created."""
        self._make(partial(self._context.run, self._call))

    def make_here(self) -> None:
        """Make the call in the context of the caller, which anyio has copied and adapted to its worker thread."""
        _in_worker.set(True)
        self._make(self._call)

    def _make(self, call: Callable[[], T]) -> None:
        """Make the call, unless another thread has begun to, and report to the event loop."""
        if not self._unmade.acquire(blocking=False):
            return
        report: Callable[[], None]
        try:
            report = partial(self.future.set_result, call())
        except BaseException as error:
            report = partial(self.future.set_exception, error)
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(report)
