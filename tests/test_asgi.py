"""The ASGI middleware by itself: single messages, nested layers, cancellation, and different servers."""

import asyncio
import contextlib
import contextvars
import gc
import math
import threading
from functools import partial
from typing import Any

import anyio
import pytest
import uvicorn
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.util import await_only

from session_plugin import (
    AsyncDatabase,
    ConcurrentUseError,
    Database,
    Decision,
    NoScopeError,
    Outcome,
    SessionPluginError,
)
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.asgi.request_cycle import Layer, RequestCycle

from .apps import PlainASGIHarness
from .asgi_site import ASYNC_DRIVERS, Gate, Site, stores
from .contract import Contract, on
from .harness import POOL, Store, add_orphan, check_foreign_keys, count, insert, wait_for

store = stores(ASYNC_DRIVERS)
postgresql_store = stores(["postgresql+psycopg", "postgresql+asyncpg"])
file_store = stores(["sqlite+aiosqlite"])


@on(PlainASGIHarness)
class TestContract(Contract):
    """The promises of the contract."""


HTTP = {"type": "http", "method": "GET", "path": "/"}
START = {"type": "http.response.start", "status": 200, "headers": []}
PART = {"type": "http.response.body", "body": b"part", "more_body": True}
LAST = {"type": "http.response.body", "body": b"", "more_body": False}


class Bench:
    """A database, and a server that records what is committed whenever it receives a message."""

    def __init__(self, store: Store) -> None:
        store.clear()
        self.store = store
        self.db = AsyncDatabase(store.url, **POOL)
        if store.backend == "sqlite":
            event.listen(self.db.engine.sync_engine, "connect", check_foreign_keys)
        self.sent: list[tuple[str, list[str]]] = []

    async def receive(self) -> Any:
        return await asyncio.get_running_loop().create_future()

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)
        self.sent.append((message["type"].rpartition(".")[2], self.store.names()))

    async def serve(self, app: Any, layers: int = 2, scope: Any = None) -> None:
        for _ in range(layers):
            app = SessionScopeMiddleware(app, self.db)
        await app({**HTTP, **(scope or {})}, self.receive, self.send)

    def run(self, scenario: Any) -> Any:
        """Run ``scenario``, and check at its end that no connection and no transaction is left open."""

        async def bounded() -> Any:
            try:
                return await asyncio.wait_for(scenario, 20)
            finally:
                assert self.db.engine.sync_engine.pool.checkedout() == 0
                wait_for(lambda: not self.store.open_transactions())  # the server may notice a closed connection late
                assert self.store.open_transactions() == []
                await self.db.dispose()

        result = asyncio.run(bounded())
        gc.collect()
        return result


