"""`run()` and `arun()`: two runners for one algorithm, sync and async.

An algorithm is a generator that yields the calls to make and never makes them itself.  A runner makes
the calls, sends back what they return, and throws back in what they raise.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[Callable[[], Any], Any, T]


def run(steps: Steps[T]) -> T:
    """Make the calls of ``steps`` one after the other, and return its result."""
    try:
        call = next(steps)
        while True:
            try:
                result = call()
            except BaseException as error:
                call = steps.throw(error)
            else:
                call = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


async def arun(steps: Steps[T]) -> T:
    """As `run`, awaiting those calls that return an awaitable."""
    try:
        call = next(steps)
        while True:
            try:
                result = call()
                if inspect.isawaitable(result):
                    result = await result
            except BaseException as error:
                call = steps.throw(error)
            else:
                call = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value


async def uncancelled(work: Coroutine[Any, Any, T] | asyncio.Future[T]) -> T:
    """Await ``work`` to its very end, even if the awaiting task is cancelled meanwhile.

    The cancellation is kept and raised once the work is done.  The work runs in a task of its own: a
    shielded anyio cancel scope would not stop a native ``task.cancel()``, and without a shield the driver
    would break off in the middle of a COMMIT.  The task itself reports that it has ended; `asyncio.shield`
    would notice it one iteration of the event loop later.
    """
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def report_end(task: object = None) -> None:
        if not ended.done():
            ended.set_result(None)

    async def to_its_end(coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return await coroutine
        finally:
            report_end()

    task = work if isinstance(work, asyncio.Future) else loop.create_task(to_its_end(work))
    task.add_done_callback(report_end)  # a task that was cancelled before it began does not report itself
    cancelled: asyncio.CancelledError | None = None
    with ExitStack() as shields:
        while not task.done():
            try:
                await ended
            except asyncio.CancelledError as error:
                if cancelled is None:
                    shields.enter_context(_anyio_shield())
                if not task.cancelled():
                    cancelled = error
            ended = loop.create_future()  # also if the end was reported: a task factory's task may go on for a while
    if not isinstance(work, asyncio.Future):
        work.close()  # never awaited, if the task was cancelled before it began
    if cancelled is not None:
        if not task.cancelled() and task.exception() is not None:
            raise cancelled from task.exception()
        raise cancelled
    return task.result()


def _anyio_shield() -> AbstractContextManager[Any]:
    """Where anyio is in use, keep its cancelled scopes from waking the waiting task at every iteration of the loop."""
    anyio: Any = sys.modules.get("anyio")
    shield: AbstractContextManager[Any] = nullcontext() if anyio is None else anyio.CancelScope(shield=True)
    return shield
