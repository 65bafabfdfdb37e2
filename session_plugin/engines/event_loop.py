"""Which asyncio event loop runs the code; sessions of an async database, and the ending of a request, need one."""

from __future__ import annotations

import asyncio
import sys
from importlib import import_module
from typing import Any

from ..exceptions import ConfigurationError

IN_TESTS = 'In tests with anyio\'s pytest plugin, let the fixture anyio_backend return "asyncio".'


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def loop_of_worker_thread() -> asyncio.AbstractEventLoop:
    """Return the event loop for which this worker thread of anyio works.

    FastAPI and Starlette run sync dependencies and endpoints in such threads.

    Raises:
        ConfigurationError: this is not a worker thread, or anyio runs on trio.
    """
    try:
        if "anyio" in sys.modules:
            from_thread: Any = import_module("anyio.from_thread")
            loop: asyncio.AbstractEventLoop = from_thread.run_sync(asyncio.get_running_loop)
            return loop
    except RuntimeError:
        pass
    raise ConfigurationError(
        "An async session was asked for where no asyncio event loop runs. Ask for it in async code that asyncio "
        f"runs, or use Database here. {IN_TESTS}"
    )


def needs_asyncio() -> ConfigurationError:
    """Return the error for an app that runs on another event loop than asyncio's."""
    return ConfigurationError(
        "session_plugin needs asyncio, and this app runs on another event loop, such as trio's. Start the server with "
        f"its asyncio worker: hypercorn --worker-class asyncio. {IN_TESTS}"
    )
