"""Counters that do not depend on the load of the machine: instructions, function calls and thread hops."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

SYSCALL_NUMBERS = {"x86_64": 298, "aarch64": 241}
"""The number of the system call perf_event_open(2)."""


def instruction_counter() -> Callable[[], Any]:
    """Return a function that returns the instructions that this process has executed, or None without a counter.

    Threads that are started later are counted, those that already run are not.  Virtual machines often have no counter.
    """
    attributes = bytearray(128)
    struct.pack_into("IIQ", attributes, 0, 0, len(attributes), 1)  # PERF_TYPE_HARDWARE, PERF_COUNT_HW_INSTRUCTIONS
    struct.pack_into("Q", attributes, 40, 1 << 1 | 1 << 5 | 1 << 6)  # inherit; exclude the kernel and the hypervisor
    number = SYSCALL_NUMBERS.get(os.uname().machine) if sys.platform == "linux" else None
    buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    descriptor = -1 if number is None else ctypes.CDLL(None).syscall(number, buffer, 0, -1, -1, 0)
    if descriptor < 0:
        return lambda: None
    return lambda: int.from_bytes(os.read(descriptor, 8), sys.byteorder)


class FunctionCounter:
    """Counts the calls of Python functions in all threads; `count` is None before Python 3.12."""

    count: int | None = None

    def __enter__(self) -> FunctionCounter:
        if sys.version_info >= (3, 12):
            self.count = 0
            monitoring = sys.monitoring
            monitoring.use_tool_id(monitoring.PROFILER_ID, "bench")
            monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.PY_START, self._entered)
            monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.PY_START)
        return self

    def _entered(self, code: Any, offset: int) -> None:
        assert self.count is not None
        self.count += 1

    def __exit__(self, *exc_info: object) -> None:
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
            sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)


class HopCounter:
    """Counts the calls that other threads schedule on an event loop: each is the end of a thread hop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop: Any = loop
        self.count = 0

    def __enter__(self) -> HopCounter:
        original = self._loop.call_soon_threadsafe

        def call_soon_threadsafe(*args: Any, **options: Any) -> Any:
            self.count += 1
            return original(*args, **options)

        self._loop.call_soon_threadsafe = call_soon_threadsafe
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._loop.call_soon_threadsafe