def sending(bench: Bench, *steps: Any) -> Any:
    """An app that goes through ``steps``: it sends the messages and calls the functions."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for step in steps:
            if callable(step):
                await bench.db.session.run_sync(step)
            else:
                await send(step)

    return app


# -- message by message ----------------------------------------------------------------------------

ENDINGS: dict[str, list[Any]] = {
    "body": [LAST],
    "pathsend": [{"type": "http.response.pathsend", "path": "/dev/null"}],
    "zerocopysend": [{"type": "http.response.zerocopysend", "file": 0}],
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_settled_before_the_first_and_the_last_message(file_store: Store, ending: str, layers: int) -> None:
    """The unit of work is settled before the first and before the last message, whatever type the last one has."""
    bench = Bench(file_store)
    app = sending(bench, insert("a"), START, insert("b"), PART, insert("c"), *ENDINGS[ending], insert("d"))
    bench.run(bench.serve(app, layers))
    assert [names for _, names in bench.sent] == [["a"], ["a"], ["a", "b", "c"]]
    assert file_store.names() == ["a", "b", "c", "d"]


def test_trailers_are_the_last_message(file_store: Store) -> None:
    """If a response announces trailers, its last message is the last trailers message."""
    bench = Bench(file_store)
    trailers = {"type": "http.response.trailers", "headers": []}
    app = sending(
        bench,
        {**START, "trailers": True},
        insert("a"),
        LAST,
        {**trailers, "more_trailers": True},
        insert("b"),
        trailers,
    )
    bench.run(bench.serve(app))
    assert [names for _, names in bench.sent] == [[], [], [], ["a", "b"]]


@pytest.mark.parametrize("steps", [[], [START], [START, PART]], ids=["nothing", "start", "part"])
def test_an_app_that_does_not_finish_its_response_rolls_back(file_store: Store, steps: list[Any]) -> None:
    """If an app returns before the end of its response, the work since the last settling is rolled back."""
    bench = Bench(file_store)
    bench.run(bench.serve(sending(bench, *steps, insert("lost"))))
    assert file_store.names() == []


def test_an_unfinished_handshake_rolls_back(file_store: Store) -> None:
    """If a WebSocket app returns before it accepts or closes the connection, its work is rolled back."""
    bench = Bench(file_store)
    bench.run(bench.serve(sending(bench, insert("lost")), scope={"type": "websocket"}))
    assert file_store.names() == []


@pytest.mark.parametrize("connection", [("http", "POST"), ("websocket", None)])
def test_logs_name_the_connection(file_store: Store, connection: tuple[str, str | None]) -> None:
    """`repr()` of a scope names the method and the path; a WebSocket has no method."""
    kind, method = connection
    bench = Bench(file_store)
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(repr(bench.db.scope))

    bench.run(bench.serve(app, scope={"type": kind, "method": method, "path": "/tea"}))
    assert seen == [f"{method or 'WEBSOCKET'} /tea"]


def test_a_buffering_middleware_may_finish_the_response(file_store: Store) -> None:
    """If a middleware sends the response after the app has returned, its work is settled before the first byte."""
    bench = Bench(file_store)
    inside = SessionScopeMiddleware(sending(bench, START, insert("a"), LAST), bench.db)

    async def buffering(scope: Any, receive: Any, send: Any) -> None:
        messages: list[Any] = []

        async def keep(message: Any) -> None:
            messages.append(message)

        await inside(scope, receive, keep)
        for message in messages:
            await send(message)

    bench.run(bench.serve(buffering, layers=1))
    assert bench.sent == [("start", ["a"]), ("body", ["a"])]


def between(bench: Bench, app: Any, middleware: Any) -> Any:
    """Serve ``middleware(app, scope, receive, send)`` between two layers."""
    inside = SessionScopeMiddleware(app, bench.db)
    return bench.serve(lambda scope, receive, send: middleware(inside, scope, receive, send), layers=1)


@pytest.mark.parametrize("other_is", ["absent", "further in", "further out"])
def test_work_of_a_middleware_while_it_passes_the_start_on(file_store: Store, other_is: str) -> None:
    """Work that a middleware does when it passes on the start message is committed before the first byte.

    This also holds if layers of another database are inside or outside of its own.
    """
    bench = Bench(file_store)
    other = AsyncDatabase("sqlite+aiosqlite://")

    async def logging(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def log_and_send(message: Any) -> None:
            if message is START:
                await bench.db.session.run_sync(insert("log"))
            await send(message)

        await app(scope, receive, log_and_send)

    app = sending(bench, insert("a"), START, insert("b"), LAST)
    databases = {"absent": [bench.db], "further in": [other, bench.db], "further out": [bench.db, other]}[other_is]
    for database in databases:
        app = SessionScopeMiddleware(app, database)
    serve = SessionScopeMiddleware(partial(logging, app), other)
    bench.run(bench.serve(serve, layers=1))
    assert bench.sent == [("start", ["a", "log"]), ("body", ["a", "b", "log"])]


@pytest.mark.parametrize("status", [400, 500])
def test_an_error_response_for_a_stream_that_failed_before_its_first_byte(file_store: Store, status: int) -> None:
    """If no message of a failed stream was sent, a middleware can still send an error response."""
    bench = Bench(file_store)

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await sending(bench, START, insert("lost"))(scope, receive, send)
        raise KeyError

    async def holding(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def hold(message: Any) -> None:
            pass

        try:
            await app(scope, receive, hold)
        except KeyError:
            await sending(bench, {**START, "status": status}, LAST)(scope, receive, send)

    bench.run(between(bench, failing, holding))
    assert bench.sent == [("start", []), ("body", [])]


def swallowing(app: Any, scope: Any, receive: Any, send: Any) -> Any:
    """A middleware that swallows the errors of the app."""

    async def report() -> None:
        with contextlib.suppress(ValueError, BaseExceptionGroup):
            await app(scope, receive, send)

    return report()


class FailingWork:
    """A transaction that begins and fails at times chosen by the test."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.begins, self.begun, self.ends = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        await self.begins.wait()
        await self._bench.db.session.run_sync(insert("half"))
        self.begun.set()
        await self.ends.wait()
        raise ValueError


