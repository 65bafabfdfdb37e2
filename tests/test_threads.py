"""Many sync requests on a small pool: they are served at the pool's speed, and no permit or thread leaks."""

import asyncio
import gc
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pytest
from anyio import to_thread
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from pydantic import BaseModel, ConfigDict
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from session_plugin import ConfigurationError, Database, Outcome
from session_plugin.database.interface import core_of
from session_plugin.engines.semaphore import SPARE_THREADS, ExtraThreads, FairSemaphore
from session_plugin.exceptions import ScopeClosedError
from session_plugin.scope import ending, threads
from session_plugin.scope.current import Entered
from session_plugin.scope.opening import open_unit_of_work
from session_plugin.scope.permits import wait_for_permit, wait_for_place
from session_plugin.scope.threads import WORKERS, in_thread

from .asgi_site import Gate, Site, stores
from .harness import POOL, Base, Parent, Store, add, count, insert, wait_for

CROWD = 150

store = stores(["postgresql+psycopg"])


class ParentOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    name: str


def crowd_site(store: Store) -> Site:
    site = Site(store, sync=True)
    SessionDep = Annotated[Session, Depends(site.db.get_session)]

    @site.app.get("/add/{name}")
    def only_add(name: str, session: SessionDep) -> None:
        session.add(Parent(name=name))

    @site.app.get("/model/{name}", response_model=ParentOut)
    def response_model(name: str, session: SessionDep) -> Any:
        row = Parent(name=name)
        session.add(row)
        session.flush()
        return row

    def user(session: SessionDep) -> int:
        return count(session)

    @site.app.get("/dependency/{name}")
    def after_a_dependency(name: str, user: Annotated[int, Depends(user)], session: SessionDep) -> None:
        insert(name)(session)

    @site.app.get("/nothing")
    async def nothing() -> None:
        """Needs no database."""

    return site


@pytest.mark.parametrize("kind", ["add", "model", "dependency"])
def test_a_crowd_is_served_in_turn(store: Store, kind: str) -> None:
    """150 simultaneous sync requests on five connections all succeed, and requests without a database do not wait."""
    site = crowd_site(store)
    longest, began_all = 0.0, time.monotonic()
    with site.running(), ThreadPoolExecutor(CROWD) as clients:
        replies = [clients.submit(site.get, f"/{kind}/{number:03}") for number in range(CROWD)]
        while not all(reply.done() for reply in replies):
            began = time.monotonic()
            assert site.get("/nothing").status == 200
            longest = max(longest, time.monotonic() - began)
        assert [reply.result().status for reply in replies] == [200] * CROWD
        assert len(store.names()) == CROWD
    assert longest < max(2, (time.monotonic() - began_all) / 2)  # a busy machine takes long for the crowd itself


def test_the_dependency_waits_for_a_permit_before_it_takes_a_thread(store: Store) -> None:
    """An endpoint that gets its session from the dependency already has its permit."""
    site = Site(store, sync=True)

    @site.app.get("/")
    async def endpoint(session: Annotated[Session, Depends(site.db.get_session)]) -> bool:
        return site.db._unit_of_work().permit is not None

    with site.running():
        assert site.get().json is True


def test_the_naive_dependency_starves(store: Store) -> None:
    """With the dependency from FastAPI's documentation the same load ends in 500 responses, so it can starve."""
    engine = create_engine(store.url, **{**POOL, "pool_timeout": 0.5})
    make = sessionmaker(engine)
    site = Site(store, FastAPI())

    def get_db() -> Any:
        with make() as session:
            yield session

    def user(session: Annotated[Session, Depends(get_db)]) -> int:
        return count(session)

    @site.app.get("/")
    def endpoint(user: Annotated[int, Depends(user)], session: Annotated[Session, Depends(get_db)]) -> int:
        return count(session)

    with site.running(), ThreadPoolExecutor(CROWD) as clients:
        replies = list(clients.map(lambda _: site.get(), range(CROWD)))
    engine.dispose()
    assert 500 in {reply.status for reply in replies}


