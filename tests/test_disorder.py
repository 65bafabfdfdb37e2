"""The promises hold for apps and servers that call in any order.

Hypothesis generates programs of what an app does, and servers that are strict, lenient, or disconnected, with or
without reporting it.  A `Ledger` follows each run: from what the app did and what the server received,
it computes what the database must contain at each moment.

``HYPOTHESIS_PROFILE=long`` searches for minutes; the default runs a few programs, always the same ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from session_plugin import AsyncDatabase, Database
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.database.interface import core_of
from session_plugin.scope.current import find
from session_plugin.wsgi import SessionScopeMiddleware as WSGIMiddleware

from .harness import POOL, Parent, Store, add_orphan, check_foreign_keys, insert
from .wsgi_site import new_environ

settings.register_profile(
    "quick",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("long", settings.get_profile("quick"), derandomize=False, max_examples=10_000)
PROFILE = settings.get_profile("long" if os.environ.get("HYPOTHESIS_PROFILE") == "long" else "quick")

ORPHAN = "orphan"


class AppError(Exception):
    """Raised by the apps of these tests."""


class Ledger:
    """Records what one request did, and computes what the database must contain.

    Attributes:
        kept: the rows that must be committed.
        pending: the rows of the open transaction.
        begun: whether a transaction is open.
        broken: whether a flush has failed without a rollback since.
        doomed: whether the unit of work must not commit.
        failed: whether the app raised an error, or a commit failed, before the response was complete.
        settled: whether settling has begun; a later ``session_scope()`` opens another unit of work.
        wrong: a message for each difference from what must hold.
    """

    def __init__(self, names: Callable[[], list[str]]) -> None:
        self._names = names
        self.kept: set[str] = set()
        self.pending: list[str] = []
        self.begun = self.broken = self.doomed = self.failed = self.settled = False
        self.waiting: list[tuple[str, str]] = []
        self.hooks_due: list[str] = []
        self.hooks_run: list[str] = []
        self.wrong: list[str] = []

    @property
    def can_commit(self) -> bool:
        return not (self.broken or self.doomed or ORPHAN in self.pending)

    @property
    def active(self) -> bool:
        return self.begun or bool(self.waiting)

    def did(self, name: str) -> None:
        self.begun = True
        self.pending.append(name)

    def end(self, *, commit: bool) -> None:
        """Record the end of the transaction."""
        if commit:
            self.kept.update(self.pending)
        self.hooks_due += [name for name, on in self.waiting if (on == "commit") == commit]
        self.waiting.clear()
        self.pending.clear()
        self.begun = self.broken = False

    def check(self, when: str) -> None:
        if (names := self._names()) != sorted(self.kept):
            self.wrong.append(f"{when}: the database holds {names} and must hold {sorted(self.kept)}")
        if self.hooks_run != self.hooks_due:
            self.wrong.append(f"{when}: the hooks {self.hooks_run} ran where {self.hooks_due} were due")


# -- what an app may do with its session ------------------------------------------------------------

WORK = ["add", "insert", "orphan", "same again", "commit", "rollback", "doom", "on_commit", "on_rollback"]
SCOPES = ["joined", "joined and failed", "new"]


def work(step: str, name: str, db: Any, ledger: Ledger) -> Callable[[Session], None]:
    """Return ``step`` as a function of a sync session, which records in the ledger what it did."""

    def do(session: Session) -> None:
        match step:
            case "add":
                session.add(Parent(name=name))
                ledger.did(name)
            case "insert":
                insert(name)(session)
                ledger.did(name)
            case "orphan":
                add_orphan(session)
                ledger.did(ORPHAN)
            case "same again":
                same_again(session)
            case "commit":
                commit(session)
            case "rollback":
                begun = session.in_transaction()
                session.rollback()
                if begun:
                    ledger.end(commit=False)
            case "doom":
                db.doom()
                ledger.doomed = True
            case _:
                if (ledger.settled or ledger.failed) and not session.in_transaction():
                    session.begin()  # a late hook without a transaction would run with whatever is settled next
                    ledger.begun = True
                register = db.on_commit if step == "on_commit" else db.on_rollback
                register(ledger.hooks_run.append, name)
                ledger.waiting.append((name, step.removeprefix("on_")))

    def same_again(session: Session) -> None:
        insert(name)(session)
        ledger.did(name)
        session.expunge_all()
        session.add(Parent(name=name))
        try:
            session.flush()
        except BaseException:
            ledger.broken = True
            raise

    def commit(session: Session) -> None:
        can_commit = ledger.can_commit or not (
            ledger.broken or ledger.pending
        )  # doomed, but there is nothing to commit
        try:
            session.commit()
        except BaseException:
            if session.in_transaction():
                ledger.broken = True
            else:
                ledger.end(commit=False)
            raise
        if not can_commit:
            ledger.wrong.append("a commit() passed that must not")
        ledger.end(commit=True)

    return do


class Databases:
    """A sync and an async database on one file, and a `Store` that inspects the file."""

    def __init__(self, folder: Any) -> None:
        self.store = Store("sqlite+aiosqlite", folder / "test.db")
        self.runner = asyncio.Runner()
        url = self.store.url
        self.databases: dict[str, Any] = {
            "async": AsyncDatabase(url, **POOL),
            "sync": Database(url.replace("aiosqlite", "pysqlite"), **POOL),
        }
        for database in self.databases.values():
            event.listen(sync_engine(database), "connect", prepare_connection)
        event.listen(self.store.engine, "connect", prepare_connection)

    def close(self) -> None:
        self.databases["sync"].dispose()
        self.runner.run(self.databases["async"].dispose())
        self.runner.close()
        self.store.engine.dispose()

    def check_nothing_is_left(self, database: Any) -> None:
        assert sync_engine(database).pool.checkedout() == 0
        assert self.store.open_transactions() == []
        assert find(core_of(database)) is None


def sync_engine(database: Any) -> Any:
    return getattr(database.engine, "sync_engine", database.engine)


def prepare_connection(connection: Any, record: Any) -> None:
    check_foreign_keys(connection, record)
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=OFF")
    cursor.close()


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    databases = Databases(tmp_path_factory.mktemp("disorder"))
    gc.collect()  # so that later collections find garbage of these tests only
    yield databases
    databases.close()


# -- ASGI ------------------------------------------------------------------------------------------

MESSAGES: dict[str, dict[str, Any]] = {
    "200": {"type": "http.response.start", "status": 200, "headers": []},
    "204": {"type": "http.response.start", "status": 204},
    "404": {"type": "http.response.start", "status": 404, "headers": []},
    "500": {"type": "http.response.start", "status": 500, "headers": []},
    "200 of 8 bytes": {"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"8")]},
    "200 with trailers": {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
    "part": {"type": "http.response.body", "body": b"part", "more_body": True},
    "empty part": {"type": "http.response.body", "more_body": True},
    "last": {"type": "http.response.body", "body": b"last"},
    "trailers": {"type": "http.response.trailers", "headers": []},
    "more trailers": {"type": "http.response.trailers", "headers": [], "more_trailers": True},
    "unheard of": {"type": "http.response.unheard_of"},
}
RAISED: dict[str, type[BaseException]] = {"raise": AppError, "raise CancelledError": asyncio.CancelledError}

asgi_steps = st.one_of(
    st.sampled_from(list(MESSAGES)),
    st.sampled_from(WORK + SCOPES),
    st.sampled_from(["insert", "in a task", "receive", *RAISED]),
)


def programs(steps: st.SearchStrategy[str], start: str, *ends: str) -> st.SearchStrategy[list[str]]:
    """Programs of steps in any order, and orderly programs with a few additional steps."""
    few = st.lists(steps, max_size=3)
    works = st.sampled_from([[], ["insert"]])
    orderly = [st.just([start]), works, few, *(part for end in ends for part in (st.just([end]), works, few))]
    return st.lists(steps, max_size=9) | st.tuples(works, few, *orderly).map(lambda parts: [*chain(*parts)])


class ASGIServer:
    """Reports each message to the ledger, and behaves as its arguments say.

    A strict server raises at a message out of order.  From message number ``fails_at`` on, the client is disconnected:
    receive() returns a disconnect if ``sends_disconnect``, and otherwise send() raises.
    """

    def __init__(self, ledger: Ledger, *, strict: bool, fails_at: int, sends_disconnect: bool) -> None:
        self.ledger = ledger
        self.strict, self.fails_at, self.sends_disconnect = strict, fails_at, sends_disconnect
        self.messages = 0
        self.status: int | None = None
        self.trailers = False
        self.complete = False

    @property
    def left(self) -> bool:
        return self.messages >= self.fails_at

    async def receive(self) -> Any:
        if self.left and self.sends_disconnect:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Any) -> None:
        await asyncio.sleep(0)
        in_order = self._note(message)
        self.ledger.check(f"message {self.messages}, {message}")
        self.messages += 1
        if not self.sends_disconnect and self.messages > self.fails_at:
            raise OSError("the client has left")
        if self.strict and not in_order:
            raise RuntimeError(f"unexpected {message}")

    def _note(self, message: Any) -> bool:
        ledger, kind = self.ledger, message["type"]
        started = self.status is not None
        in_order = not self.complete and (kind == "http.response.start") != started
        if self.complete:
            return False
        if kind == "http.response.start":
            self.status = max(message["status"], self.status or 0)
            self.trailers = message.get("trailers", False)
            ledger.settled = True
            self._end(left=False)
        elif started and self._is_last(message):
            self._end(left=self.left and self.sends_disconnect and ledger.active)
            self.complete = True
        return in_order

    def _end(self, *, left: bool) -> None:
        assert self.status is not None
        success = self.status < 400 and not self.ledger.failed and not left
        if success and not self.ledger.can_commit and not self.ledger.doomed:
            self.ledger.wrong.append("a success was told of what cannot commit")
        self.ledger.end(commit=success and self.ledger.can_commit)

    def _is_last(self, message: Any) -> bool:
        if message["type"] == "http.response.trailers":
            return not message.get("more_trailers", False)
        return message["type"] == "http.response.body" and not (self.trailers or message.get("more_body", False))


class ASGIApp:
    """Performs a program; ``swallows`` are the exceptions of its steps that it ignores."""

    def __init__(self, program: list[str], database: Any, server: ASGIServer, swallows: Any) -> None:
        self.program, self.database, self.swallows = program, database, swallows
        self.server, self.ledger = server, server.ledger

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        ledger = self.ledger
        try:
            await self.perform(receive, send)
        except BaseException:
            ledger.end(commit=False)
            ledger.failed = ledger.failed or not self.server.complete
            raise
        ledger.end(commit=self.server.complete and ledger.can_commit)

    async def perform(self, receive: Any, send: Any) -> None:
        in_a_task = False
        for number, step in enumerate(self.program):
            with contextlib.suppress(*self.swallows):
                if step in MESSAGES:
                    await self.send(send, dict(MESSAGES[step]), in_a_task)
                elif step in RAISED:
                    raise RAISED[step]
                elif step == "receive":
                    await receive()
                elif step in SCOPES:
                    await self.open_scope(step, f"{number}")
                elif step in WORK:
                    await self.run(work(step, f"{number}", self.database, self.ledger), self.database.session)
            in_a_task = step == "in a task"

    async def send(self, send: Any, message: Any, in_a_task: bool) -> None:
        ledger = self.ledger
        try:
            await (asyncio.create_task(send(message)) if in_a_task else send(message))
        except BaseException as error:
            if type(error).__name__ == "Refused":
                if ledger.can_commit and not ledger.failed:
                    ledger.wrong.append(f"{message} was refused: {error.__cause__!r}")
                ledger.failed = ledger.settled = True
                await self.run(lambda session: session.rollback(), self.database.session)  # as a layer may have done
                ledger.end(commit=False)
            raise

    async def run(self, do: Any, session: Any) -> None:
        if core_of(self.database).is_async:
            await session.run_sync(do)
        else:
            do(session)

    async def open_scope(self, step: str, name: str) -> None:
        ledger, new = self.ledger, step == "new"
        is_new = new or ledger.settled
        if is_new and ledger.begun:
            return  # SQLite allows one writer at a time
        block = self.database.session_scope(new=new)
        try:
            async with block if core_of(self.database).is_async else in_async(block) as session:
                await self.run(insert(name), session)
                if not is_new:
                    ledger.did(name)
                if step == "joined and failed":
                    raise AppError
        except BaseException:
            ledger.doomed = ledger.doomed or not is_new
            raise
        if is_new:
            ledger.kept.add(name)


@contextlib.asynccontextmanager
async def in_async(block: Any) -> Any:
    with block as value:
        yield value


async def passing(app: Any, scope: Any, receive: Any, send: Any) -> None:
    await app(scope, receive, send)


async def beside(app: Any, scope: Any, receive: Any, send: Any) -> None:
    await asyncio.create_task(app(scope, receive, send))


async def inside_an_except_block(app: Any, scope: Any, receive: Any, send: Any) -> None:
    try:
        raise KeyError
    except KeyError:
        await app(scope, receive, send)


async def answering(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Send an error response if the app raises before the first byte, as frameworks do."""
    started = False

    async def note(message: Any) -> None:
        nonlocal started
        started = started or message["type"] == "http.response.start"
        await send(message)

    try:
        await app(scope, receive, note)
    except Exception:
        if started:
            raise
        await send(MESSAGES["500"])
        await send(MESSAGES["last"])


