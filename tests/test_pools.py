"""The fair pools: requests are served in the order in which they asked, and no permit is ever lost."""

import asyncio
import contextvars
import gc
import os
import random
import signal
import sqlite3
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, CreateEnginePlugin, create_engine, make_url, text
from sqlalchemy.dialects import plugins
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool

from session_plugin import AsyncDatabase, Database, read_only_autocommit
from session_plugin.engines import semaphore
from session_plugin.engines.pools import FairAsyncQueuePool, FairQueuePool, fair_pool_class
from session_plugin.engines.semaphore import FairSemaphore

from .asgi_site import stores
from .harness import Store, wait_for

ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 30}
SELECT = text("SELECT 1")

store = stores(["sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg"])


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """A database with a pool of one connection; at the end of the test one permit is free."""
    database = Database(f"sqlite:///{tmp_path}/shop.db", **{**ONE, "pool_timeout": 2})
    yield database
    assert permits(database)._free == 1
    database.dispose()


def permits(database: Any) -> Any:
    return getattr(database.engine, "sync_engine", database.engine).pool._semaphore


def waits(database: Any, number: int) -> Any:
    return wait_for(lambda: len(permits(database)._queue) == number)


def apart(call: Awaitable[Any]) -> asyncio.Task[Any]:
    """A task in a separate context, like that of a request."""
    return contextvars.Context().run(asyncio.ensure_future, call)  # type: ignore[arg-type]


async def turns(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def run(database: AsyncDatabase[Any], scenario: Callable[[AsyncDatabase[Any]], Awaitable[None]]) -> None:
    """Run ``scenario``, then check that the permit is free and that nobody waits."""

    async def main() -> None:
        async with asyncio.timeout(100):
            await scenario(database)
        assert permits(database)._free == 1
        assert not permits(database)._queue
        await database.dispose()

    asyncio.run(main())


# -- in turn --------------------------------------------------------------------------------------


def test_threads_are_served_in_turn(db: Database) -> None:
    """A thread that returns the only connection and asks for it again is served after the threads that wait."""
    served: list[int] = []

    def work(number: int) -> None:
        with db.session_scope() as session:
            session.execute(SELECT)
            served.append(number)

    threads = [threading.Thread(target=work, args=[number]) for number in range(5)]
    with db.session_scope() as session:
        session.execute(SELECT)
        for number, thread in enumerate(threads):
            thread.start()
            assert waits(db, number + 1)
        session.commit()
        session.execute(SELECT)
        served.append(5)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3, 4, 5]


def test_tasks_are_served_in_turn(store: Store) -> None:
    """A task that returns the only connection and asks for it again is served after the tasks that wait."""

    async def scenario(db: AsyncDatabase[Any]) -> None:
        served: list[int] = []

        async def work(number: int) -> None:
            async with db.session_scope() as session:
                await session.execute(SELECT)
                served.append(number)

        def commit_and_continue(session: Session) -> None:
            session.commit()
            session.execute(SELECT)
            served.append(5)

        async with db.session_scope() as session:
            await session.execute(SELECT)
            waiting = []
            for number in range(5):
                waiting.append(apart(work(number)))
                while len(permits(db)._queue) <= number:
                    await asyncio.sleep(0.01)
            await session.run_sync(commit_and_continue)
        await asyncio.gather(*waiting)
        assert served == [0, 1, 2, 3, 4, 5]

    run(AsyncDatabase(store.url, **ONE), scenario)


def test_overflow_counts() -> None:
    """With overflow, ``pool_size + max_overflow`` connections can be in use at once, and not one more."""
    db = Database("sqlite:////dev/null", pool_size=1, max_overflow=2, pool_timeout=0.05)
    pool: Any = db.engine.pool
    held = [pool.connect() for _ in range(3)]
    with pytest.raises(PoolTimeoutError, match="all 3 connections of the pool are in use"):
        pool.connect()
    for connection in held:
        connection.close()
    assert permits(db)._free == 3
    db.dispose()


@pytest.mark.parametrize("options", [{"pool_size": 0}, {"max_overflow": -1}], ids=str)
def test_a_pool_without_a_limit_does_not_count(options: dict[str, int]) -> None:
    db = Database("sqlite:////dev/null", **{**ONE, "pool_timeout": 0.05, **options})
    held = [db.engine.pool.connect() for _ in range(20)]
    for connection in held:
        connection.close()
    db.dispose()


