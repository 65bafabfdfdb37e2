"""`anyio.from_thread` in what a sync session runs when it ends under ASGI: hooks and listeners."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.from_thread
import pytest
from anyio import to_thread
from fastapi import BackgroundTasks, Depends
from fastapi.responses import StreamingResponse
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from session_plugin import Database, Outcome
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.database.interface import core_of
from session_plugin.scope import ending, threads
from session_plugin.scope.opening import open_unit_of_work
from session_plugin.scope.session import ScopeSession, runs_listeners
from session_plugin.scope.threads import WORKERS, in_anyio_thread
from session_plugin.starlette import SessionPlugin

from .asgi_site import SYNC_DRIVERS, Gate, Site, stores
from .contract import errors
from .harness import Base, Parent, Store, add_orphan, count, insert, wait_for
from .test_threads import start_no_thread

store = stores(SYNC_DRIVERS)
file_store = stores(["sqlite+pysqlite"])


class Calls:
    """Calls of the event loop from sync code, and in which thread it ran."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.threads: list[str] = []

    def make(self, name: str, *args: Any) -> None:
        """Call the event loop in both ways; args are those of a listener."""
        self.threads.append(threading.current_thread().name)
        anyio.from_thread.check_cancelled()
        self.made += [anyio.from_thread.run(self._on_the_loop, name), anyio.from_thread.run_sync(len, name)]

    async def _on_the_loop(self, name: str) -> str:
        await anyio.sleep(0)
        asyncio.get_running_loop()
        return name

    def taken(self) -> list[Any]:
        made, self.made = self.made, []
        return made