def test_work_of_the_app_beside_its_own_start(file_store: Store) -> None:
    """A task that works while another task of the app sends the start is not committed halfway by that start."""
    bench = Bench(file_store)

    async def scenario() -> None:
        work = FailingWork(bench)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(work.run())
                await send(START)
                work.ends.set()
                await asyncio.get_running_loop().create_future()

        async def waiting(app: Any, scope: Any, receive: Any, send: Any) -> None:
            async def wait_and_send(message: Any) -> None:
                work.begins.set()
                await work.begun.wait()
                await send(message)

            await app(scope, receive, wait_and_send)

        with pytest.raises(BaseExceptionGroup):
            await between(bench, app, waiting)

    bench.run(scenario())
    assert bench.sent == [("start", [])]
    assert file_store.names() == []


def test_work_of_the_app_beside_its_own_end(file_store: Store) -> None:
    """Failing background work is rolled back even if it began during the last message and its error is swallowed."""
    bench = Bench(file_store)

    async def scenario() -> None:
        work = FailingWork(bench)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(work.run())
                await send(START)
                await send(LAST)
                work.ends.set()

        async def slow_send(message: Any) -> None:
            if message is LAST:
                work.begins.set()
                await work.begun.wait()

        inside = SessionScopeMiddleware(app, bench.db)
        outside = SessionScopeMiddleware(partial(swallowing, inside), bench.db)
        await outside({**HTTP}, bench.receive, slow_send)

    bench.run(scenario())
    assert file_store.names() == []


def test_work_of_a_middleware_that_outlives_its_send(file_store: Store) -> None:
    """The end of an app does not commit half of the work of a task that a middleware's send wrapper started."""
    bench = Bench(file_store)

    async def scenario() -> None:
        work = FailingWork(bench)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(START)
            await send(LAST)
            work.begins.set()
            await work.begun.wait()

        async def logging(app: Any, scope: Any, receive: Any, send: Any) -> None:
            tasks = []

            async def log_and_send(message: Any) -> None:
                if message is LAST:
                    tasks.append(asyncio.create_task(work.run()))
                await send(message)

            await app(scope, receive, log_and_send)
            work.ends.set()
            await asyncio.gather(*tasks)

        with pytest.raises(ValueError, match=r"^$"):
            await between(bench, app, logging)

    bench.run(scenario())
    assert file_store.names() == []


def test_two_messages_at_once(file_store: Store) -> None:
    """Work of a middleware on one message is settled correctly while another message passes through it."""
    bench = Bench(file_store)
    push = {"type": "http.response.push", "path": "/style.css", "headers": []}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send(START))
            tasks.create_task(send(push))
        await send(LAST)

    async def auditing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        pushed = asyncio.Event()

        async def audit_and_send(message: Any) -> None:
            if message is START:
                await pushed.wait()
                await asyncio.sleep(0)
                await bench.db.session.run_sync(insert("audit"))
            await send(message)
            if message is push:
                asyncio.get_running_loop().call_later(0.01, pushed.set)

        await app(scope, receive, audit_and_send)

    bench.run(between(bench, app, auditing))
    assert [sent for sent in bench.sent if sent[0] == "start"] == [("start", ["audit"])]


@pytest.mark.parametrize("fails", [False, True])
def test_background_work_beside_the_layers_of_two_databases(file_store: Store, fails: bool) -> None:
    """Failing background work is rolled back if a middleware swallows its error between layers of two databases.

    This also holds if the client has disconnected before.
    """
    bench = Bench(file_store)
    other = AsyncDatabase("sqlite+aiosqlite://")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        with contextlib.suppress(OSError):
            await send(LAST)
        await bench.db.session.run_sync(insert("lost"))
        raise ValueError

    async def send(message: Any) -> None:
        if fails and message is LAST:
            raise OSError

    inside = SessionScopeMiddleware(SessionScopeMiddleware(app, bench.db), other)
    outside = SessionScopeMiddleware(partial(swallowing, inside), other)
    bench.run(SessionScopeMiddleware(outside, bench.db)({**HTTP}, bench.receive, send))
    assert file_store.names() == []


def test_a_middleware_that_responds_for_the_app_settles_its_own_work(file_store: Store) -> None:
    """If the app sends no response and a middleware does, the middleware's own work is settled by its response."""
    bench = Bench(file_store)

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        """Send no response."""

    async def answering(app: Any, scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        async with bench.db.session_scope() as session:
            await session.run_sync(insert("own"))
        await sending(bench, START, LAST)(scope, receive, send)

    bench.run(between(bench, silent, answering))
    assert bench.sent == [("start", ["own"]), ("body", ["own"])]


def test_tasks_that_outlive_a_request_do_not_refer_to_it(file_store: Store) -> None:
    """Tasks and connections that outlive a request keep no reference to its layers."""
    bench = Bench(file_store)

    async def scenario() -> list[Any]:
        over = asyncio.Event()
        tasks = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.create_task(over.wait()))
            await sending(bench, insert(f"row {len(tasks)}"), START, LAST)(scope, receive, send)

        for _ in range(3):
            await bench.serve(app)
        gc.collect()
        alive = [each for each in gc.get_objects() if isinstance(each, (Layer, RequestCycle))]
        over.set()
        await asyncio.gather(*tasks)
        return alive

    assert bench.run(scenario()) == []


