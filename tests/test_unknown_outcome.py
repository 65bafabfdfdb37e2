"""Once COMMIT was sent and the server has not clearly answered, nothing says "committed" or "rolled back"."""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from session_plugin import AsyncDatabase, Database, TransactionAbortedError
from session_plugin.asgi import SessionScopeMiddleware
from session_plugin.engines import commits
from session_plugin.engines.backends import backend_for
from session_plugin.flask import SessionPlugin as FlaskPlugin
from session_plugin.scope.hooks import Event
from session_plugin.testing import captured_hooks, fail_next_commit

from .conftest import make_store
from .drivers import MARIADB, POSTGRESQL
from .harness import POOL, Base, Child, Parent, Store, add_orphan, insert, wait_for
from .proxy import Proxy
from .units import Units, on

SERVERS = [*POSTGRESQL, *MARIADB]


class TimeLimit(Exception):
    """What a signal handler of a task queue raises."""


class Interrupted(BaseException):
    """As gevent's Timeout: no handler for `Exception` sees it."""


class Lossy(Units):
    """Units of work whose connections go through a `Proxy`."""

    def __init__(self, driver: str, store: Store, **options: Any) -> None:
        self.proxy = Proxy(store.url)
        real, store.url = store.url, self.proxy.url
        super().__init__(driver, store, **options)
        store.url = real

    def close(self) -> None:
        super().close()
        self.proxy.close()


@pytest.fixture(params=SERVERS)
def lossy(request: pytest.FixtureRequest) -> Iterator[Lossy]:
    """Units of work on each driver of a server."""
    lossy = Lossy(request.param, make_store(request, request.param))
    yield lossy
    lossy.close()


def register_hooks(db: Any) -> list[Event]:
    """Return a list to which each hook that runs adds its event."""
    ran: list[Event] = []
    db.on_commit(ran.append, "commit")
    db.on_rollback(ran.append, "rollback")
    db.on_unknown(ran.append, "unknown")
    return ran


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "session_plugin" and record.levelno >= logging.ERROR
    ]