# -- waiting, and its end -------------------------------------------------------------------------


def test_a_thread_that_waits_too_long(db: Database) -> None:
    """A thread that waits longer than ``pool_timeout`` gets SQLAlchemy's TimeoutError and leaves the queue."""
    permits(db)._timeout = 0.05
    with db.engine.connect(), pytest.raises(PoolTimeoutError, match=r"pool_timeout of 0\.05 seconds"):
        db.engine.connect()
    assert not permits(db)._queue


def test_a_task_that_waits_too_long(store: Store) -> None:
    async def scenario(db: AsyncDatabase[Any]) -> None:
        async with db.engine.connect():
            with pytest.raises(PoolTimeoutError, match=r"pool_timeout of 0\.05 seconds"):
                await db.engine.connect()

    run(AsyncDatabase(store.url, **{**ONE, "pool_timeout": 0.05}), scenario)


def test_without_a_timeout(db: Database) -> None:
    """With ``pool_timeout=None`` a request waits until a connection is free."""
    permits(db)._timeout = None
    with ThreadPoolExecutor(1) as clients, db.engine.connect():
        waiting = clients.submit(lambda: db.engine.connect().close())
        assert waits(db, 1)
    waiting.result()


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_of_zero_or_less_raises_at_once(timeout: int) -> None:
    one = FairSemaphore(1, timeout)
    assert one.take()
    with pytest.raises(PoolTimeoutError):
        one.wait()
    with pytest.raises(PoolTimeoutError):
        asyncio.run(one.await_one())


def test_ctrl_c_while_waiting(db: Database) -> None:
    """A thread that is interrupted while it waits leaves the queue, and the next request gets the connection."""

    def interrupt() -> None:
        if waits(db, 1):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    with db.engine.connect():
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            db.engine.connect()
    interrupting.join()
    db.engine.connect().close()


@pytest.mark.parametrize("is_in_time", [True, False], ids=["waiting", "handed over"])
def test_a_task_that_is_cancelled_while_waiting(store: Store, is_in_time: bool) -> None:
    """A cancelled task leaves its permit to the next one, even if it had already received it."""

    async def scenario(db: AsyncDatabase[Any]) -> None:
        async def work() -> None:
            async with db.engine.connect() as connection:
                await connection.execute(SELECT)

        connection = await db.engine.connect()
        gives_up, next_one = apart(work()), apart(work())
        await turns()
        assert len(permits(db)._queue) == 2
        if is_in_time:
            gives_up.cancel()
        await connection.close()
        gives_up.cancel()
        await next_one
        with suppress(asyncio.CancelledError):
            await gives_up

    run(AsyncDatabase(store.url, **ONE), scenario)


@pytest.mark.filterwarnings(  # aiosqlite leaves a connection open if the task that opens it is cancelled
    "ignore:.*unclosed database:ResourceWarning",
    "ignore:.*unclosed database:pytest.PytestUnraisableExceptionWarning",
)
@pytest.mark.parametrize("connects", [True, False], ids=["connects", "waits"])
def test_a_task_that_is_cancelled_at_any_await(store: Store, connects: bool) -> None:
    """A task can be cancelled at any await, from connecting to returning the connection, without losing a permit."""

    async def scenario(db: AsyncDatabase[Any]) -> None:
        async def work() -> None:
            async with db.session_scope() as session:
                await session.execute(SELECT)

        steps = 0
        while True:
            if connects:
                await db.engine.dispose()
                task = apart(work())
            else:
                holding = await db.engine.connect()
                task = apart(work())
                await turns(5)
                await holding.close()
            await turns(steps)
            if task.done():
                break
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            gc.collect()
            async with asyncio.timeout(50):
                while permits(db)._free != 1:
                    await asyncio.sleep(0.01)
            steps += 1
        assert steps > 3

    run(AsyncDatabase(store.url, **ONE), scenario)


def test_waiting_outside_a_task(store: Store) -> None:
    """An async pool cannot wait outside a task; it raises the same error as SQLAlchemy's and leaves the queue."""

    async def scenario(db: AsyncDatabase[Any]) -> None:
        async with db.engine.connect():
            with pytest.raises(InvalidRequestError, match="greenlet_spawn"):
                db.engine.sync_engine.connect()

    run(AsyncDatabase(store.url, **ONE), scenario)