def test_permits_never_leak(store: Store) -> None:
    """A request returns its permit however it ends and whatever it did with its session."""
    site = Site(store, sync=True, pool_size=1, max_overflow=0, pool_timeout=3)
    SessionDep = Annotated[Session, Depends(site.db.get_session)]

    @site.app.get("/{how}")
    def endpoint(how: str, session: SessionDep, background: BackgroundTasks) -> None:
        if how == "unused":
            return
        count(session)
        if how == "error":
            raise KeyError
        if how == "rollback":
            session.rollback()
        if how == "commit":
            session.commit()
            count(session)
        if how == "closed":
            session.close()
        if how == "background":
            background.add_task(count, session)

    with site.running():
        for how in ("unused", "used", "error", "rollback", "commit", "closed", "background") * 2:
            assert (how, site.get(f"/{how}").status) == (how, 500 if how == "error" else 200)


def test_a_request_that_stops_waiting_returns_its_permit(store: Store) -> None:
    """If a request is cancelled while it waits, or just as it gets its permit, the next request in line is served."""
    site = Site(store, sync=True, pool_size=1, max_overflow=0, pool_timeout=3)
    permits = site.db.init_app(site.app) or core_of(site.db.database).semaphore

    async def scenario() -> None:
        release = await permits.acquire()
        assert release is not None
        waiting = [asyncio.create_task(permits.acquire()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        release()
        waiting[1].cancel()
        last = await asyncio.wait_for(waiting[2], 5)
        assert last is not None
        last()

    asyncio.run(scenario())
    site.db.dispose()


def test_permits_asked_for_twice_at_once(store: Store) -> None:
    """Two dependencies that wait at the same time for one unit of work take one permit.

    A dependency that still waits when its unit of work ends takes none.
    """
    database = Database(store.url, pool_size=2, max_overflow=0)

    async def scenario() -> None:
        permits = core_of(database).semaphore
        scope = open_unit_of_work(core_of(database), origin="test")
        first, second = await permits.acquire(), await permits.acquire()
        waiting = [asyncio.create_task(wait_for_permit(scope)) for _ in range(2)]
        await asyncio.sleep(0)
        assert first is not None and second is not None
        first()
        second()
        await asyncio.gather(*waiting)
        await ending.aclose(scope)
        all_back = [await asyncio.wait_for(permits.acquire(), 5) for _ in range(2)]
        late = open_unit_of_work(core_of(database), origin="test")
        beyond_the_end = asyncio.create_task(wait_for_permit(late))
        await asyncio.sleep(0)
        await ending.aclose(late)
        for release in all_back:
            assert release is not None
            release()
        await beyond_the_end
        for _ in range(2):
            await asyncio.wait_for(permits.acquire(), 5)

    asyncio.run(scenario())
    database.dispose()


def test_waiting_too_long_for_a_permit_raises_a_timeout() -> None:
    """A task or thread that waits too long gets SQLAlchemy's TimeoutError, and leaves the queue."""
    database = Database("sqlite://", pool_size=1, max_overflow=0, pool_timeout=0.05)
    permits = core_of(database).semaphore

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        limiter = to_thread.current_default_thread_limiter()
        threads = limiter.total_tokens
        threads_of_loop = ExtraThreads(loop, 5)
        release = await permits.acquire()
        assert release is not None
        with pytest.raises(PoolTimeoutError, match=r"pool_timeout of 0\.05 seconds"):
            await permits.acquire()
        with pytest.raises(PoolTimeoutError, match="all 1 connections of the pool are in use"):
            await asyncio.to_thread(permits.acquire_in_thread, threads_of_loop)
        assert not permits._queue
        async with asyncio.timeout(5):
            while limiter.total_tokens != threads:
                await asyncio.sleep(0.01)
        release()
        assert permits.acquire_in_thread(threads_of_loop) is None  # the event loop's own thread must not wait
        last = await asyncio.to_thread(permits.acquire_in_thread, threads_of_loop)
        assert last is not None
        with pytest.raises(PoolTimeoutError):  # there is only one permit, and it is taken
            await permits.acquire()

    asyncio.run(scenario())
    database.dispose()


def test_a_permit_that_comes_too_late_goes_to_the_next() -> None:
    """A permit that is handed over just as its receiver gives up goes to the next request."""
    permits = FairSemaphore(1, None)

    async def scenario() -> None:
        release = await permits.acquire()
        assert release is not None
        gives_up, next_one = (asyncio.create_task(permits.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        release()
        gives_up.cancel()
        assert await asyncio.wait_for(next_one, 5)
        with pytest.raises(asyncio.CancelledError):
            await gives_up

    asyncio.run(scenario())


def test_a_waiting_thread_does_not_count_against_anyios_limit() -> None:
    """A thread that waits for a permit raises anyio's thread limit, because holders may need a thread to release it."""
    permits = FairSemaphore(1, 5)

    async def scenario() -> None:
        to_thread.current_default_thread_limiter().total_tokens = 1
        release = await permits.acquire()
        assert release is not None
        waiting = asyncio.create_task(
            to_thread.run_sync(permits.acquire_in_thread, ExtraThreads(asyncio.get_running_loop(), 5))
        )
        while not permits._queue:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(3):
            await to_thread.run_sync(release)
        assert await waiting is not None

    asyncio.run(scenario())


def test_a_pool_without_a_limit_has_no_permits_to_give_back() -> None:
    """Where a pool has no limit, a worker thread never waits, and what it gives back is only its place."""
    permits = FairSemaphore(None, None)

    async def scenario() -> ExtraThreads:
        threads = ExtraThreads(asyncio.get_running_loop(), 5)
        for _ in range(3):
            give_back = await asyncio.to_thread(permits.acquire_in_thread, threads)
            assert give_back is not None
            assert threads._holding == 1
            await asyncio.to_thread(give_back)
        return threads

    threads = asyncio.run(scenario())
    assert threads._holding == 0
    assert permits._capacity is None


def test_a_waiting_thread_without_anyio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anyio, which limits threads, a thread can wait for a permit too."""
    monkeypatch.delitem(sys.modules, "anyio.to_thread")
    permits = FairSemaphore(1, 5)

    async def scenario() -> None:
        release = await permits.acquire()
        assert release is not None
        waiting = asyncio.create_task(
            asyncio.to_thread(permits.acquire_in_thread, ExtraThreads(asyncio.get_running_loop(), 5))
        )
        while not permits._queue:
            await asyncio.sleep(0.01)
        release()
        assert await waiting is not None

    asyncio.run(scenario())


@pytest.mark.parametrize("use", [count, lambda session: session.get_bind()])
def test_a_thread_that_outlives_its_request_keeps_no_permit(store: Store, use: Any) -> None:
    """A thread that waits for a connection when its request ends is refused, and the next request gets the permit."""
    database = Database(store.url, pool_size=1, max_overflow=0)

    async def scenario() -> None:
        holding, ended = (open_unit_of_work(core_of(database), origin="test") for _ in range(2))
        holding.loop = ended.loop = asyncio.get_running_loop()
        holding.permit = await core_of(database).semaphore.acquire()
        late = asyncio.create_task(asyncio.to_thread(use, ended.session))
        while not core_of(database).semaphore._queue:
            await asyncio.sleep(0.01)
        await ending.aclose(ended)
        await ending.aclose(holding)
        with pytest.raises(ScopeClosedError):
            await late
        release = await asyncio.wait_for(core_of(database).semaphore.acquire(), 5)
        assert release is not None

    asyncio.run(scenario())
    database.dispose()


def test_a_unit_of_work_with_a_connection_waits_for_no_permit() -> None:
    """A unit of work that has a connection waits for no permit when it continues in another thread.

    The thread of the event loop takes connections without a permit.
    """
    database = Database("sqlite://", pool_size=1, max_overflow=0, pool_timeout=0.1)

    async def scenario() -> None:
        scope = open_unit_of_work(core_of(database), origin="test")
        scope.loop = asyncio.get_running_loop()
        scope.session.execute(text("SELECT 1"))
        await core_of(database).semaphore.acquire()
        assert await asyncio.to_thread(scope.session.scalar, text("SELECT 42")) == 42
        await ending.aclose(scope)

    asyncio.run(scenario())
    database.dispose()


def test_a_unit_of_work_inside_one_with_a_permit_waits_for_none() -> None:
    """A unit of work inside one that has a permit waits for none, unless it belongs to another database."""
    first, other = (Database("sqlite://", pool_size=1, max_overflow=0, pool_timeout=0.1) for _ in range(2))

    async def scenario() -> None:
        outer = open_unit_of_work(core_of(first), origin="test")
        outer.loop = asyncio.get_running_loop()
        outer.permit = await core_of(first).semaphore.acquire()
        with Entered(outer):
            inside, beside = (
                open_unit_of_work(core_of(first), origin="test"),
                open_unit_of_work(core_of(other), origin="test"),
            )
        for scope in (inside, beside):
            assert await asyncio.to_thread(scope.session.scalar, text("SELECT 42")) == 42
        assert inside.permit is None
        assert beside.permit is not None
        for scope in (beside, inside, outer):
            await ending.aclose(scope)

    asyncio.run(scenario())
    first.dispose()
    other.dispose()


def test_a_thread_that_outlives_its_event_loop_changes_no_limit() -> None:
    loop = asyncio.new_event_loop()
    threads = ExtraThreads(loop, 5)
    loop.close()
    threads.count(waiting=1)
    del loop
    gc.collect()
    threads.count(waiting=-1)


def test_a_forked_child_starts_with_all_permits() -> None:
    """A forked child starts with all permits free; those held in the parent are returned in the parent only."""
    database = Database("sqlite://", pool_size=1, max_overflow=0)
    assert asyncio.run(core_of(database).semaphore.acquire()) is not None
    child = os.fork()
    if child == 0:
        os._exit(0 if core_of(database).semaphore._free == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    database.dispose()


def test_a_pool_without_a_limit_needs_no_permit() -> None:
    """`acquire()` returns None at once if the pool has no limit."""
    assert asyncio.run(FairSemaphore(None, None).acquire()) is None


def test_an_endpoint_on_a_pool_without_a_limit_holds_no_permit() -> None:
    """A unit of work that is about to be used on the event loop goes on at once, and has none to give back."""
    database = Database("sqlite://", poolclass=NullPool)

    async def scenario() -> None:
        scope = open_unit_of_work(core_of(database), origin="test")
        await wait_for_permit(scope)
        assert scope.permit is None
        assert scope.session.scalar(text("SELECT 1")) == 1
        await ending.aclose(scope)

    asyncio.run(scenario())
    database.dispose()


def test_calls_that_return_connections_do_not_queue_behind_waiting_calls() -> None:
    """A call that returns a connection runs even if every worker thread for calls that may wait is busy."""
    gate = threading.Event()

    async def scenario() -> None:
        blocked = [in_thread(lambda: gate.wait(10), can_wait=True) for _ in range(40)]
        try:
            assert await asyncio.wait_for(in_thread(lambda: "back", can_wait=False), 5) == "back"
        finally:
            gate.set()
        await asyncio.gather(*blocked)

    asyncio.run(scenario())


def test_settling_with_a_connection_does_not_queue_behind_waiting_calls(tmp_path: Path) -> None:
    """Settling a unit of work that holds a connection or permit does not wait for workers of calls that may wait.

    Settling one that still has to wait for a connection does not use the workers of the others.
    """
    db = Database(f"sqlite:///{tmp_path / 'shop.db'}", metadata=Base.metadata)
    db.create_all()

    async def end(name: str, *, permit: bool, connected: bool, beside: bool) -> None:
        """Settle while every worker is busy: those of calls that can wait (``beside``), or the others."""
        gate = threading.Event()
        scope = open_unit_of_work(core_of(db), origin="test")
        if permit:
            await wait_for_permit(scope)
        (insert if connected else add)(name)(scope.session)
        blocked = [in_thread(lambda: gate.wait(10), can_wait=beside) for _ in range(WORKERS)]
        try:
            await asyncio.wait_for(ending.asettle(scope, Outcome()), 5)
        finally:
            gate.set()
        assert scope.permit is None
        await asyncio.gather(*blocked)
        await ending.aclose(scope)

    async def main() -> None:
        await end("tea", permit=True, connected=False, beside=True)
        await end("milk", permit=False, connected=True, beside=True)
        await end("coffee", permit=False, connected=False, beside=False)

    asyncio.run(main())
    with db.session_scope() as session:
        assert count(session) == 3
    db.dispose()


@pytest.mark.parametrize("work", [None, add, insert])
def test_settling_returns_the_permit(tmp_path: Path, work: Any) -> None:
    """A permit, used or not, is returned when its unit of work is settled, before the body is sent.

    The permit of late work is returned at the close.  A unit of work that has a permit requests no second one.
    """
    db = Database(
        f"sqlite:///{tmp_path / 'shop.db'}", metadata=Base.metadata, pool_size=1, max_overflow=0, pool_timeout=0.1
    )
    db.create_all()

    async def main() -> None:
        scope = open_unit_of_work(core_of(db), origin="test")
        await wait_for_permit(scope)
        await wait_for_permit(scope)
        assert scope.permit is not None
        if work is not None:
            work("tea")(scope.session)
        await ending.asettle(scope, Outcome())
        assert scope.permit is None
        scope.loop = asyncio.get_running_loop()
        await asyncio.to_thread(count, scope.session)
        assert scope.permit is not None
        await ending.aclose(scope)
        assert scope.permit is None

    asyncio.run(main())
    db.dispose()


# -- sessions that were asked for and are not in use ---------------------------------------------------


@pytest.mark.parametrize("kind", ["def", "async"])
def test_those_who_only_ask_keep_nobody_waiting(store: Store, kind: str) -> None:
    """Many more than there are connections have a session and do not use it: the next one that does is served."""
    site = Site(store, sync=True, pool_size=2, max_overflow=0, pool_timeout=5)
    SessionDep = Annotated[Session, Depends(site.db.get_session)]
    asked: list[str] = []
    gate = threading.Event()

    @site.app.get("/def")
    def idle(session: SessionDep) -> None:
        asked.append("def")
        assert gate.wait(10)

    @site.app.get("/async")
    async def aidle(session: SessionDep) -> None:
        asked.append("async")
        while not gate.is_set():
            await asyncio.sleep(0.01)

    @site.app.get("/quick")
    def quick(session: SessionDep) -> int:
        return count(session)

    with site.running(), ThreadPoolExecutor(12) as clients:
        replies = [clients.submit(site.get, f"/{kind}") for _ in range(12)]
        try:
            assert wait_for(lambda: len(asked) == 12, 10)
            assert site.get("/quick").status == 200
        finally:
            gate.set()
        assert {reply.result().status for reply in replies} == {200}
        semaphore, pending = core_of(site.db).semaphore, core_of(site.db).pending_sessions
        assert wait_for(lambda: (semaphore._free, pending._free) == (2, 256))


def test_the_dependency_of_a_router_makes_nobody_wait(store: Store) -> None:
    """All connections are in use: an endpoint of the router that needs none is served, in a thread or not."""
    site = Site(store, sync=True, pool_size=1, max_overflow=0, pool_timeout=5)
    gate = Gate()
    router = APIRouter(dependencies=[Depends(site.db.get_session)])

    @router.get("/slow")
    def slow() -> int:
        rows = count(site.db.session)
        gate.pass_through()
        return rows

    @router.get("/version")
    def version() -> str:
        return "1.0"

    @router.get("/aversion")
    async def aversion() -> str:
        return "1.0"

    site.app.include_router(router)
    with site.running(), ThreadPoolExecutor(1) as clients:
        holding = clients.submit(site.get, "/slow")
        try:
            assert gate.reached.wait(10)
            assert [site.get(path).status for path in ("/version", "/aversion")] == [200, 200]
            assert not holding.done()
        finally:
            gate.opened.set()
        assert holding.result().status == 200


def test_slow_statements_on_a_large_pool_leave_threads_for_others(store: Store) -> None:
    """More of them than anyio has threads: an endpoint that needs a thread and no database is served."""
    site = Site(store, sync=True, pool_size=50, max_overflow=0)
    held = threading.Semaphore(0)
    gate = threading.Event()

    @site.app.get("/slow")
    def slow(session: Annotated[Session, Depends(site.db.get_session)]) -> None:
        count(session)
        held.release()
        assert gate.wait(20)

    @site.app.get("/ping")
    def ping() -> str:
        return "pong"

    with site.running(), ThreadPoolExecutor(45) as clients:
        replies = [clients.submit(site.get, "/slow") for _ in range(45)]
        try:
            assert all(held.acquire(timeout=10) for _ in range(45))
            assert site.get("/ping").status == 200
        finally:
            gate.set()
        assert {reply.result().status for reply in replies} == {200}


def test_extra_threads_have_a_limit() -> None:
    """One for each thread that waits, and one for each beyond a few that holds a connection; then no more."""

    async def scenario() -> None:
        limiter = to_thread.current_default_thread_limiter()
        own = limiter.total_tokens
        threads = ExtraThreads(asyncio.get_running_loop(), 4)

        async def allowed(**more: int) -> float:
            threads.count(**more)
            for _ in range(3):
                await asyncio.sleep(0)
            return limiter.total_tokens - own

        assert await allowed(waiting=2) == 2
        assert await allowed(holding=SPARE_THREADS) == 2
        assert await allowed(holding=1) == 3
        assert await allowed(waiting=2) == 4
        threads.count(waiting=-1)
        assert await allowed(waiting=-3) == 1  # two changes at once are one
        assert await allowed(holding=-1 - SPARE_THREADS) == 0

    asyncio.run(scenario())


def test_past_the_limit_of_pending_sessions_asking_waits() -> None:
    """Without a thread, until one of them gets its connection or ends; whoever waits too long is refused."""
    database = Database("sqlite://", max_pending_sessions=1, pool_timeout=0.05)
    core = core_of(database)

    async def scenario() -> None:
        first, second, third = (open_unit_of_work(core, origin="test") for _ in range(3))
        for unit in (first, second, third):
            unit.loop = asyncio.get_running_loop()
        await wait_for_place(first)
        await wait_for_place(first)
        with pytest.raises(PoolTimeoutError, match="max_pending_sessions"):
            await wait_for_place(second)
        core.pending_sessions._timeout = 30
        waiting = asyncio.create_task(wait_for_place(second))
        await asyncio.sleep(0)
        await asyncio.to_thread(first.session.execute, text("SELECT 1"))
        await waiting
        assert first.place is None
        assert second.place is not None
        leaves = asyncio.create_task(wait_for_place(third))
        await asyncio.sleep(0)
        await ending.aclose(third)
        await ending.aclose(second)
        await leaves
        await ending.aclose(first)
        assert core.pending_sessions._free == 1

    asyncio.run(scenario())
    database.dispose()


def test_places_asked_for_twice_at_once() -> None:
    """Two dependencies that wait side by side for the place of one session take one."""
    database = Database("sqlite://", max_pending_sessions=2)
    pending = core_of(database).pending_sessions

    async def scenario() -> None:
        unit = open_unit_of_work(core_of(database), origin="test")
        assert pending.take()
        assert pending.take()
        waiting = [asyncio.create_task(wait_for_place(unit)) for _ in range(2)]
        await asyncio.sleep(0)
        pending.release()
        pending.release()
        await asyncio.gather(*waiting)
        assert pending._free == 1
        await ending.aclose(unit)
        assert pending._free == 2

    asyncio.run(scenario())
    database.dispose()


@pytest.mark.parametrize("limit", [0, "many"])
def test_a_limit_of_pending_sessions_is_a_number(limit: Any) -> None:
    """Else the database says so when it is made."""
    with pytest.raises(ConfigurationError, match="max_pending_sessions must be an integer of at least 1"):
        Database("sqlite://", max_pending_sessions=limit)


def test_a_permit_that_is_not_used_is_given_back() -> None:
    """An endpoint on the event loop has waited for one, and then does something else; one in use stays."""
    database = Database("sqlite://", pool_size=2, max_overflow=0)
    semaphore = core_of(database).semaphore

    async def scenario() -> None:
        idle, used = (open_unit_of_work(core_of(database), origin="test") for _ in range(2))
        await wait_for_permit(idle)
        await wait_for_permit(used)
        used.session.execute(text("SELECT 1"))
        async with asyncio.timeout(5):
            while idle.permit is not None:
                await asyncio.sleep(0.01)
        assert semaphore._free == 1
        assert used.permit is not None
        await ending.aclose(used)
        await ending.aclose(idle)
        assert semaphore._free == 2

    asyncio.run(scenario())
    database.dispose()


def test_an_endpoint_on_the_event_loop_waits_before_it_runs(store: Store) -> None:
    """Its session could only wait in the thread of the loop; so does one that depends on a coroutine function."""
    site = Site(store, sync=True, pool_size=1, max_overflow=0, pool_timeout=5)
    SessionDep = Annotated[Session, Depends(site.db.get_session)]

    @site.app.get("/itself/{number}")
    async def itself(number: int, session: SessionDep) -> int:
        rows = count(session)
        await asyncio.sleep(0.001)  # with the connection, and in need of the loop
        return rows

    async def counted(session: SessionDep) -> int:
        rows = count(session)
        await asyncio.sleep(0.001)
        return rows

    @site.app.get("/dependency/{number}")
    def dependency(number: int, counted: Annotated[int, Depends(counted)]) -> int:
        return counted

    with site.running(), ThreadPoolExecutor(20) as clients:
        paths = [f"/{('itself', 'dependency')[number % 2]}/{number}" for number in range(20)]
        assert {reply.status for reply in clients.map(site.get, paths)} == {200}


# -- no thread to be had -------------------------------------------------------------------------------


def start_no_thread(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The process has reached its limit whenever a thread of that name is to be started."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if name in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_an_ending_without_a_thread_runs_where_it_is(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of the request is lost, and its connection and its permit are back."""
    monkeypatch.setattr(threads, "_executors", {})
    start_no_thread(monkeypatch, "session_plugin")
    site = Site(store, sync=True, pool_size=1, max_overflow=0, pool_timeout=5)
    SessionDep = Annotated[Session, Depends(site.db.get_session)]

    @site.app.get("/insert/{name}")
    def inserts(name: str, session: SessionDep) -> None:
        insert(name)(session)

    @site.app.get("/add/{name}")
    def adds(name: str, session: SessionDep) -> None:
        session.add(Parent(name=name))

    @site.app.get("/fails")
    def fails(session: SessionDep) -> None:
        insert("lost")(session)
        raise KeyError

    with site.running():
        replies = [site.get(path).status for path in ("/insert/tea", "/fails", "/add/milk", "/insert/coffee")]
        assert replies == [200, 500, 200, 200]
        assert store.names() == ["coffee", "milk", "tea"]
        assert wait_for(lambda: core_of(site.db).semaphore._free == 1)
    assert "No thread could be started" in caplog.text


def test_an_endpoint_without_a_thread_keeps_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The framework cannot run it: an error, and what was asked for before is back."""
    site = Site(store, sync=True, pool_size=1, max_overflow=0, pool_timeout=5)

    @site.app.get("/")
    def endpoint(session: Annotated[Session, Depends(site.db.get_session)]) -> int:
        return count(session)

    with site.running():
        with monkeypatch.context() as patch:
            start_no_thread(patch, "AnyIO")
            assert site.get().status == 500
        core = core_of(site.db)
        assert wait_for(lambda: (core.semaphore._free, core.pending_sessions._free) == (1, 256))
        assert site.get().status == 200


def test_a_call_without_a_thread_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executor that cannot start a thread keeps the call in its queue, for the workers that it has already."""
    monkeypatch.setattr(threads, "_executors", {})
    gate = threading.Event()
    made: list[str] = []

    def call() -> str:
        made.append(threading.current_thread().name)
        return "made"

    def fail() -> None:
        raise KeyError

    async def scenario() -> None:
        busy = in_thread(lambda: gate.wait(10), can_wait=True)
        with monkeypatch.context() as patch:
            start_no_thread(patch, "session_plugin")
            assert await in_thread(call, can_wait=True) == "made"
            with pytest.raises(KeyError):
                await in_thread(fail, can_wait=True)
        gate.set()
        await busy
        await in_thread(lambda: None, can_wait=True)

    asyncio.run(scenario())
    threads._executors.pop(True).shutdown()
    assert made == [threading.current_thread().name]


def test_a_call_that_outlives_its_event_loop_reports_to_nobody() -> None:
    """Its loop was closed meanwhile."""
    gate, ended = threading.Event(), threading.Event()

    def call() -> None:
        assert gate.wait(10)
        ended.set()

    async def scenario() -> None:
        in_thread(call, can_wait=True)

    asyncio.run(scenario())
    gate.set()
    assert ended.wait(10)
