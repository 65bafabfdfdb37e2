"""Sync sessions under an event loop: one hop to end a scope."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WORKERS = 32
_executors: dict[bool, concurrent.futures.ThreadPoolExecutor] = {}


def after_fork_in_child(call: Callable[[], None]) -> None:
    """Have ``call`` made in every forked child; where there is no fork, as on Windows, never."""
    register = getattr(os, "register_at_fork", None)
    if register is not None:
        register(after_in_child=call)


after_fork_in_child(_executors.clear)


def in_thread(call: Callable[[], T], *, can_wait: bool) -> asyncio.Future[T]:
    """Make ``call`` in a worker thread, in a copy of the caller's context.

    Those that hold a connection or a permit cannot wait for one, and have workers of their own: they
    must never queue behind those that can.  Neither queues behind the endpoints, whose threads are
    anyio's.
    """
    executor = _executors.get(can_wait)
    if executor is None:
        executor = concurrent.futures.ThreadPoolExecutor(WORKERS, "session_plugin")  # loaded when it is named
        _executors[can_wait] = executor
    context = contextvars.copy_context()
    return asyncio.get_running_loop().run_in_executor(executor, context.run, call)