# -- what can happen to a connection --------------------------------------------------------------


def refused() -> None:
    raise OSError("no route to the server")


def test_a_failed_connect_returns_the_permit() -> None:
    db = Database("sqlite:////dev/null", **{**ONE, "pool_timeout": 1}, creator=refused)
    for _ in range(3):
        with pytest.raises(OSError, match="no route"):
            db.engine.connect()
    assert permits(db)._free == 1


def test_after_a_failed_connect_the_next_request_tries() -> None:
    """A failed connect lets the next request try to connect.

    In SQLAlchemy's pool that request keeps waiting for a connection that nothing opens.
    """
    entered, leave = threading.Event(), threading.Event()

    def fail() -> None:
        entered.set()
        leave.wait(10)
        raise OSError("no route to the server")

    def connect() -> None:
        with suppress(OSError):
            failing.engine.connect()

    failing = Database("sqlite:////dev/null", **ONE, creator=fail)
    threads = [threading.Thread(target=connect) for _ in range(2)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    assert waits(failing, 1)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_discarded_connection_returns_its_permit(db: Database) -> None:
    for discard in ("invalidate", "detach"):
        connection = db.engine.connect()
        getattr(connection, discard)()
        connection.close()
        assert permits(db)._free == 1


def test_a_connection_that_fails_to_close_returns_its_permit() -> None:
    """A connection beyond ``pool_size`` is closed when it is returned; if the close fails, its permit is free."""

    class Connection(sqlite3.Connection):
        def close(self) -> None:
            raise KeyboardInterrupt

    db = Database("sqlite:////dev/null", pool_size=1, max_overflow=1, connect_args={"factory": Connection})
    first, second = db.engine.pool.connect(), db.engine.pool.connect()
    opened: list[Any] = [each.dbapi_connection for each in (first, second)]
    first.close()
    with pytest.raises(KeyboardInterrupt):
        second.close()
    assert permits(db)._free == 2
    for connection in opened:
        sqlite3.Connection.close(connection)


def test_a_connection_is_returned_before_its_permit(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is back in the pool before its permit is released, so the next request never waits in the pool."""
    pool: Any = db.engine.pool
    inside: list[int] = []
    release = pool._semaphore.release

    def look_and_release() -> None:
        inside.append(pool.checkedin())
        release()

    monkeypatch.setattr(pool._semaphore, "release", look_and_release)
    db.engine.connect().close()
    assert inside == [1]


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
def test_a_garbage_collected_connection_returns_its_permit(db: Database) -> None:
    connection = db.engine.raw_connection()
    assert connection is not None
    del connection
    gc.collect()
    db.engine.connect().close()


def test_a_connection_that_is_collected_while_another_is_asked_for(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request gets the permit of a connection that its own thread garbage-collects.

    That can happen between the check for a free permit and the wait, or during the wait.
    """
    make, wait = semaphore.WaitingThread, semaphore.WaitingThread.wait
    held = [db.engine.connect()]

    def close_and_make() -> Any:
        held.pop().close()
        return make()

    def close_and_wait(waiting: Any, seconds: float | None) -> bool:
        held.pop().close()
        return wait(waiting, seconds)

    monkeypatch.setattr(semaphore, "WaitingThread", close_and_make)
    db.engine.connect().close()
    monkeypatch.setattr(semaphore, "WaitingThread", make)
    held.append(db.engine.connect())
    monkeypatch.setattr(make, "wait", close_and_wait)
    db.engine.connect().close()
    assert not held


def test_an_engine_that_is_disposed_of_while_others_wait(db: Database) -> None:
    """Requests that wait when an engine is disposed of get the old pool's connection; later ones use the new pool."""
    pool = db.engine.pool
    old = permits(db)
    with ThreadPoolExecutor(1) as clients, db.engine.connect():
        waiting = clients.submit(lambda: db.engine.connect().close())
        assert waits(db, 1)
        db.dispose()
        db.engine.connect().close()
    waiting.result()
    assert old._free == 1
    assert old is not permits(db)
    pool.dispose()


def test_many_threads_close_and_discard_connections(tmp_path: Path) -> None:
    """8 threads that use 100 connections each, on a pool of three, never hold more than three and lose no permit."""
    db = Database(f"sqlite:///{tmp_path}/shop.db", pool_size=2, max_overflow=1, pool_timeout=30)
    pool = db.engine.pool
    at_once: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(100):
            connection: Any = pool.connect()
            at_once.append(1)
            assert sum(at_once) <= 3
            what = chance.choice(["close", "close", "close", "invalidate", "detach"])
            at_once.append(-1)
            getattr(connection, what)()
            connection.close()

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(at_once) == 8 * 100 * 2
    assert permits(db)._free == 3
    assert db.engine.pool.checkedout() == 0
    db.dispose()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_a_separate_pool(db: Database) -> None:
    """A forked child can connect even while the parent holds the only connection of its own pool."""
    with db.engine.connect():
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                db.engine.connect()
                os._exit(0)
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- which pools ----------------------------------------------------------------------------------


def test_a_child_that_c_code_forked_has_a_separate_pool(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of another process gives no connection and no permit of its own: another pool stands for it."""
    pool: Any = db.engine.pool
    with db.engine.connect() as held:
        parents = held.connection.driver_connection
        monkeypatch.setattr(pool, "_pid", os.getppid())
        used = []
        for _ in range(2):
            with db.engine.connect() as connection:
                assert connection.scalar(SELECT) == 1
                used.append(connection.connection.driver_connection)
        assert used[0] is used[1] is not parents
        childs = pool._in_child
        assert (childs.checkedin(), childs._semaphore._free, pool._semaphore._free) == (1, 1, 0)
        monkeypatch.setattr(childs, "_pid", os.getppid())  # the child forks in its turn
        with db.engine.connect() as connection:
            assert connection.connection.driver_connection not in (parents, used[0])
        assert childs.checkedin() == 1
    for own in (childs, pool._in_child):
        own.dispose()


def test_every_engine_that_a_database_creates_has_a_fair_pool(tmp_path: Path) -> None:
    """Each engine has a fair pool with its own count: named engines, the readers', and those after ``dispose()``."""
    url = f"sqlite:///{tmp_path}/shop.db"
    db = Database({"default": {"url": url, "pool_size": 1}, "reports": {"url": url, "pool_size": 2}}, max_overflow=0)
    with db.session_scope() as session:
        db.use(read_only_autocommit)
        reader = session.connection().engine
    pools: list[Any] = [db.engine.pool, db.engines["reports"].pool, reader.pool]
    assert [type(pool) for pool in pools] == [FairQueuePool] * 3
    assert [pool._semaphore._capacity for pool in pools] == [1, 2, 1]
    db.dispose()
    assert type(db.engine.pool) is FairQueuePool
    assert db.engine.pool is not pools[0]


def test_every_async_engine_that_a_database_creates_has_a_fair_pool(store: Store) -> None:
    async def scenario(db: AsyncDatabase[AsyncSession]) -> None:
        assert type(db.engine.pool) is FairAsyncQueuePool
        await db.engine.dispose()
        assert type(db.engine.pool) is FairAsyncQueuePool

    run(AsyncDatabase(store.url, **ONE), scenario)


def test_a_pool_that_the_user_names_is_kept(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    pool = QueuePool(lambda: None)
    assert type(Database(url, poolclass=NullPool).engine.pool) is NullPool
    assert type(Database(url, poolclass=QueuePool).engine.pool) is QueuePool
    assert type(Database(url, poolclass=None).engine.pool) is FairQueuePool
    assert Database(url, pool=pool).engine.pool is pool
    assert type(Database(create_engine(url)).engine.pool) is QueuePool
    aurl = url.replace("sqlite", "sqlite+aiosqlite")
    assert type(AsyncDatabase(aurl, poolclass=AsyncAdaptedQueuePool).engine.pool) is AsyncAdaptedQueuePool


def test_a_dialect_with_its_own_pool_class_keeps_it() -> None:
    """A dialect that needs its own pool class keeps it, such as SQLite's for a database in memory."""
    assert fair_pool_class(make_url("sqlite://"), is_async=False) is None
    assert fair_pool_class(make_url("sqlite+aiosqlite://"), is_async=True) is None


def test_options_of_a_pool_are_applied(tmp_path: Path) -> None:
    options = {"pool_recycle": 7, "pool_pre_ping": True, "pool_use_lifo": True, "pool_logging_name": "shop"}
    pool: Any = Database(f"sqlite:///{tmp_path}/shop.db", **options).engine.pool
    for each in (pool, pool.recreate()):
        assert (each._recycle, each._pre_ping, each._pool.use_lifo, each.logging_name) == (7, True, True, "shop")
        assert (each.size(), each.timeout(), each._semaphore._capacity) == (5, 30, 15)


def test_a_pool_logs_under_the_name_of_sqlalchemys_class(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """A fair pool logs under the name of the SQLAlchemy class it replaces, so levels set for that logger apply."""

    async def scenario(db: AsyncDatabase[Any]) -> None:
        async with db.engine.connect():
            pass

    with caplog.at_level("DEBUG", "sqlalchemy.pool"):
        db = Database(f"sqlite:///{tmp_path}/shop.db", pool_logging_name="shop")
        db.engine.connect().close()
        run(AsyncDatabase(store.url, **ONE), scenario)
    db.dispose()
    names = {record.name for record in caplog.records if "onnection" in record.message}
    assert names == {"sqlalchemy.pool.impl.QueuePool.shop", "sqlalchemy.pool.impl.AsyncAdaptedQueuePool"}


def test_a_url_whose_dialect_a_plugin_of_sqlalchemy_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an engine plugin chooses the dialect, no ``poolclass`` is passed and SQLAlchemy's own pool is used."""

    class Renames(CreateEnginePlugin):
        def update_url(self, url: URL) -> URL:
            assert "poolclass" not in self.kwargs
            return url.difference_update_query(["plugin"]).set(drivername="sqlite")

        def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
            super().__init__(url, kwargs)
            self.kwargs = kwargs

    plugins.register("renames", __name__, "Renames")
    monkeypatch.setattr(sys.modules[__name__], "Renames", Renames, raising=False)
    assert type(Database("virtual:////dev/null?plugin=renames").engine.pool) is QueuePool
    assert type(Database("virtual:////dev/null", plugins=["renames"]).engine.pool) is QueuePool


# -- permits by themselves ------------------------------------------------------------------------


def test_a_connection_may_be_collected_under_the_lock() -> None:
    """A connection may be garbage-collected, and its permit released, while its thread holds the semaphore's lock."""
    one = FairSemaphore(1, None)
    assert one.take()
    with one._lock:
        one.release()
    assert one.take()


def test_a_closed_event_loop_keeps_no_permit(store: Store) -> None:
    """A permit is not given to a task of a closed event loop, which was neither cancelled nor awaited."""
    one = FairSemaphore(1, 5)
    assert one.take()
    loop = asyncio.new_event_loop()
    abandoned = loop.create_task(one.await_one())
    loop.run_until_complete(turns(2))
    assert len(one._queue) == 1
    loop.close()
    one.release()
    assert one.take()
    abandoned.get_coro().close()  # type: ignore[union-attr]


def test_a_request_that_was_served_leaves_no_timer() -> None:
    """A task that got its permit cancels its timer, which would otherwise keep the request alive until the timeout."""
    one = FairSemaphore(1, 30)

    async def scenario() -> None:
        assert one.take()
        waiting = asyncio.create_task(one.await_one())
        await turns(2)
        one.release()
        await waiting
        loop: Any = asyncio.get_running_loop()
        assert all(timer.cancelled() for timer in loop._scheduled)

    asyncio.run(scenario())


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_timeout_error_from_elsewhere_propagates(timeout: float | None) -> None:
    """A TimeoutError that a signal handler raises during the wait propagates, and is not taken for the pool's own."""
    one = FairSemaphore(1, timeout)
    assert one.take()

    def too_long(*more: Any) -> None:
        raise TimeoutError("the job took too long")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(TimeoutError, match="the job took too long"):
            one.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not one._queue


def test_the_message_of_the_timeout() -> None:
    """The timeout error has SQLAlchemy's class and code, and its message says how many other requests wait."""
    one = FairSemaphore(1, 0.05)
    assert one.take()
    with pytest.raises(
        PoolTimeoutError, match="all 1 connections of the pool are in use, and other requests wait for one: 0"
    ) as raised:
        one.wait()
    assert raised.value.code == "3o7r"
    assert raised.value.__context__ is None