def test_a_failed_stream_cannot_be_completed(file_store: Store) -> None:
    """After a stream has failed, a middleware that swallows the error cannot complete the response."""
    bench = Bench(file_store)

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await sending(bench, START, PART, insert("lost"))(scope, receive, send)
        raise KeyError

    async def completing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(KeyError):
            await app(scope, receive, send)
        await send(LAST)

    with pytest.raises(KeyError):
        bench.run(between(bench, failing, completing))
    assert bench.sent == [("start", []), ("body", [])]


async def holding(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """A middleware that sends nothing until the app has returned, and swallows its error."""
    held: list[Any] = []

    async def hold(message: Any) -> None:
        held.append(message)

    with contextlib.suppress(KeyError):
        await app(scope, receive, hold)
    for message in held:
        await send(message)


def test_failed_background_work_does_not_affect_a_held_response(file_store: Store) -> None:
    """If background work fails, a middleware that holds back the complete response can still send it."""
    bench = Bench(file_store)

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await sending(bench, insert("a"), START, LAST, insert("lost"))(scope, receive, send)
        raise KeyError

    bench.run(between(bench, failing, holding))
    assert bench.sent == [("start", ["a"]), ("body", ["a"])]


def test_failed_background_work_in_the_transaction_of_a_held_stream(file_store: Store) -> None:
    """If background work fails in the transaction of a held stream, both roll back, and the response cannot be sent."""
    bench = Bench(file_store)

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await sending(bench, START, insert("streamed"), LAST)(scope, receive, send)
        raise KeyError

    with pytest.raises(KeyError):
        bench.run(between(bench, failing, holding))
    assert (bench.sent, file_store.names()) == ([], [])


@pytest.mark.parametrize("started", [[], [START]], ids=["nothing", "start"])
def test_a_completed_response_does_not_save_the_apps_work(file_store: Store, started: list[Any]) -> None:
    """If an app stops before the end of its response, its work is rolled back even if a middleware completes it."""
    bench = Bench(file_store)

    async def finishing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)
        await sending(bench, *([] if started else [START]), LAST)(scope, receive, send)

    bench.run(between(bench, sending(bench, *started, insert("lost")), finishing))
    assert bench.sent == [("start", []), ("body", [])]


def test_a_middleware_that_replaces_a_response_saves_its_own_work(file_store: Store) -> None:
    """If a middleware replaces the app's response, the status of the middleware's response decides."""
    bench = Bench(file_store)

    async def replacing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        async def ignore(message: Any) -> None:
            pass

        await app(scope, receive, ignore)
        await sending(bench, insert("found"), START, LAST)(scope, receive, send)

    bench.run(between(bench, sending(bench, insert("lost"), {**START, "status": 404}, LAST), replacing))
    assert bench.sent == [("start", ["found"]), ("body", ["found"])]


@pytest.mark.parametrize("queried", [False, True])
def test_a_success_response_after_a_failed_commit_saves_nothing(store: Store, queried: bool) -> None:
    """If a middleware sends a success response after a failed commit, its own work is rolled back.

    The failed commit is also raised to the middleware if its own query began the transaction.
    """
    bench = Bench(store)

    async def swallowing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        if queried:
            await bench.db.session.run_sync(count)
        with contextlib.suppress(IntegrityError):
            await app(scope, receive, send)
        await sending(bench, insert("lost"), START, LAST)(scope, receive, send)

    bench.run(between(bench, sending(bench, add_orphan, START, LAST), swallowing))
    assert bench.sent == [("start", []), ("body", [])]


