"""Background tasks: each is a unit of work of its own, settled before the framework runs the next one."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from types import FrameType
from typing import Any

from starlette.background import BackgroundTask, BackgroundTasks
from starlette.responses import Response

from ..asgi.middleware import SessionScopeMiddleware
from ..asgi.request_cycle import Layer
from ..asgi.types import Message
from ..scope.late import late_runner
from ..scope.log import logger
from ..scope.unit_of_work import ScopeDatabase


class ResponseLayer(Layer):
    """A layer that finds the response which sends through it, and its background tasks."""

    def send(self, message: Message) -> Coroutine[Any, Any, None]:
        """Pass ``message`` on, once what it says is true."""
        if message["type"] == "http.response.start" and message is not self.cycle.start:
            self.cycle.start = message  # the layers further out need not look, unless a middleware sends another one
            if responses := responses_with_tasks(sys._getframe(1)):
                return self._start_before_tasks(responses, message)
        return super().send(message)

    async def _start_before_tasks(self, responses: list[Response], message: Message) -> None:
        """Pass a start on, and warn of background tasks that run although the work was rolled back."""
        unit = self.cycle.unit
        self.finds_late_calls()
        tasks = [separated_tasks(response, unit.database) for response in responses]
        discarded = unit.discarded
        await super().send(message)
        if unit.discarded and not discarded and any(getattr(task, "tasks", True) for task in tasks):
            logger.warning(
                "%s: its work was rolled back, and its background tasks run all the same. If they must not, add them "
                "with db.on_commit(tasks.add_task, ...)",
                str(unit),
            )


class ResponseScopeMiddleware(SessionScopeMiddleware):
    """A `SessionScopeMiddleware` that also finds the responses of middlewares and of the app's error handlers."""

    layer_class: type[Layer] = ResponseLayer


def responses_with_tasks(frame: FrameType | None) -> list[Response]:
    """Return the response that awaits the ``send`` which ``frame`` calls, and those around it, if they have tasks.

    Starlette passes a response neither to ``send`` nor through the scope, and runs ``response.background``
    itself, without a message between two tasks.  Before the first byte is the last moment at which every kind of
    response can be reached: one that the endpoint returns, one that FastAPI makes, and one of a mounted app or an
    error handler.  It is ``self`` of the frame that awaits ``send``, and a response that sends by another one is
    ``self`` of the next frame.  Where no such frame is found, as behind a `BaseHTTPMiddleware` of a single route,
    which sends from another task, the tasks share a transaction.
    """
    sender: Any = None
    found: list[Response] = []
    while frame is not None and (code := frame.f_code) is not _RUN:
        around = None
        if code.co_argcount > 1 and code.co_varnames[0] == "self":  # a wrapped ``send`` takes the message only
            around = frame.f_locals.get("self")
        if isinstance(around, Response):
            if around is not sender and getattr(around, "background", None) is not None:
                found.append(around)
            sender = around
        elif sender is not None:
            break
        frame = frame.f_back
    return found


_RUN = Layer.run.__code__


def separated_tasks(response: Response, database: ScopeDatabase) -> BackgroundTask:
    """Make each background task of ``response`` a unit of work on ``database``, and return them."""
    response.background = separated(response.background, database)
    return response.background


def separated(task: Any, database: ScopeDatabase) -> BackgroundTask:
    """Return ``task`` as a unit of work on ``database``; of a `BackgroundTasks`, each of its tasks is one."""
    if isinstance(task, SeparateTask):
        task.databases = _with(task.databases, database)
        return task
    several = task if isinstance(task, BackgroundTasks) else getattr(task, "func", None)
    if not isinstance(several, BackgroundTasks):
        return SeparateTask(task, database)
    if isinstance(several.tasks, SeparateTasks):
        several.tasks.databases = _with(several.tasks.databases, database)
    else:
        several.tasks = SeparateTasks(several.tasks, database)
    return task  # type: ignore[no-any-return]


def _with(databases: tuple[ScopeDatabase, ...], database: ScopeDatabase) -> tuple[ScopeDatabase, ...]:
    return databases if database in databases else (*databases, database)


class SeparateTasks(list[BackgroundTask]):
    """The tasks of a `BackgroundTasks`: when they are run, each is a unit of work, also one that is added late."""

    def __init__(self, tasks: list[BackgroundTask], database: ScopeDatabase) -> None:
        super().__init__(tasks)
        self.databases: tuple[ScopeDatabase, ...] = (database,)

    def __iter__(self) -> Iterator[BackgroundTask]:
        for task in super().__iter__():
            for database in self.databases:
                task = separated(task, database)
            yield task


class SeparateTask(BackgroundTask):
    """A background task that is a unit of work; its ``func``, ``args`` and ``kwargs`` are those of the task.

    It belongs to no request, since a task or a response may serve several: it finds the request that it runs in.
    """

    task: Any = None

    def __init__(self, task: Any, database: ScopeDatabase) -> None:
        self.task = task
        self.databases: tuple[ScopeDatabase, ...] = (database,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    async def __call__(self) -> None:
        """Run the task, and settle what it did."""
        call: Callable[[], Awaitable[None]] = self.task
        for database in self.databases:
            call = partial(_run, database, call)
        await call()


async def _run(database: ScopeDatabase, call: Callable[[], Awaitable[None]]) -> None:
    runner = late_runner(database)
    await (call() if runner is None else runner(call))