async def swallowing(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Send a success response if the app raises, as no middleware should."""
    with contextlib.suppress(Exception):
        await app(scope, receive, send)
    with contextlib.suppress(RuntimeError, OSError):
        await send(MESSAGES["200"])
        await send(MESSAGES["last"])


MIDDLEWARES = {
    "passing": passing,
    "beside": beside,
    "in except": inside_an_except_block,
    "answering": answering,
    "swallowing": swallowing,
}


@pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active transaction")  # by "add", rightly
@pytest.mark.parametrize("kind", ["async", "sync"])
@PROFILE
@given(
    program=programs(asgi_steps, "200", "last"),
    layers=st.lists(st.sampled_from(list(MIDDLEWARES)), min_size=0, max_size=2),
    swallows=st.sampled_from([(), (Exception,), (BaseException,)]),
    strict=st.booleans(),
    fails_at=st.sampled_from([99, 99, 0, 1, 2, 3]),
    sends_disconnect=st.booleans(),
)
def test_asgi(
    databases: Databases, kind: str, program: list[str], layers: list[str], swallows: Any, **server: Any
) -> None:
    """The ledger's rules hold under ASGI for any messages in any order, and for any server."""
    database, ledger = databases.databases[kind], Ledger(databases.store.names)
    served = ASGIServer(ledger, **server)
    app: Any = SessionScopeMiddleware(ASGIApp(program, database, served, swallows), database)
    for name in layers:
        app = SessionScopeMiddleware(partial(MIDDLEWARES[name], app), database)

    async def serve() -> BaseException | None:
        try:
            await asyncio.wait_for(
                app({"type": "http", "method": "POST", "path": "/"}, served.receive, served.send), 20
            )
        except BaseException as error:
            return error
        finally:
            assert find(core_of(database)) is None
        return None

    databases.store.clear()
    error = databases.runner.run(serve())
    ledger.check("the end")
    assert ledger.wrong == []
    assert type(error).__name__ != "Refused"
    databases.check_nothing_is_left(database)


# -- WSGI ------------------------------------------------------------------------------------------

STARTS = ["200", "404", "200 of 8 bytes", "200 anew", "500 anew"]
wsgi_steps = st.one_of(
    st.sampled_from([*STARTS, "yield", "yield nothing", "write", "raise"]),
    st.sampled_from(["insert", "add", "orphan", "same again", "doom"]),
    st.just("insert"),
)


class WSGIApp:
    """Performs a program, and ``closing`` in the ``close()`` of its body; records the rows of each phase."""

    def __init__(self, program: list[str], closing: list[str], database: Any, swallows: Any) -> None:
        self.program, self.closing, self.database, self.swallows = program, closing, database, swallows
        self.before_the_end: list[str] = []
        self.before_the_body: list[str] = []
        self.late: list[str] = []
        self.write: Any = None

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self.start_response: Any = start_response
        first = next((at for at, step in enumerate(self.program) if step.startswith("yield")), len(self.program))
        for _ in self.perform(0, first):
            raise AssertionError
        self.before_the_body = [*self.before_the_end]
        return WSGIBody(self, first)

    def perform(self, first: int, last: int | None = None) -> Iterator[bytes]:
        for number, step in list(enumerate(self.program))[first:last]:
            if step.startswith("yield"):
                yield b"part" if step == "yield" else b""
                continue
            with contextlib.suppress(*self.swallows):
                if step in STARTS:
                    self.start(step)
                elif step == "raise":
                    raise AppError
                elif step != "write":
                    self.work(step, f"{number}", self.before_the_end)
                elif self.write is not None:
                    self.write(b"part")

    def start(self, step: str) -> None:
        headers = [("Content-Length", "8")] if "bytes" in step else []
        try:
            raise AppError
        except AppError:
            exc_info = (sys.exc_info(),) if "anew" in step else ()
            self.write = self.start_response(f"{step[:3]} Status", headers, *exc_info)

    def work(self, step: str, name: str, did: list[str]) -> None:
        ledger = Ledger(list)
        work(step, name, self.database, ledger)(self.database.session)
        did += ledger.pending

    def close(self) -> None:
        for number, step in enumerate(self.closing):
            if step == "raise":
                raise AppError
            self.work(step, f"late {number}", self.late)


class WSGIBody:
    def __init__(self, app: WSGIApp, first: int) -> None:
        self.app, self.chunks = app, app.perform(first)

    def __iter__(self) -> Iterator[bytes]:
        return self.chunks

    def close(self) -> None:
        self.app.close()


class WSGIServer:
    """Reads ``reads`` chunks, with ``hops`` each in another thread, and then closes the body as ``closes`` says."""

    def __init__(self, names: Callable[[], list[str]], *, reads: int, closes: str, hops: bool) -> None:
        self.names = names
        self.reads, self.closes, self.hops = reads, closes, hops
        self.started: str | None = None
        self.status: int | None = None
        self.durable_at_start: list[str] = []
        self.complete = False

    def serve(self, app: Any) -> None:
        body: Any = None
        try:
            body = app(new_environ(), self.start_response)
            chunks = self.call(lambda: iter(body))
            for _ in range(self.reads):
                chunk = self.call(lambda: next(chunks, None))
                if chunk is None:
                    self.complete = self.send(b"") or True
                    break
                if chunk:
                    self.send(chunk)
        except Exception:
            if self.status is None:
                self.status = 500
        for _ in range(0 if body is None else {"never": 0, "once": 1, "twice": 2}[self.closes]):
            with contextlib.suppress(AppError, SQLAlchemyError):
                self.call(body.close)

    def call(self, call: Callable[[], Any]) -> Any:
        if not self.hops:
            return call()
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call).result()

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info is not None and self.status is not None:
            raise exc_info[1]
        self.started = status
        return self.send

    def send(self, data: bytes) -> None:
        assert self.started is not None
        if self.status is None:
            self.status, self.durable_at_start = int(self.started[:3]), self.names()


@pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active transaction")
@PROFILE
@given(
    program=programs(wsgi_steps, "200", "yield"),
    closing=st.lists(st.sampled_from(["insert", "orphan", "raise"]), max_size=2),
    swallows=st.sampled_from([(), (Exception,), (BaseException,)]),
    reads=st.sampled_from([99, 99, 99, 0, 1, 2]),
    closes=st.sampled_from(["once", "once", "twice", "never"]),
    hops=st.booleans(),
    handling=st.booleans(),
)
def test_wsgi(
    databases: Databases, program: list[str], closing: list[str], swallows: Any, handling: bool, **options: Any
) -> None:
    """Under WSGI, a response agrees with the database for any calls in any order, and for any server."""
    database = databases.databases["sync"]
    databases.store.clear()
    app = WSGIApp(program, closing, database, swallows)
    server = WSGIServer(databases.store.names, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        try:
            raise KeyError if handling else StopIteration
        except (KeyError, StopIteration):
            server.serve(WSGIMiddleware(app, database))
        app.write = app.start_response = None
        if options["closes"] == "never":
            gc.collect()
    assert all("was never closed and held a connection" in str(warning.message) for warning in caught)
    assert not caught or options["closes"] == "never"
    durable = {name for name in databases.store.names() if not name.startswith("late")}
    durable_at_start = set(server.durable_at_start)
    status = server.status or 0
    if status >= 400:
        assert not durable, "an error was told"
    elif status and "doom" not in program and not any("anew" in step for step in program):
        assert "write" in program or durable_at_start >= set(app.before_the_body), "a success was told too early"
        if server.complete and "200 of 8 bytes" not in program:  # what follows the declared last byte is late work
            assert durable == set(app.before_the_end), "a complete success was told"
    assert durable >= durable_at_start, "what was told is gone"
    assert find(core_of(database)) is None
    databases.check_nothing_is_left(database)
