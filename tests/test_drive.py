"""`run` and `arun` drive the same generators, and `uncancelled` finishes its work despite a cancellation."""

import asyncio
from collections.abc import Callable, Generator
from inspect import CORO_CLOSED, getcoroutinestate
from typing import Any

import anyio
import pytest

from session_plugin.scope.runner import arun, run, uncancelled


class Oops(Exception):
    pass


def steps(log: list[Any], *calls: Callable[[], Any]) -> Generator[Callable[[], Any], Any, str]:
    """Log the result or the error of each call; after an error, make one more call and raise it."""
    for call in calls:
        try:
            log.append((yield call))
        except Oops as error:
            log.append(error)
            yield lambda: log.append("cleaned up")
            raise
    return "the end"


def fail() -> None:
    raise Oops


def drive_sync(generator: Any) -> Any:
    return run(generator)


def drive_async(generator: Any) -> Any:
    return asyncio.run(arun(generator))


@pytest.mark.parametrize("drive", [drive_sync, drive_async])
class TestDrivers:
    """Both drivers make the calls in order, send the results back, and throw errors into the generator."""

    def test_results(self, drive: Any) -> None:
        """Each result is sent into the generator, whose return value is returned."""
        log: list[Any] = []
        assert drive(steps(log, lambda: 1, lambda: 2)) == "the end"
        assert log == [1, 2]

    def test_nothing_to_do(self, drive: Any) -> None:
        """A generator without calls returns its value."""
        assert drive(steps([])) == "the end"

    def test_errors(self, drive: Any) -> None:
        """An error of a call is thrown into the generator, which can make further calls."""
        log: list[Any] = []
        with pytest.raises(Oops):
            drive(steps(log, lambda: 1, fail, lambda: "never"))
        assert log[0] == 1
        assert isinstance(log[1], Oops)
        assert log[2:] == ["cleaned up"]


def test_awaitables_are_awaited() -> None:
    """`arun` awaits the result of a call if it is awaitable."""
    log: list[Any] = []

    async def awaited() -> str:
        await asyncio.sleep(0)
        return "awaited"

    async def failing() -> None:
        await asyncio.sleep(0)
        raise Oops

    with pytest.raises(Oops):
        drive_async(steps(log, awaited, lambda: "called", failing))
    assert log[:2] == ["awaited", "called"]


class Work:
    """Waits until ``finish`` is set, and then returns or raises ``error``."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.begun, self.finish = asyncio.Event(), asyncio.Event()
        self.error = error
        self.done = False

    async def __call__(self) -> str:
        self.begun.set()
        await self.finish.wait()
        self.done = True
        if self.error is not None:
            raise self.error
        return "done"


@pytest.mark.parametrize("error", [None, Oops()])
@pytest.mark.parametrize("times", [1, 3])
def test_a_cancellation_waits_for_the_work(error: Oops | None, times: int) -> None:
    """Cancelled work runs to its end, however often it is cancelled; CancelledError is raised from the work's error."""

    async def scenario() -> None:
        work = Work(error)
        task = asyncio.create_task(uncancelled(work()))
        await work.begun.wait()
        for _ in range(times):
            task.cancel("stop")
            await asyncio.sleep(0)
            assert not task.done()
        work.finish.set()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
        assert work.done
        assert cancelled.value.__cause__ is error

    asyncio.run(scenario())


def test_an_anyio_scope_waits_for_the_work() -> None:
    """Work inside a cancelled anyio scope runs to its end, although anyio repeats the cancellation."""

    async def scenario() -> None:
        work = Work()
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_later(0.05, work.finish.set)
            scope.cancel()
            await uncancelled(work())
        assert (work.done, scope.cancelled_caught) == (True, True)

    asyncio.run(scenario())


def test_an_anyio_scope_does_not_spin() -> None:
    """A cancelled anyio scope does not cancel the waiting task in each turn of the loop, which would busy a CPU."""

    async def scenario() -> None:
        waiting = asyncio.current_task()
        assert waiting is not None

        async def work() -> int:
            scope.cancel()
            for _ in range(50):
                await asyncio.sleep(0)
            return waiting.cancelling()

        with anyio.CancelScope() as scope:
            ended = asyncio.ensure_future(work())
            await uncancelled(ended)
        assert ended.result() <= 1
        assert scope.cancelled_caught
        assert waiting.cancelling() == 0

    asyncio.run(scenario())


def test_asyncio_timeout_still_times_out() -> None:
    """asyncio.timeout() raises `TimeoutError` once the work is done."""

    async def scenario() -> None:
        work = Work()
        asyncio.get_running_loop().call_later(0.1, work.finish.set)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await uncancelled(work())
        assert work.done

    asyncio.run(scenario())


def test_without_a_cancellation() -> None:
    """Without a cancellation, `uncancelled` returns the result of the work, or raises its error."""

    async def scenario(error: Oops | None) -> Any:
        work = Work(error)
        work.finish.set()
        return await uncancelled(work())

    assert asyncio.run(scenario(None)) == "done"
    with pytest.raises(Oops):
        asyncio.run(scenario(Oops()))


def test_a_task_that_goes_on_after_the_work() -> None:
    """If a task factory's task continues after the work, `uncancelled` waits for it without blocking the loop."""

    async def work() -> int:
        return 42

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        async def traced() -> Any:
            try:
                return await coroutine
            finally:
                await asyncio.sleep(0)

        return asyncio.Task(traced(), loop=loop, **options)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        assert await uncancelled(work()) == 42

    asyncio.run(main())


@pytest.mark.parametrize("caller_too", [False, True])
def test_work_that_is_itself_cancelled(caller_too: bool) -> None:
    """If the work's own task is cancelled, as at the end of a loop, the first cancellation is raised."""

    async def scenario() -> None:
        work = Work()
        task = asyncio.create_task(uncancelled(work()))
        await work.begun.wait()
        [inner] = asyncio.all_tasks() - {task, asyncio.current_task()}
        if caller_too:
            task.cancel("the caller")
        await asyncio.sleep(0)
        inner.cancel("the work")
        await asyncio.wait([task], timeout=5)
        with pytest.raises(asyncio.CancelledError, match="the caller" if caller_too else "the work"):
            task.result()

    asyncio.run(scenario())


def test_work_that_is_cancelled_before_it_begins() -> None:
    """Work that is cancelled before it begins is closed, without a warning that it was never awaited."""

    async def scenario() -> None:
        work = Work()()
        task = asyncio.create_task(uncancelled(work))
        await asyncio.sleep(0)
        [inner] = asyncio.all_tasks() - {task, asyncio.current_task()}
        inner.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()
        assert getcoroutinestate(work) == CORO_CLOSED

    asyncio.run(scenario())


def test_the_waiting_task_resumes_in_the_turn_in_which_the_work_ends() -> None:
    """The waiting task resumes in the same turn of the event loop in which the work ends."""
    turns: list[str] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, turns.append, "the turn after")

    async def scenario() -> None:
        await uncancelled(work())
        turns.append("told")
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert turns == ["told", "the turn after"]