def notes_of(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", ()))


def note_discarded(units: Units) -> list[Any]:
    """Return a list to which each connection is added that is discarded instead of going back to the pool."""
    discarded: list[Any] = []
    event.listen(units.sync_engine, "invalidate", lambda connection, *more: discarded.append(connection))
    return discarded


def insert_and_lose(lossy: Lossy, ran: list[Any]) -> Callable[[Session], None]:
    def work(session: Session) -> None:
        insert("tea")(session)
        ran.append(register_hooks(lossy.db))
        lossy.proxy.lose_answer_to(b"COMMIT")

    return work


def test_a_lost_answer_is_neither_a_commit_nor_a_rollback(lossy: Lossy, caplog: pytest.LogCaptureFixture) -> None:
    """Only `on_unknown` hooks run; the exception and the log say that the data may be saved, which it is here."""
    ran: list[Any] = []
    discarded = note_discarded(lossy)
    with pytest.raises(DBAPIError) as caught:
        lossy.run(insert_and_lose(lossy, ran))
    assert lossy.proxy.lost.is_set()
    assert wait_for(lambda: lossy.store.names() == ["tea"])
    assert ran == [["unknown"]]
    assert "may or may not be saved" in notes_of(caught.value)
    [message] = errors_in(caplog)
    assert "outcome of COMMIT is unknown" in message
    assert "session_scope() at" in message
    assert f"127.0.0.1:{lossy.sync_engine.url.port}" in message
    assert len(discarded) == 1
    assert lossy.run(lambda session: session.get(Parent, "tea")) is not None


def test_an_explicit_commit_counts_the_same(lossy: Lossy, caplog: pytest.LogCaptureFixture) -> None:
    """The code may catch its error and end as a success: then an ERROR says that this is not known to be true."""
    ran: list[Any] = []

    def work(session: Session) -> None:
        insert_and_lose(lossy, ran)(session)
        with pytest.raises(DBAPIError) as caught:
            session.commit()
        assert "may or may not be saved" in notes_of(caught.value)
        session.rollback()
        assert ran == [["unknown"]]

    lossy.run(work)
    [unknown, claim] = errors_in(caplog)
    assert "outcome of COMMIT is unknown" in unknown
    assert "ended as a success (success), which is not known to be true" in claim


def test_work_after_it_is_a_transaction_of_its_own(lossy: Lossy, caplog: pytest.LogCaptureFixture) -> None:
    """It commits, its hooks run; the ERROR comes once."""
    ran: list[Any] = []

    def work(session: Session) -> None:
        insert_and_lose(lossy, ran)(session)
        with pytest.raises(DBAPIError):
            session.commit()
        session.rollback()
        insert("milk")(session)
        ran.append(register_hooks(lossy.db))

    lossy.run(work)
    assert ran == [["unknown"], ["commit"]]
    assert lossy.store.names() == ["milk", "tea"]
    assert len(errors_in(caplog)) == 2


def refuse(session: Session) -> None:
    insert("tea")(session)
    add_orphan(session)


def test_a_refusal_is_a_rollback(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """The server has said that it did not commit, so `on_rollback` hooks run, and the exception has no note."""
    ran: list[Any] = []

    def work(session: Session) -> None:
        refuse(session)
        ran.append(register_hooks(units.db))

    with pytest.raises(units.store.commit_error) as caught:
        units.run(work)
    assert ran == [["rollback"]]
    assert notes_of(caught.value) == ""
    assert errors_in(caplog) == []
    assert units.store.names() == []


def test_what_fails_before_commit_is_sent_is_a_rollback(units: Units) -> None:
    """A listener, and our own refusal of a doomed unit of work."""
    ran: list[Any] = []

    def doomed(session: Session) -> None:
        insert("tea")(session)
        ran.append(register_hooks(units.db))
        units.db.doom()
        with pytest.raises(TransactionAbortedError):
            session.commit()
        session.rollback()

    def with_listener(session: Session) -> None:
        insert("tea")(session)
        ran.append(register_hooks(units.db))
        event.listen(units.sync_engine, "commit", stop)

    def stop(connection: Any) -> None:
        raise TimeLimit

    units.run(doomed)
    with pytest.raises(TimeLimit) as caught:
        units.run(with_listener)
    event.remove(units.sync_engine, "commit", stop)
    assert ran == [["rollback"], ["rollback"]]
    assert notes_of(caught.value) == ""
    assert units.store.names() == []


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", [TimeLimit, Interrupted, asyncio.CancelledError])
def test_an_exception_while_the_server_commits(
    units: Units, kind: type[BaseException], explicit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A time limit, by whatever exception, says nothing about the COMMIT; its connection is discarded."""
    ran: list[Any] = []
    discarded = note_discarded(units)
    dialect = units.sync_engine.dialect
    commit = dialect.do_commit.__wrapped__

    def commits_and_raises(connection: Any) -> None:
        commit(connection)
        raise kind

    def work(session: Session) -> None:
        insert("tea")(session)
        ran.append(register_hooks(units.db))
        checked = dialect.do_commit
        cell = next(cell for cell in checked.__closure__ if cell.cell_contents is commit)
        cell.cell_contents = commits_and_raises

        def restore(session: Session) -> None:
            cell.cell_contents = commit

        event.listen(session, "after_transaction_end", lambda session, transaction: restore(session))
        if explicit:
            session.commit()

    def run() -> None:
        units.run(work)

    with pytest.raises(kind) as caught:
        run()
    assert ran == [["unknown"]]
    assert "its work is discarded" not in caplog.text
    assert "may or may not be saved" in notes_of(caught.value)
    assert len(discarded) == 1
    assert units.store.names() == ["tea"]


@on("postgresql+psycopg", "postgresql+psycopg2", "mariadb+pymysql")
def test_a_signal_handler_raises_during_commit(units: Units) -> None:
    """As the time limits of task queues do, while the driver waits for the server."""
    ran: list[Any] = []
    commit = units.sync_engine.dialect.do_commit.__wrapped__
    assert threading.current_thread() is threading.main_thread()

    def limit(number: int, frame: Any) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, limit)

    def alarm(connection: Any) -> None:
        connection.cursor().execute("SELECT 1")
        signal.raise_signal(signal.SIGALRM)
        commit(connection)

    def work(session: Session) -> None:
        insert("tea")(session)
        ran.append(register_hooks(units.db))
        cell = next(cell for cell in units.sync_engine.dialect.do_commit.__closure__ if cell.cell_contents is commit)
        cell.cell_contents = alarm
        event.listen(session, "after_transaction_end", lambda *_: setattr(cell, "cell_contents", commit))

    try:
        with pytest.raises(TimeLimit) as caught:
            units.run(work)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ran == [["unknown"]]
    assert "may or may not be saved" in notes_of(caught.value)


SLOW_COMMIT = """
CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
DROP TABLE IF EXISTS slow;
CREATE TABLE slow (id int);
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()
"""


def test_the_drivers_own_time_limit(postgresql: Any) -> None:
    """asyncpg's `command_timeout` ends the wait for COMMIT, and not the COMMIT."""
    url = postgresql.url("asyncpg", postgresql.shared_database)
    ran: list[Any] = []

    async def work() -> None:
        db = AsyncDatabase(url, connect_args={"command_timeout": 0.3}, **POOL)
        async with db.engine.begin() as connection:
            for statement in SLOW_COMMIT.strip().split(";\n"):
                await connection.exec_driver_sql(statement)
        with pytest.raises(TimeoutError) as caught:
            async with db.session_scope() as session:
                await session.execute(text("INSERT INTO slow VALUES (1)"))
                ran.append(register_hooks(db))
        assert "may or may not be saved" in notes_of(caught.value)
        assert db.engine.pool.checkedout() == 0
        await db.dispose()

    asyncio.run(work())
    assert ran == [["unknown"]]


def test_late_work_says_that_it_may_be_saved(postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What follows the response is reported by the log alone."""
    store = Store("postgresql+asyncpg", postgresql)
    store.clear()
    proxy = Proxy(store.url)
    db = AsyncDatabase(proxy.url, **POOL)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        await db.session.run_sync(insert("tea"))
        proxy.lose_answer_to(b"COMMIT")

    async def serve() -> None:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
        with pytest.raises(DBAPIError):
            await SessionScopeMiddleware(app, db)(scope, receive, send)
        await db.dispose()

    async def receive() -> Any:
        return await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        pass

    asyncio.run(serve())
    assert wait_for(lambda: store.names() == ["tea"])
    messages = errors_in(caplog)
    assert any("the work after the response may not have been saved" in message for message in messages)
    assert not any("was not saved" in message for message in messages)
    proxy.close()
    store.engine.dispose()


@pytest.mark.parametrize("status", [201, 503])
def test_a_request_that_catches_it(status: int, postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It may answer as it likes; only a success is reported, since only that claims something."""
    store = Store("postgresql+psycopg", postgresql)
    store.clear()
    proxy = Proxy(store.url)
    db = FlaskPlugin(proxy.url, **POOL)
    app = Flask(__name__)
    db.init_app(app)

    @app.post("/")
    def endpoint() -> Any:
        insert("tea")(db.session)
        proxy.lose_answer_to(b"COMMIT")
        try:
            db.session.commit()
        except DBAPIError:
            db.session.rollback()
        return "", status

    assert app.test_client().post("/").status_code == status
    claims = [message for message in errors_in(caplog) if "not known to be true" in message]
    assert len(claims) == (status == 201)
    assert all("POST /" in message and "status 201" in message for message in claims)
    db.database_for(app).dispose()
    proxy.close()
    store.engine.dispose()


def test_an_error_handler_that_makes_it_a_success(postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The COMMIT of the request itself: its handler may return a 200, and the log says what that is worth."""
    store = Store("postgresql+psycopg", postgresql)
    store.clear()
    proxy = Proxy(store.url)
    db = FlaskPlugin(proxy.url, **POOL)
    app = Flask(__name__)
    db.init_app(app)

    @app.post("/")
    def endpoint() -> Any:
        insert("tea")(db.session)
        proxy.lose_answer_to(b"COMMIT")
        return "", 201

    @app.errorhandler(DBAPIError)
    def handle(error: DBAPIError) -> Any:
        assert "may or may not be saved" in notes_of(error)
        return "perhaps", 202

    assert app.test_client().post("/").status_code == 202
    assert any("status 202" in message and "not known to be true" in message for message in errors_in(caplog))
    db.database_for(app).dispose()
    proxy.close()
    store.engine.dispose()


def two_engines(postgresql: Any, **options: Any) -> tuple[Any, Proxy]:
    proxy = Proxy(postgresql.url("psycopg"))
    db = Database(
        {"default": postgresql.url("psycopg"), "other": proxy.url},
        binds={Child: "other"}, metadata=Base.metadata, **options,
    )  # fmt: skip
    for engine in db.engines.values():
        Base.metadata.create_all(engine)
    return db, proxy


def test_one_unknown_makes_the_whole_unknown(postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the other engine did; the note and the log name the state of each."""
    db, proxy = two_engines(postgresql)
    with pytest.raises(DBAPIError) as caught, db.session_scope() as session:
        insert("tea")(session)
        session.add(Child(name="cup", parent="saucer"))
        session.connection(bind_arguments={"mapper": Child.__mapper__}).exec_driver_sql(
            "SET session_replication_role = replica"
        )
        session.flush()
        ran = register_hooks(db)
        proxy.lose_answer_to(b"COMMIT")
    assert ran == ["unknown"]
    [message] = errors_in(caplog)
    other = f"127.0.0.1:{db.engines['other'].url.port}"
    with db.session_scope() as session:
        saved = session.get(Parent, "tea") is not None
    state = "committed" if saved else "not committed"
    for said in (message, notes_of(caught.value)):
        assert f"/{db.engines['default'].url.database}: {state}" in said
        assert f"{other}/{db.engines['other'].url.database}: unknown" in said
    db.dispose()
    proxy.close()


def test_a_part_that_is_durable_is_unknown_too(postgresql: Any, caplog: pytest.LogCaptureFixture) -> None:
    """If one engine has committed and the other has refused, neither hook would be true."""
    db, proxy = two_engines(postgresql)
    seen = set()
    for number in range(40):
        with pytest.raises(IntegrityError), db.session_scope() as session:
            insert(f"row {number}")(session)
            add_orphan(session)
            ran = register_hooks(db)
        with db.session_scope() as session:
            partly = session.get(Parent, f"row {number}") is not None
        assert ran == (["unknown"] if partly else ["rollback"])
        seen.add(partly)
        if seen == {True, False}:
            break
    assert seen == {True, False}
    assert "committed" in errors_in(caplog)[0]
    db.dispose()
    proxy.close()


def test_a_savepoint_decides_first(units: Units) -> None:
    """What was registered in a savepoint that was rolled back does not wait for the transaction."""
    ran: list[str] = []

    def work(session: Session) -> None:
        savepoint = session.begin_nested()
        units.db.on_unknown(ran.append, "unknown")
        units.db.on_rollback(ran.append, "rollback")
        savepoint.rollback()

    units.run(work)
    assert ran == ["rollback"]


class Refusal(Exception):
    """An error of a driver, with what it tells about the server's answer."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args)
        vars(self).update(attributes)


class Diagnostics:
    def __init__(self, severity: str) -> None:
        self.severity_nonlocalized = severity


@pytest.mark.parametrize(
    ("sqlstate", "severity", "refused"),
    [
        ("23505", "ERROR", True), ("40001", "ERROR", True), ("57014", "ERROR", True), ("P0001", "ERROR", True),
        ("25P02", "ERROR", True), ("40003", "ERROR", False), ("57P01", "FATAL", False), ("57P01", "ERROR", False),
        ("57P02", "FATAL", False), ("57P05", "FATAL", False), ("08006", "ERROR", False), ("08P01", "FATAL", False),
        ("XX000", "ERROR", False), ("58030", "ERROR", False), ("53100", "PANIC", False), ("23505", None, False),
        (None, None, False),
    ],
)  # fmt: skip
def test_what_postgresql_proves(sqlstate: str, severity: str, refused: bool) -> None:
    backend = backend_for("postgresql")
    dialect = create_engine("postgresql+psycopg://").dialect
    psycopg = Refusal(sqlstate=sqlstate, diag=Diagnostics(severity))
    psycopg2 = Refusal(pgcode=sqlstate, diag=Diagnostics(severity))
    asyncpg = Refusal(sqlstate=sqlstate)
    asyncpg.__cause__ = Refusal(severity_en=severity)
    assert [backend.has_refused_commit(error, dialect) for error in (psycopg, psycopg2, asyncpg)] == [refused] * 3


def test_a_server_without_room_for_prepared_transactions_has_prepared_nothing() -> None:
    """By PostgreSQL's default; psycopg raises an error of its own for the server's, without its code."""
    dialect = create_engine("postgresql+psycopg://").dialect
    driver = dialect.loaded_dbapi
    backend = backend_for("postgresql")
    assert backend.has_refused_commit(driver.NotSupportedError("prepared transactions are disabled"), dialect)
    assert not backend.has_refused_commit(driver.OperationalError("the connection is lost"), dialect)


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ((1213, "deadlock"), True), ((1290, "read-only"), True), ((1062, "duplicate"), True), ((1205, ""), True),
        ((2006, "gone away"), False), ((2013, "lost"), False), ((2055, "lost"), False), ((1927, "killed"), False),
        ((1053, "shutdown"), False), ((1180, "during COMMIT"), False), ((1317, "interrupted"), False), ((), False),
        ((3024, "time"), False), ((1969, "time"), False), (("closed",), False),
    ],
)  # fmt: skip
def test_what_mysql_proves(arguments: tuple[Any, ...], refused: bool) -> None:
    dialect: Any = None
    assert backend_for("mysql").has_refused_commit(Refusal(*arguments), dialect) is refused


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        (sqlite3.SQLITE_BUSY, True), (sqlite3.SQLITE_BUSY_SNAPSHOT, True), (sqlite3.SQLITE_FULL, True),
        (sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY, True), (sqlite3.SQLITE_IOERR, False),
        (sqlite3.SQLITE_IOERR_FSYNC, False), (sqlite3.SQLITE_CORRUPT, False), (None, False),
    ],
)  # fmt: skip
def test_what_sqlite_proves(code: int, refused: bool) -> None:
    dialect: Any = None
    assert backend_for("sqlite").has_refused_commit(Refusal(sqlite_errorcode=code), dialect) is refused


def test_of_any_other_database_only_a_constraint_proves_something() -> None:
    dialect: Any = Refusal(loaded_dbapi=sqlite3)
    other = backend_for("oracle")
    assert other.has_refused_commit(sqlite3.IntegrityError(), dialect)
    assert not other.has_refused_commit(sqlite3.OperationalError(), dialect)


@on("postgresql+psycopg", "postgresql+asyncpg", "mariadb+pymysql")
def test_the_test_kit_can_lose_an_answer(units: Units) -> None:
    """``fail_next_commit(db, "disconnect")`` runs what an app does about an unknown outcome."""

    def work(session: Session) -> None:
        insert("tea")(session)
        register_hooks(units.db)

    def check() -> None:
        with captured_hooks(units.db) as hooks:
            fail_next_commit(units.db, "disconnect")
            with pytest.raises(DBAPIError) as caught:
                units.run(work)
        assert [hook.args for hook in hooks] == [("unknown",)]  # type: ignore[attr-defined]
        assert "may or may not be saved" in notes_of(caught.value)

    if units.is_async:

        async def isolated() -> None:
            async with units.db.isolated():
                with captured_hooks(units.db) as hooks:
                    fail_next_commit(units.db, "disconnect")
                    with pytest.raises(DBAPIError) as caught:
                        await units.arun(work)
                assert [hook.args for hook in hooks] == [("unknown",)]  # type: ignore[attr-defined]
                assert "may or may not be saved" in notes_of(caught.value)

        units.runner.run(isolated())
    else:
        with units.db.isolated():
            check()


@pytest.mark.parametrize("kind", [TimeLimit, Interrupted])
@pytest.mark.parametrize("explicit", [False, True])
def test_an_exception_right_after_the_answer(units: Units, kind: type[BaseException], explicit: bool) -> None:
    """The server has committed, and SQLAlchemy has not yet reported it: that is a commit."""
    ran: list[Any] = []
    dialect = units.sync_engine.dialect
    commit = dialect.do_commit

    def commits_and_raises(connection: Any) -> None:
        dialect.do_commit = commit
        commit(connection)
        raise kind

    def work(session: Session) -> None:
        insert("tea")(session)
        ran.append(register_hooks(units.db))
        dialect.do_commit = commits_and_raises
        if explicit:
            with pytest.raises(kind):
                session.commit()
            session.rollback()

    units.run(work)
    assert ran == [["commit"]]
    assert units.store.names() == ["tea"]


class Guard:
    """What `commits` looks at."""

    def __init__(self, state: Any, *, wrote: bool = True, xid: Any = None) -> None:
        self.commit_state, self.wrote, self.xid = state, wrote, xid


@pytest.mark.parametrize(
    ("guards", "result"),
    [
        ([], "rollback"),
        ([Guard(commits.OPEN)], "rollback"),
        ([Guard(commits.COMMITTED)], "commit"),
        ([Guard(commits.COMMITTED), Guard(commits.COMMITTED)], "commit"),
        ([Guard(commits.UNKNOWN)], "unknown"),
        ([Guard(commits.UNKNOWN), Guard(commits.COMMITTED)], "unknown"),
        ([Guard(commits.UNKNOWN), Guard(commits.OPEN)], "unknown"),
        ([Guard(commits.COMMITTED), Guard(commits.OPEN)], "unknown"),
        ([Guard(commits.COMMITTED, wrote=False), Guard(commits.OPEN)], "rollback"),
        ([Guard(commits.COMMITTED, wrote=False), Guard(commits.COMMITTED), Guard(commits.OPEN)], "unknown"),
        ([Guard(commits.COMMITTING_PREPARED), Guard(commits.PREPARED)], "unknown"),
        ([Guard(commits.PREPARED), Guard(commits.PREPARING), Guard(commits.ROLLED_BACK)], "rollback"),
    ],
)
def test_the_outcome_of_several_engines(guards: list[Guard], result: str) -> None:
    """One unknown makes the whole unknown, and so does a part that is durable, unless it only read."""
    assert commits.outcome(dict(enumerate(guards))) == result


def test_what_the_error_of_a_commit_names() -> None:
    """The engines that have committed, and what to do by hand only where something may be prepared still."""

    def note(*guards: Guard) -> str:
        engines = [create_engine(f"sqlite:///{number}.db") for number in range(len(guards))]
        return str(commits.note_for(dict(zip(engines, guards, strict=True))))

    assert "committed on sqlite:///0.db. Engines" in note(Guard(commits.COMMITTED), Guard(commits.OPEN))
    assert "commit it by hand" in note(Guard(commits.COMMITTED, xid="id"), Guard(commits.PREPARED, xid="id"))
    assert note(Guard(commits.ROLLED_BACK, xid="id")).endswith("rolled back (prepared transaction 'id').")
