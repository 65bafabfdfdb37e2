"""One contract app in each framework, on a real server and a real database.

A test describes what a request does as an `Act`.  Each adapter's app performs it in the idiom of
its framework, and the test compares the client's response with the contents of the database.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sqlalchemy
from sqlalchemy import Engine, ForeignKey, ForeignKeyConstraint, String, create_engine, event, func, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

Work = Callable[[Session], Any]

SQLALCHEMY_2_0 = sqlalchemy.__version__.startswith("2.0.")

OPEN_TRANSACTIONS = {
    "postgresql": "SELECT pid, state, query FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid() AND state <> 'idle' AND backend_type = 'client backend'",
    "mariadb": "SELECT trx_mysql_thread_id, trx_state, trx_query FROM information_schema.innodb_trx "
    "JOIN information_schema.processlist ON id = trx_mysql_thread_id WHERE db = database() AND id <> connection_id()",
}
POOL = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 100}
"""The timeout is long enough for requests that wait in line for a connection on a busy machine."""


class Base(DeclarativeBase):
    pass


class Parent(Base):
    __tablename__ = "parent"
    name: Mapped[str] = mapped_column(String(50), primary_key=True)


class Child(Base):
    """A row whose parent is checked by COMMIT only; MariaDB has no deferred constraints, so there it is not checked."""

    __tablename__ = "child"
    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    parent: Mapped[str] = mapped_column(ForeignKey("parent.name", deferrable=True, initially="DEFERRED"))


@compiles(ForeignKeyConstraint, "mariadb")
def omit_foreign_key(*args: Any, **kwargs: Any) -> None:
    return None


class HandledError(Exception):
    """The contract app's error handler returns a 200 response."""


class ConflictError(Exception):
    """The contract app's error handler queries the database and returns a 409 response."""


def add(name: str) -> Work:
    """Add one `Parent`, without a flush."""
    return lambda session: session.add(Parent(name=name))


def insert(name: str) -> Work:
    """Add one `Parent` and flush."""

    def work(session: Session) -> None:
        session.add(Parent(name=name))
        session.flush()

    return work


def add_orphan(session: Session) -> None:
    """Cause the COMMIT to fail."""
    session.add(Child(name="orphan", parent="nobody"))
    session.flush()
    if session.connection().dialect.name == "mariadb":
        refuse_commits(session)


def refuse_commits(session: Session) -> None:
    """Make MariaDB read-only, as a failover does, until the session has rolled back."""
    url = session.connection().engine.url.set(drivername="mariadb+pymysql", username="root", password="")
    url = url.update_query_dict({"ssl_disabled": "true"})
    admin = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def set_read_only(value: int) -> None:
        with admin.connect() as connection:
            connection.execute(text(f"SET GLOBAL read_only = {value}"))

    try:
        set_read_only(1)
    except OperationalError as error:
        raise AssertionError("MariaDB did not become read-only") from error
    event.listen(session, "after_rollback", lambda session: set_read_only(0), once=True)


class Sibling:
    """Another thread or task that executes a statement on the session of a request, and is slow to get a connection.

    Attributes:
        error: what the statement raised.
        ended: set at its end.
    """

    def __init__(self, session: Session, engine: Engine) -> None:
        """Start it, and return once it is taking the connection."""
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self._session = session
        self._is_async = engine.dialect.is_async
        self._connecting = False
        self._condition: Callable[[], Any] = lambda: False
        event.listen(engine, "checkout", self._hold)
        if self._is_async:
            self._task = asyncio.get_running_loop().create_task(greenlet_spawn(self._execute))
        else:
            threading.Thread(target=self._execute).start()
        self._wait_for(lambda: self._connecting or self.error)

    def let_go_once(self, condition: Callable[[], Any]) -> None:
        """Let the connection arrive as soon as ``condition()`` is true."""
        self._condition = condition

    def _execute(self) -> None:
        try:
            self._session.execute(sqlalchemy.insert(Parent).values(name="sibling"))
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def _hold(self, *arguments: Any) -> None:
        if not self._connecting:
            self._connecting = True
            self._wait_for(lambda: self._condition())

    def _wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 10
        while not condition() and time.monotonic() < deadline:
            if self._is_async:
                await_only(asyncio.sleep(0.01))
            else:
                time.sleep(0.01)


def count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Parent)) or 0


@dataclass
class Act:
    """What one request does.

    Attributes:
        work: runs in the endpoint, with the request's session.
        status: the status of the response.
        error: the exception that the endpoint raises after the work.
        redirect: whether to raise the framework's own exception for a redirect.
        stream: the work that runs after each chunk of a streamed body, with the session.
        before: runs with the session after the response, in a callable before that of ``background``.
        background: runs with the session after the response, as a background task of the framework.
        replaced: what a middleware around the app makes of its response: another one, with that status, or an error.
        use_session: False for an endpoint that does not use a session.
    """

    work: Work = lambda session: None
    status: int = 201
    error: Exception | None = None
    redirect: bool = False
    stream: Sequence[Work] = ()
    before: Work | None = None
    background: Work | None = None
    replaced: int | type[Exception] | None = None
    use_session: bool = True
    done: threading.Event = field(default_factory=threading.Event)