def test_hooks(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """They reach the event loop as endpoints do, wherever the transaction ends; after an error too."""
    site = Site(store, sync=True)
    calls, db = Calls(), site.db
    SessionDep = Annotated[Session, Depends(db.get_session)]

    def work(name: str) -> None:
        insert(name)(db.session)
        db.on_commit(calls.make, f"{name} committed")
        db.on_rollback(calls.make, f"{name} rolled back")

    @site.app.get("/commit")
    def commits(session: SessionDep) -> None:
        work("tea")

    @site.app.get("/explicit")
    def commits_by_itself() -> None:
        work("milk")
        db.session.commit()

    @site.app.get("/rollback")
    def rolls_back() -> None:
        work("lost")
        raise KeyError

    @site.app.get("/async")
    async def commits_on_the_loop(session: SessionDep) -> None:
        work("coffee")

    @site.app.get("/stream")
    def streams() -> Any:
        def body() -> Any:
            work("juice")
            yield "x"

        return StreamingResponse(body())

    @site.app.get("/background")
    def background(tasks: BackgroundTasks) -> None:
        tasks.add_task(work, "water")

    @site.app.get("/unused")
    async def registers_only(session: SessionDep) -> None:
        db.on_commit(calls.make, "unused")

    @site.app.get("/begun")
    async def begins_only(session: SessionDep) -> None:
        session.begin()
        db.on_rollback(calls.make, "begun")
        db.doom("a test asked for this")

    with site.running():
        for path, name in {
            "commit": "tea committed",
            "explicit": "milk committed",
            "rollback": "lost rolled back",
            "async": "coffee committed",
            "stream": "juice committed",
            "background": "water committed",
            "unused": "unused",
            "begun": "begun",
        }.items():
            site.get(f"/{path}")
            assert wait_for(lambda: len(calls.made) == 2), path
            assert calls.taken() == [name, len(name)], path
    assert "AnyIO" in calls.threads[0]
    assert [error for error in errors(caplog) if "hook" in error] == []


@pytest.mark.parametrize("target", ["session class", "session", "sessionmaker"])
@pytest.mark.parametrize("name", ["before_commit", "after_commit"])
def test_listeners_of_the_session(store: Store, target: str, name: str) -> None:
    """Listeners of the session that ends reach the event loop, whether it has sent a statement or not."""

    class OwnSession(Session):
        pass

    engine = create_engine(store.url)
    maker = sessionmaker(engine, class_=OwnSession)
    site, calls = Site(store, sync=True), Calls()
    site.db = db = SessionPlugin(maker)
    SessionDep = Annotated[Session, Depends(db.get_session)]

    def listener(*args: Any) -> None:
        calls.make("listener")

    if target != "session":
        event.listen({"session class": OwnSession, "sessionmaker": maker}[target], name, listener)

    @site.app.get("/{kind}")
    async def endpoint(kind: str, session: SessionDep) -> None:
        if target == "session":
            event.listen(session, name, listener)
        {"insert": insert(kind), "begin": Session.begin}[kind](session)

    with site.running():
        for kind in ["insert", "begin"]:
            assert site.get(f"/{kind}").status == 200
            assert calls.taken() == ["listener", 8], kind
    engine.dispose()


def test_listeners_of_a_flush(store: Store) -> None:
    """Listeners of the session and of a mapper that run in the last flush reach the event loop."""
    site, calls = Site(store, sync=True), Calls()
    db = site.db

    @site.app.get("/{name}")
    async def endpoint(name: str, session: Annotated[Session, Depends(db.get_session)]) -> None:
        session.add(Parent(name=name))

    before_flush = partial(calls.make, "flush")
    after_insert = partial(calls.make, "insert")
    event.listen(Session, "before_flush", before_flush)
    try:
        with site.running():
            assert site.get("/tea").status == 200
            assert calls.taken() == ["flush", 5]
            event.remove(Session, "before_flush", before_flush)
            event.listen(Parent, "after_insert", after_insert)
            assert site.get("/milk").status == 200
            assert calls.taken() == ["insert", 6]
    finally:
        event.remove(Parent, "after_insert", after_insert)


def test_without_listeners(file_store: Store) -> None:
    """A session without listeners of the user, and with rows to write, needs no thread of anyio."""
    db = Database(file_store.url, metadata=Base.metadata)
    with db.session_scope() as session:
        assert not runs_listeners(session)
        session.add(Parent(name="lost"))
        assert not runs_listeners(session)
        session.flush()
        assert not runs_listeners(session)
        session.rollback()
    assert not runs_listeners(ScopeSession())
    db.dispose()


def test_starlette_and_the_bare_middleware(file_store: Store) -> None:
    """Hooks reach the event loop in each adapter."""
    calls = Calls()

    def endpoint(db: Any, request: Any) -> Any:
        insert("tea")(db.session)
        db.on_commit(calls.make, "hook")
        return PlainTextResponse("done")

    plugin = SessionPlugin(file_store.url)
    database = Database(file_store.url)
    app = Starlette(routes=[Route("/", partial(endpoint, plugin))])
    plugin.init_app(app)
    bare = SessionScopeMiddleware(Starlette(routes=[Route("/", partial(endpoint, database))]), database)

    for served in [app, bare]:
        file_store.clear()
        site = Site(file_store, served, sync=True)
        site.start()
        try:
            assert site.get().status == 200
        finally:
            site.stop()
        assert calls.taken() == ["hook", 4]
        assert file_store.names() == ["tea"]
    plugin.dispose()
    database.dispose()


def test_hooks_do_not_wait_for_the_threads_of_endpoints(file_store: Store) -> None:
    """A request ends, with its hooks, while endpoints hold every thread that anyio allows."""
    site, calls, gate = Site(file_store, sync=True), Calls(), Gate()
    held = threading.Semaphore(0)

    @site.app.get("/hold")
    def hold() -> None:
        held.release()
        gate.pass_through()

    @site.app.get("/hook")
    async def hook(session: Annotated[Session, Depends(site.db.get_session)]) -> None:
        insert("tea")(session)
        site.db.on_commit(calls.make, "hook")

    async def all_threads() -> int:
        return int(to_thread.current_default_thread_limiter().total_tokens)

    site.app.get("/threads")(all_threads)
    with site.running():
        limit = site.get("/threads").json
        with ThreadPoolExecutor(limit) as clients:
            holding = [clients.submit(site.get, "/hold") for _ in range(limit)]
            for _ in holding:
                assert held.acquire(timeout=20)
            try:
                assert site.get("/hook").status == 200
                assert calls.taken() == ["hook", 4]
            finally:
                gate.opened.set()


def test_failed_commits(store: Store) -> None:
    """The error of a COMMIT in such a thread is the response, and the rollback hooks reach the event loop."""
    site, calls = Site(store, sync=True), Calls()

    @site.app.exception_handler(IntegrityError)
    async def conflict(request: Any, error: Any) -> Any:
        return PlainTextResponse("conflict", 409)

    @site.app.get("/")
    def endpoint() -> None:
        add_orphan(site.db.session)
        site.db.on_rollback(calls.make, "hook")
        site.db.on_commit(calls.make, "no hook")

    with site.running():
        assert site.get().status == 409
    assert calls.taken() == ["hook", 4]


# -- what becomes of the task that waits for anyio's thread -----------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_a_cancelled_request(file_store: Store, native: bool) -> None:
    """The COMMIT and the hooks of a request that is cancelled are awaited, by anyio or by the task itself."""
    file_store.clear()
    db, calls, gate = Database(file_store.url), Calls(), Gate()
    scopes: list[anyio.CancelScope] = []

    def hook() -> None:
        gate.pass_through()
        calls.make("hook")

    async def request() -> None:
        unit = open_unit_of_work(core_of(db), origin="test")
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            try:
                await to_thread.run_sync(insert("tea"), unit.session)
                unit.add_hook("commit", hook)
                await ending.asettle(unit, Outcome())
            finally:
                calls.made.append("settled")
                await ending.aclose(unit)

    async def scenario() -> None:
        task = asyncio.create_task(request())
        await asyncio.to_thread(gate.reached.wait, 10)
        if native:
            task.cancel()
        else:
            scopes[0].cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.wait([task])
        assert task.cancelled() == native

    asyncio.run(scenario())
    assert calls.taken() == ["hook", 4, "settled"]
    assert file_store.names() == ["tea"]
    db.dispose()


def test_a_cancelled_task_does_not_stop_the_call() -> None:
    """An event loop that ends cancels all of its tasks; a COMMIT that has begun is awaited all the same."""
    gate = Gate()

    def call() -> str:
        gate.pass_through()
        return "made"

    async def scenario() -> None:
        made = in_anyio_thread(call, can_wait=False)
        await asyncio.to_thread(gate.reached.wait, 10)
        [carrier] = threads._carriers
        carrier.cancel()
        await asyncio.wait([carrier])
        assert not made.done()
        gate.opened.set()
        assert await made == "made"

    asyncio.run(scenario())
    assert not threads._carriers


def test_a_task_that_is_cancelled_while_it_waits() -> None:
    """Its call is made in another thread, in the context of the caller."""
    gate = Gate()

    async def scenario() -> None:
        blocked = [in_anyio_thread(gate.pass_through, can_wait=True) for _ in range(WORKERS)]
        await asyncio.to_thread(gate.reached.wait, 10)
        before = set(threads._carriers)
        made = in_anyio_thread(lambda: threading.current_thread().name, can_wait=True)
        [carrier] = threads._carriers - before
        for _ in range(10):
            await asyncio.sleep(0)  # until it waits for the limiter
        carrier.cancel()
        assert "session_plugin" in await made
        gate.opened.set()
        await asyncio.gather(*blocked)

    asyncio.run(scenario())


def test_a_call_that_waits_for_another_one() -> None:
    """A hook may call its own app in the event loop, where units of work with hooks end too, in any number."""
    full = threading.Barrier(WORKERS)

    async def inside(can_wait: bool) -> str:
        return await in_anyio_thread(lambda: threading.current_thread().name, can_wait=can_wait)

    def call(can_wait: bool) -> str:
        full.wait(10)
        return anyio.from_thread.run(asyncio.wait_for, inside(can_wait), 10)

    async def scenario() -> None:
        for can_wait in (False, True):
            calls = [in_anyio_thread(partial(call, can_wait), can_wait=can_wait) for _ in range(WORKERS)]
            assert all("AnyIO" in name for name in await asyncio.gather(*calls))
        assert not threads._in_worker.get()

    asyncio.run(scenario())


def test_no_thread_of_anyio_can_be_started(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The call is made in another thread, and without any thread on the event loop."""

    async def scenario() -> None:
        start_no_thread(monkeypatch, "AnyIO")
        assert "session_plugin" in await in_anyio_thread(lambda: threading.current_thread().name, can_wait=True)
        start_no_thread(monkeypatch, "session_plugin")
        monkeypatch.setattr(threads, "_executors", {})
        made = in_anyio_thread(lambda: threading.current_thread(), can_wait=True)
        assert await made is threading.main_thread()

    with caplog.at_level(logging.WARNING, "session_plugin"):
        asyncio.run(scenario())
    assert "No thread could be started" in caplog.text


def test_without_anyio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has imported it, hooks run in a thread all the same."""
    monkeypatch.delitem(threads.sys.modules, "anyio.to_thread")

    async def scenario() -> None:
        assert "session_plugin" in await in_anyio_thread(lambda: threading.current_thread().name, can_wait=True)

    asyncio.run(scenario())


def test_a_crowd_with_hooks(store: Store) -> None:
    """More requests than connections and threads, each with a hook that queries and calls the event loop."""
    site, calls = Site(store, sync=True), Calls()

    def hook() -> None:
        assert count(site.db.session) >= 1
        calls.make("hook")

    @site.app.get("/{name}")
    def endpoint(name: str) -> None:
        insert(name)(site.db.session)
        site.db.on_commit(hook)

    with site.running(), ThreadPoolExecutor(60) as clients:
        replies = list(clients.map(lambda number: site.get(f"/{number:03}").status, range(60)))
    assert replies == [200] * 60
    assert calls.taken().count("hook") == 60
    with site.store.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM parent")) == 60