@pytest.mark.parametrize("holds", [False, True])
def test_a_failed_commit_is_raised_to_the_surrounding_middleware(file_store: Store, holds: bool) -> None:
    """A failed commit is raised to the middleware that surrounds the work, during the app's call or after it."""
    bench = Bench(file_store)
    inside = SessionScopeMiddleware(sending(bench, insert("a"), START, LAST), bench.db)

    async def auditing(scope: Any, receive: Any, send: Any) -> None:
        held: list[Any] = []

        async def hold(message: Any) -> None:
            held.append(message)

        async def audit_and_send(message: Any) -> None:
            if message is START:
                await bench.db.session.run_sync(add_orphan)
            await send(message)

        await inside(scope, receive, hold if holds else audit_and_send)
        for message in held:
            await audit_and_send(message)

    async def answering(app: Any, scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(IntegrityError):
            await app(scope, receive, send)
        await sending(bench, {**START, "status": 500}, LAST)(scope, receive, send)

    bench.run(between(bench, auditing, answering))
    assert bench.sent == [("start", ["a"]), ("body", ["a"])]


async def started_beside(app: Any, scope: Any, receive: Any) -> asyncio.Task[None]:
    """Run ``app`` in a task, and return the task once the app has sent its first message, which is discarded."""
    started = asyncio.Event()

    async def note_start(message: Any) -> None:
        started.set()

    beside = asyncio.create_task(app(scope, receive, note_start))
    await started.wait()
    return beside


def test_a_stream_that_fails_beside_a_middleware_at_work(store: Store) -> None:
    """A stream that fails in its own task leaves a middleware's transaction open, but no response is sent."""
    bench = Bench(store)
    log: list[str] = []

    async def failing(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await working.wait()
        async with bench.db.session.begin_nested():
            raise KeyError

    async def auditing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        beside = await started_beside(app, scope, receive)
        await bench.db.session.run_sync(insert("audit"))
        working.set()
        await asyncio.wait([beside])
        log.append(type(beside.exception()).__name__)
        assert bench.db.session.in_transaction()
        await bench.db.session.run_sync(insert("audit 2"))
        await sending(bench, START, LAST)(scope, receive, send)

    working = asyncio.Event()
    with pytest.raises(KeyError):
        bench.run(between(bench, failing, auditing))
    assert (log, bench.sent, store.names()) == (["KeyError"], [], [])


def test_an_app_that_ends_beside_a_middleware_at_work(file_store: Store) -> None:
    """An app that returns in its own task leaves a middleware's transaction open."""
    bench = Bench(file_store)

    async def starting(scope: Any, receive: Any, send: Any) -> None:
        await send(START)
        await working.wait()

    async def auditing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        beside = await started_beside(app, scope, receive)
        await bench.db.session.run_sync(insert("audit"))
        working.set()
        await beside
        await sending(bench, START, LAST)(scope, receive, send)

    working = asyncio.Event()
    bench.run(between(bench, starting, auditing))
    assert bench.sent == [("start", ["audit"]), ("body", ["audit"])]


@pytest.mark.parametrize("left", [False, True])
def test_an_app_that_returns_before_its_last_message_is_passed_on(store: Store, left: bool) -> None:
    """Work of a stream is settled once, and only if the client is still connected, if the app returns early.

    Starlette's `BaseHTTPMiddleware` is such a case: up to Starlette 1.6, it passes on the last message
    while the app is already returning.
    """
    bench = Bench(store)

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    async def queueing(app: Any, scope: Any, receive: Any, send: Any) -> None:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        beside = asyncio.create_task(app(scope, receive, queue.put))
        while True:
            message = await queue.get()
            await send(message)
            if not message.get("more_body", True):
                break
        await beside

    if left:
        bench.receive = leave  # type: ignore[method-assign]
    bench.run(between(bench, sending(bench, START, PART, insert("late"), LAST), queueing))
    names = [] if left else ["late"]
    assert (bench.sent, store.names()) == ([("start", []), ("body", []), ("body", names)], names)


def test_outcomes_tell_background_work_from_streamed_work(file_store: Store) -> None:
    """The outcome of a stream's work has the status of the response; the outcome of background work has none."""
    bench = Bench(file_store)
    outcomes: list[Any] = []

    def decide(outcome: Outcome) -> Decision:
        outcomes.append((outcome.status, outcome.background))
        return Decision(True, "fine")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bench.db.use(decide)
        await sending(bench, START, insert("a"), LAST, insert("late"))(scope, receive, send)

    bench.run(bench.serve(app))
    assert (outcomes, file_store.names()) == ([(200, False), (None, True)], ["a", "late"])


@pytest.mark.parametrize(("reply", "status"), [("accept", 101), ("close", 403)])
def test_the_outcome_of_a_handshake_has_the_clients_status(file_store: Store, reply: str, status: int) -> None:
    """The outcome of a handshake has the HTTP status that the client receives."""
    bench = Bench(file_store)
    outcomes: list[Any] = []

    def decide(outcome: Outcome) -> Decision:
        outcomes.append(outcome.status)
        return Decision(True, "fine")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bench.db.use(decide)
        await sending(bench, insert("a"), {"type": f"websocket.{reply}"})(scope, receive, send)

    bench.run(bench.serve(app, scope={"type": "websocket"}))
    assert (outcomes, bench.sent) == ([status], [(reply, ["a"])])


def test_work_of_the_second_app_of_a_cascade_is_settled(file_store: Store) -> None:
    """If a middleware calls a second app after the first, the second app's work is settled before its last message."""
    bench = Bench(file_store)
    first = SessionScopeMiddleware(sending(bench, {**START, "status": 404}, LAST), bench.db)

    async def cascade(app: Any, scope: Any, receive: Any, send: Any) -> None:
        held: list[Any] = []

        async def hold(message: Any) -> None:
            held.append(message)

        async def hold_start(message: Any) -> None:
            held.append(message)
            if message is LAST:
                for message in held:
                    await send(message)

        await first(scope, receive, hold)
        held.clear()
        await app(scope, receive, hold_start)

    bench.run(between(bench, sending(bench, START, insert("a"), LAST), cascade))
    assert bench.sent == [("start", []), ("body", ["a"])]


@pytest.mark.parametrize(("statuses", "saved"), [((200, 500), ["a"]), ((500, 200), [])])
def test_a_second_start_is_settled_too(file_store: Store, statuses: tuple[int, int], saved: list[str]) -> None:
    """If an app sends two starts, work after the second is not lost, and an error status is never replaced."""
    bench = Bench(file_store)
    first, second = ({**START, "status": status} for status in statuses)
    bench.run(bench.serve(sending(bench, insert("a"), first, insert("b"), second, LAST)))
    assert file_store.names() == saved


def test_a_request_that_is_tried_again_has_a_new_unit_of_work(file_store: Store) -> None:
    """If a middleware calls the app twice, each call has its own unit of work, and none is left open after it."""
    bench = Bench(file_store)
    sessions: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sessions.append(bench.db.session)
        await sending(bench, insert(f"try {len(sessions)}"), START, LAST)(scope, receive, send)

    async def scenario() -> None:
        inside = SessionScopeMiddleware(app, bench.db)
        scope = {**HTTP}
        for _ in range(2):
            await inside(scope, bench.receive, bench.send)
            with pytest.raises(NoScopeError):
                bench.db.session  # noqa: B018

    bench.run(scenario())
    assert (file_store.names(), sessions[0] is sessions[1]) == (["try 1", "try 2"], False)


def test_an_app_called_in_an_except_block_commits(file_store: Store) -> None:
    """An app that is called inside an `except` block commits."""
    bench = Bench(file_store)

    async def handling() -> None:
        try:
            raise KeyError
        except KeyError:
            await bench.serve(sending(bench, insert("a"), START, LAST))

    bench.run(handling())
    assert file_store.names() == ["a"]


def test_nothing_is_sent_after_a_failed_commit(store: Store) -> None:
    """After a failed commit, further messages of the app are not sent, and the app's call raises the commit's error."""
    bench = Bench(store)

    async def stubborn(scope: Any, receive: Any, send: Any) -> None:
        await bench.db.session.run_sync(add_orphan)
        for message in (START, LAST, START):
            with contextlib.suppress(BaseException):
                await send(message)

    with pytest.raises(IntegrityError):
        bench.run(bench.serve(stubborn))
    assert bench.sent == []


def test_a_failed_commit_does_not_swallow_a_cancellation(store: Store) -> None:
    """An app that is cancelled after a failed commit ends with the cancellation."""
    bench = Bench(store)
    commit_failed = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await bench.db.session.run_sync(add_orphan)
        with contextlib.suppress(BaseException):
            await send(START)
        commit_failed.set()
        await asyncio.Event().wait()

    async def scenario() -> None:
        task = asyncio.create_task(bench.serve(app))
        await commit_failed.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    bench.run(scenario())


# -- the client ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "to_app", [[], [{"type": "http.request"}], [{"type": "http.disconnect"}], [OSError("gone")]], ids=repr
)
def test_a_disconnect_is_checked_before_the_last_byte(file_store: Store, to_app: list[Any]) -> None:
    """Before the last byte, the middleware checks for a disconnect, and only a disconnect rolls back a stream's work.

    A message that the check receives is passed on to the app.
    """
    bench = Bench(file_store)
    received: list[Any] = []

    async def receive() -> Any:
        if not to_app:
            await asyncio.Event().wait()
        if isinstance(to_app[0], Exception):
            raise to_app[0]
        return to_app[0]

    bench.receive = receive  # type: ignore[method-assign]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await sending(bench, START, insert("late"), LAST)(scope, receive, send)
        if to_app:
            with contextlib.suppress(OSError):
                received.append(await receive())

    async def scenario() -> None:
        await bench.serve(app)
        await asyncio.sleep(0)
        assert not [task for task in asyncio.all_tasks() if "receive" in repr(task)]

    bench.run(scenario())
    left = to_app == [{"type": "http.disconnect"}]
    assert file_store.names() == ([] if left else ["late"])
    assert received == [message for message in to_app if isinstance(message, dict)]


@pytest.mark.parametrize("leaves", [True, False])
def test_an_app_that_awaits_receive_itself(file_store: Store, leaves: bool) -> None:
    """While the app itself awaits receive(), the middleware does not; a disconnect that the app receives rolls back."""
    bench = Bench(file_store)
    listening = 0

    async def receive() -> Any:
        nonlocal listening
        listening += 1
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        listener = asyncio.create_task(receive())
        await sending(bench, START, insert("late"))(scope, receive, send)
        if leaves:
            disconnected.set()
            await listener
        await send(LAST)
        disconnected.set()
        await listener

    disconnected = asyncio.Event()
    bench.receive = receive  # type: ignore[method-assign]
    bench.run(bench.serve(app))
    assert listening == 1
    assert file_store.names() == ([] if leaves else ["late"])


# -- cancellation ----------------------------------------------------------------------------------


def test_a_commit_that_has_begun_is_finished(postgresql_store: Store) -> None:
    """A cancellation that arrives during COMMIT waits until COMMIT has finished; no response is sent."""
    bench = Bench(postgresql_store)
    committing: list[asyncio.Task[Any]] = []
    cancelled_at: list[str] = []

    def on_commit(connection: Any) -> None:
        cancelled_at.append("commit")
        committing[0].cancel()

    event.listen(bench.db.engine.sync_engine, "commit", on_commit)

    async def scenario() -> None:
        committing.append(asyncio.create_task(bench.serve(sending(bench, insert("a"), START, LAST))))
        await asyncio.wait(committing)
        assert committing[0].cancelled()

    bench.run(scenario())
    assert (cancelled_at, postgresql_store.names(), bench.sent) == (["commit"], ["a"], [])


def test_a_timeout_in_a_middleware_rolls_back(store: Store) -> None:
    """asyncio.timeout() around the app cancels it, and a success response of the middleware does not save its work."""
    bench = Bench(store)

    async def hanging(scope: Any, receive: Any, send: Any) -> None:
        await bench.db.session.run_sync(insert("lost"))
        await asyncio.Event().wait()

    inside = SessionScopeMiddleware(hanging, bench.db)

    async def timing(scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(0.2):
                await inside(scope, receive, send)
        except TimeoutError:
            await sending(bench, insert("lost, too"), START, LAST)(scope, receive, send)

    bench.run(bench.serve(timing, layers=1))
    assert [message for message, _ in bench.sent] == ["start", "body"]
    assert store.names() == []


def test_a_statement_that_timed_out_is_no_success(postgresql_store: Store) -> None:
    """A request that swallows the timeout of a statement receives an error, and nothing is committed."""
    bench = Bench(postgresql_store)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        from sqlalchemy import text

        await bench.db.session.run_sync(insert("lost"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await bench.db.session.execute(text("SELECT pg_sleep(5)"))
        await sending(bench, START, LAST)(scope, receive, send)

    with pytest.raises((PendingRollbackError, SessionPluginError)) as refusal:
        bench.run(bench.serve(app))
    assert not isinstance(refusal.value, ConcurrentUseError)
    assert (bench.sent, postgresql_store.names()) == ([], [])


def test_shutdown_during_a_request_rolls_back(store: Store) -> None:
    """A request that the server cancels at shutdown is rolled back, and its connection is released."""
    site = Site(store)
    reached = threading.Event()

    @site.app.get("/")
    async def hanging() -> None:
        await site.db.session.run_sync(insert("lost"))
        reached.set()
        await asyncio.Event().wait()

    with site.running():
        site._server.config.timeout_graceful_shutdown = 0.1
        with site.connect() as connection:
            connection.request("GET", "/")
            assert reached.wait(10)
            site.stop()
    assert store.names() == []


def test_the_session_of_a_cancelled_sync_endpoint_is_closed(file_store: Store) -> None:
    """The thread of a cancelled sync endpoint works on, but its session then raises `ScopeClosedError`."""
    database = Database(file_store.url.replace("aiosqlite", "pysqlite"), **POOL)
    gate = Gate()
    outcome: list[Any] = []
    file_store.clear()

    def endpoint() -> None:
        session = database.session
        insert("lost")(session)
        gate.pass_through()
        try:
            insert("later")(session)
        except Exception as error:
            outcome.append(type(error).__name__)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await anyio.to_thread.run_sync(endpoint)

    async def scenario() -> None:
        task = asyncio.create_task(SessionScopeMiddleware(app, database)({**HTTP}, None, None))  # type: ignore[arg-type]
        await asyncio.to_thread(gate.reached.wait, 10)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        gate.opened.set()
        assert await asyncio.to_thread(wait_for, lambda: outcome) == ["ScopeClosedError"]

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert database.engine.pool.checkedout() == 0
    assert file_store.names() == []
    database.dispose()


def test_a_sync_unit_of_work_holds_a_permit_while_in_a_transaction(file_store: Store) -> None:
    """A sync unit of work holds a permit while it is in a transaction, and returns it when it settles."""
    database = Database(file_store.url.replace("aiosqlite", "pysqlite"), **POOL)
    held: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(count, database.session)
        held.append(database._unit_of_work().permit)
        await send(START)
        held.append(database._unit_of_work().permit)
        await send(LAST)

    async def ignore(message: Any) -> None:
        pass

    asyncio.run(SessionScopeMiddleware(app, database)({**HTTP}, None, ignore))  # type: ignore[arg-type]
    assert [permit is not None for permit in held] == [True, False]
    database.dispose()


# -- servers ---------------------------------------------------------------------------------------


def test_two_requests_on_one_connection_have_separate_units_of_work(file_store: Store) -> None:
    """Two requests on one kept-alive connection have separate units of work."""
    site = Site(file_store)
    sessions: list[Any] = []

    @site.app.get("/{name}")
    async def endpoint(name: str) -> None:
        sessions.append(site.db.session)
        await site.db.session.run_sync(insert(name))
        if name == "doomed":
            site.db.doom()

    with site.running(), site.connect() as connection:
        for name in ("doomed", "kept"):
            assert site.exchange(connection, f"/{name}").status == 200
    assert sessions[0] is not sessions[1]
    assert file_store.names() == ["kept"]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_a_stream_on_each_http_parser(file_store: Store, http: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose commit fails is incomplete on the wire, with h11 as well as with httptools."""
    site = Site(file_store)
    config = uvicorn.Config
    monkeypatch.setattr(uvicorn, "Config", lambda *args, **options: config(*args, http=http, **options))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        work = add_orphan if scope["path"] == "/refused" else insert("kept")
        await sending_on(site.db, START, PART, work, LAST)(scope, receive, send)

    site.app.mount("/", app)
    with site.running():
        assert (site.get("/kept").complete, site.get("/refused").complete) == (True, False)
    assert file_store.names() == ["kept"]


def sending_on(db: Any, *steps: Any) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for step in steps:
            if callable(step):
                await db.session.run_sync(step)
            else:
                await send(step)

    return app


@pytest.mark.parametrize("cancelled", [True, False])
def test_shutdown_beside_a_request(file_store: Store, cancelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At shutdown, the pool is disposed of after a running request has ended, or after a time limit."""
    monkeypatch.setattr("session_plugin.asgi.middleware.LONGEST_WAIT", math.inf if cancelled else 0.05)

    async def scenario() -> None:
        db = AsyncDatabase(file_store.url, **POOL)
        opened, closed = [], []
        event.listen(db.engine.sync_engine, "connect", lambda connection, record: opened.append(connection))
        event.listen(db.engine.sync_engine, "close", lambda connection, record: closed.append(connection))
        event.listen(db.engine.sync_engine, "rollback", lambda connection: await_only(asyncio.sleep(0.1)))
        reached, shut_down = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await send({"type": "lifespan.startup.complete"})
                await shut_down.wait()
                await send({"type": "lifespan.shutdown.complete"})
                return
            if cancelled:
                await db.session.run_sync(insert("lost"))
            reached.set()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                assert len(closed) == len(opened) == cancelled

        middleware: Any = SessionScopeMiddleware(app, db)
        lifespan = asyncio.create_task(middleware({"type": "lifespan"}, None, send))
        request = asyncio.create_task(middleware({**HTTP}, None, None))
        await reached.wait()
        if cancelled:
            request.cancel()
        shut_down.set()
        await asyncio.wait_for(lifespan, 10)
        request.cancel()
        await asyncio.wait([request])

    asyncio.run(scenario())


def test_a_request_can_be_closed_in_another_context() -> None:
    """A coroutine of a request can be closed in another context without an error."""
    db = Database("sqlite://")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def nothing(message: Any = None) -> Any:
        raise AssertionError

    async def main() -> None:
        request = SessionScopeMiddleware(app, db)({**HTTP}, nothing, nothing)
        contextvars.copy_context().run(request.send, None)
        request.close()

    asyncio.run(main())
    db.dispose()