@dataclass
class Reply:
    status: int
    body: bytes
    complete: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Store:
    """The database of one harness, which tests inspect through a separate engine."""

    def __init__(self, driver: str, location: Any) -> None:
        self.driver = driver
        self.backend, dialect_driver = driver.split("+")
        if self.backend == "sqlite":
            self.url = f"{driver}:///{location}"
            self.engine = create_engine(f"sqlite:///{location}")
            event.listen(self.engine, "connect", check_foreign_keys)
            Path(location).write_bytes(empty_file())
        else:
            self.url = location.url(dialect_driver, location.shared_database)
            self.engine = inspecting_engine(location.admin_url(location.shared_database))
        self.commit_error = OperationalError if self.backend == "mariadb" else IntegrityError
        self.sessions = sessionmaker(self.engine)

    def close(self) -> None:
        """Close the connections to a file; those to a server serve the next test."""
        if self.backend == "sqlite":
            self.engine.dispose()

    def names(self) -> list[str]:
        """The names of all committed rows, sorted."""
        with self.sessions() as session:
            return sorted([*session.scalars(select(Parent.name)), *session.scalars(select(Child.name))])

    def clear(self) -> None:
        with self.engine.begin() as connection:
            if self.backend == "mariadb":
                connection.execute(text("SET GLOBAL read_only = 0"))  # a failed test may have left the server read-only
            connection.execute(Child.__table__.delete())
            connection.execute(Parent.__table__.delete())

    def open_transactions(self) -> list[Any]:
        """The transactions that the server reports as open on other connections."""
        with self.engine.connect() as connection:
            if self.driver == "sqlite+aiosqlite" and SQLALCHEMY_2_0:
                gc.collect()  # the cursor of a cancelled statement keeps SQLite's lock; SQLAlchemy 2.1 closes it
            if self.backend == "sqlite":
                cursor = connection.connection.cursor()
                try:
                    cursor.execute("PRAGMA busy_timeout=0")
                    cursor.execute("BEGIN IMMEDIATE")
                    cursor.execute("ROLLBACK")
                except sqlite3.OperationalError as error:
                    return [str(error)]
                return []
            return list(connection.execute(text(OPEN_TRANSACTIONS[self.backend])))


@cache
def empty_file() -> bytes:
    """The contents of an SQLite database with the tables; copying it is faster than creating the tables."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "empty.db")
        engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        with engine.connect() as connection:
            connection.execute(text("PRAGMA journal_mode=WAL"))
        Base.metadata.create_all(engine)
        return path.read_bytes()


inspecting_engines: dict[str, Engine] = {}


def inspecting_engine(url: str) -> Engine:
    """An engine for a database of a server, with the tables; all stores of a run share the database and the engine."""
    engine = inspecting_engines.get(url)
    if engine is None:
        inspecting_engines[url] = engine = create_engine(url)
        Base.metadata.create_all(engine)
    return engine


def check_foreign_keys(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def hold(gate: threading.Event) -> None:
    """Wait for ``gate``; an event loop goes on meanwhile, and sees clients disconnect."""
    if in_greenlet():
        await_only(asyncio.to_thread(gate.wait, 5))
    else:
        gate.wait(5)


def release(db: Any) -> None:
    """Call ``db.release()``, also in work that `run_sync` runs."""
    if in_greenlet():
        await_only(db.release())
    else:
        db.release()


class Harness:
    """A contract app on a server.  Subclasses define the app and the server."""

    drivers: Sequence[str]
    requests = 0
    """The number of requests that are being served, background work included."""
    _counting = threading.Lock()
    answers_failed_commits = True
    """False if the framework's error handlers do not see a failed commit."""
    settles_inside_middleware = True
    """False if the response is settled outside the app's middleware, by the status that the client receives."""
    shows_background_callables = True
    """False if one callable after the response cannot be distinguished from the next."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.act = Act()
        self.log: list[Any] = []
        self.db: Any = None
        self.port = 0
        self.make_app()
        if store.backend == "sqlite":
            event.listen(self.sync_engine, "connect", check_foreign_keys)

    def make_app(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    @property
    def sync_engine(self) -> Any:
        engine = self.db.engine
        return getattr(engine, "sync_engine", engine)

    @contextmanager
    def connect(self, timeout: float = 150) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            yield connection
        finally:
            connection.close()

    def request(self, act: Act, method: str = "POST", path: str = "/act") -> Reply:
        """Perform ``act`` over a socket, and read the response until it ends or is cut off."""
        self.act = act
        with self.connect() as connection:
            connection.request(method, path)
            response = connection.getresponse()
            try:
                body = response.read()
            except (http.client.IncompleteRead, ConnectionError) as error:
                return Reply(response.status, getattr(error, "partial", b""), complete=False)
            return Reply(response.status, body, complete=True)

    def leave_during(self, act: Act, gate: threading.Event) -> None:
        """Perform ``act``, disconnect after the first chunk of the response, and then open ``gate``."""
        self.act = act
        with self.connect() as connection:
            connection.request("POST", "/act")
            assert connection.getresponse().read(5) == b"chunk"
        assert wait_for(self.has_seen_the_client_leave, 10)
        gate.set()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A block in which a request is served."""
        with self._counting:
            self.requests += 1
        try:
            yield
        finally:
            with self._counting:
                self.requests -= 1

    def has_seen_the_client_leave(self) -> bool:
        """Whether the server can see the disconnect; over loopback, its socket sees it as soon as the client closes."""
        return True

    def settle_down(self) -> None:
        """Wait until no request is served, no connection is checked out and no transaction is open; fail after a while.

        A request that is still being served may hold nothing for a moment: a stream between two of its transactions.
        """
        wait_for(self.at_rest)
        assert self.requests == 0
        assert self.sync_engine.pool.checkedout() == 0
        assert self.store.open_transactions() == []

    def at_rest(self) -> bool:
        return self.requests == 0 and self.sync_engine.pool.checkedout() == 0 and not self.store.open_transactions()


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait until ``condition`` returns a true value or ``seconds`` have passed; return its last value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value
