"""Worker threads in which sync sessions end under an event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
from collections.abc import Callable
from typing import TypeVar

from ..engines.forks import after_fork_in_child

T = TypeVar("T")

WORKERS = 32
_executors: dict[bool, concurrent.futures.ThreadPoolExecutor] = {}

after_fork_in_child(_executors.clear)


def in_thread(call: Callable[[], T], *, can_wait: bool) -> asyncio.Future[T]:
    """Make ``call`` in a worker thread, in a copy of the caller's context.

    Calls that hold a connection or a permit never wait for one, and have workers of their own: they must
    not queue behind those that can wait.  Neither queue behind the endpoints, whose threads are anyio's.
    """
    executor = _executors.get(can_wait)
    if executor is None:
        executor = concurrent.futures.ThreadPoolExecutor(WORKERS, "session_plugin")  # imported when it is named
        _executors[can_wait] = executor
    context = contextvars.copy_context()
    return asyncio.get_running_loop().run_in_executor(executor, context.run, call)
