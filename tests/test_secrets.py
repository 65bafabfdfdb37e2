"""A failed request shows no SQL, no value and no credential to the client, in the log or in a repr.

Objects that are kept from one request, in use or not, cannot reach anything of another request.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from flask import Flask
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from werkzeug.test import Client

import session_plugin.fastapi
import session_plugin.flask
import session_plugin.starlette
from session_plugin import AsyncDatabase, ConfigurationError, Database, Outcome, ScopeClosedError, asgi, wsgi
from session_plugin.database.interface import core_of
from session_plugin.scope.opening import open_unit_of_work

from .harness import Base, Child, Parent, Store, check_foreign_keys

SECRET = "hunter2"
WORDS = (SECRET, "INSERT", "parent.name", "child")
"""The value, and words of the SQL statement that contains it."""


def fail_to_flush(session: Session) -> None:
    session.add_all([Parent(name=SECRET), Child(name=SECRET, parent=SECRET)])
    session.flush()
    session.execute(Parent.__table__.insert(), {"name": SECRET})


def fail_to_commit(session: Session) -> None:
    session.add(Child(name=SECRET, parent=SECRET))


def note_hook(db: Any) -> None:
    def fail() -> None:
        with db.session_scope(new=True) as session:
            fail_to_flush(session)

    db.on_rollback(fail)


def note_async_hook(db: Any) -> None:
    async def fail() -> None:
        async with db.session_scope(new=True) as session:
            await session.run_sync(fail_to_flush)

    db.on_rollback(fail)


def get_flask(url: str, work: Callable[[Session], None]) -> tuple[Any, Any]:
    db = session_plugin.flask.SessionPlugin(url)
    app = Flask(__name__)
    db.init_app(app)

    @app.get("/")
    def view() -> str:
        note_hook(db)
        work(db.session)
        return "saved"

    response = app.test_client().get("/")
    return db, (response.status_code, response.text, str(response.headers))


def get_wsgi(url: str, work: Callable[[Session], None]) -> tuple[Any, Any]:
    db = Database(url)

    def app(environ: Any, start_response: Any) -> Any:
        note_hook(db)
        work(db.session)
        start_response("200 OK", [])
        return [b"saved"]

    with pytest.raises(IntegrityError):
        Client(wsgi.SessionScopeMiddleware(app, db)).get("/")
    return db, (500, "", "")  # the server's own response


def ask(app: Any) -> tuple[int, str, str]:
    async def main() -> tuple[int, str, str]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            response = await client.get("/")
        return response.status_code, response.text, str(response.headers)

    return asyncio.run(main())


def get_fastapi(url: str, work: Callable[[Session], None]) -> tuple[Any, Any]:
    db = session_plugin.fastapi.SessionPlugin(url)
    app = FastAPI()
    db.init_app(app)

    @app.get("/")
    def endpoint() -> str:
        note_hook(db)
        work(db.session)
        return "saved"

    return db, ask(app)


def get_starlette(url: str, work: Callable[[Session], None]) -> tuple[Any, Any]:
    db = session_plugin.starlette.AsyncSessionPlugin(url.replace("sqlite", "sqlite+aiosqlite"))

    async def endpoint(request: Any) -> Any:
        note_async_hook(db)
        await db.session.run_sync(work)
        return PlainTextResponse("saved")

    app = Starlette(routes=[Route("/", endpoint)])
    db.init_app(app)
    return db, ask(app)


def get_asgi(url: str, work: Callable[[Session], None]) -> tuple[Any, Any]:
    db = AsyncDatabase(url.replace("sqlite", "sqlite+aiosqlite"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        note_async_hook(db)
        await db.session.run_sync(work)
        await PlainTextResponse("saved")(scope, receive, send)

    return db, ask(asgi.SessionScopeMiddleware(app, db))


@pytest.mark.parametrize("work", [fail_to_flush, fail_to_commit])
@pytest.mark.parametrize("get", [get_flask, get_wsgi, get_fastapi, get_starlette, get_asgi])
def test_a_failed_request_reveals_nothing(
    get: Any, work: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture, checked_keys: None
) -> None:
    """Neither the response nor the plugin's log nor the repr of the database shows SQL or a value."""
    store = Store("sqlite+pysqlite", tmp_path / "test.db")
    caplog.set_level(logging.INFO, logger="session_plugin")
    db, (status, *response_parts) = get(f"sqlite:///{tmp_path / 'test.db'}", work)
    assert status == 500
    ours = [record for record in caplog.records if record.name == "session_plugin"]
    assert ours
    formatted = [logging.Formatter().format(record) for record in ours]
    for shown in [*response_parts, *(record.getMessage() for record in ours), repr(db), str(db)]:
        assert not [word for word in WORDS if word in shown], shown
    assert not [line for line in formatted if SECRET in line]
    assert store.names() == []
    store.engine.dispose()
    disposed = db.engine.dispose()
    if disposed is not None:
        asyncio.run(disposed)


@pytest.fixture
def checked_keys() -> Any:
    """Foreign keys are checked on every connection to SQLite, as on other databases."""
    event.listen(Engine, "connect", check_foreign_keys)
    yield
    event.remove(Engine, "connect", check_foreign_keys)


def test_no_public_object_shows_a_password_or_a_value() -> None:
    url = f"postgresql+psycopg://u:{SECRET}@h/d?password={SECRET}"
    error = IntegrityError(f"INSERT {SECRET}", {"name": SECRET}, Exception(f"DETAIL: ({SECRET})"))
    db = Database(url)
    plugin = session_plugin.flask.SessionPlugin(url)
    plugin.init_app(Flask(__name__))
    scope = open_unit_of_work(core_of(db), origin="GET /orders")
    shown = [db, plugin, plugin._configuration, scope, Outcome(500, error), wsgi, db.scoped_session]
    for thing in shown:
        assert SECRET not in repr(thing) + str(thing)


def test_a_rollback_that_fails_is_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    db = Database("sqlite://")

    def fail(connection: Any) -> None:
        raise RuntimeError(SECRET)

    event.listen(db.engine, "rollback", fail)
    with pytest.raises(ZeroDivisionError), db.session_scope() as session:
        session.execute(text("SELECT 1"))
        raise ZeroDivisionError
    assert "ROLLBACK failed" in caplog.text
    assert "(RuntimeError)" in caplog.text
    assert SECRET not in caplog.text
    db.dispose()


def test_a_path_cannot_forge_a_line_in_the_log() -> None:
    scope = open_unit_of_work(core_of(Database("sqlite://")), origin="GET /x\nERROR all is lost")
    assert "\n" not in str(scope)
    assert "\n" not in scope.closed_message


# -- one request and another -----------------------------------------------------------------------


@pytest.fixture
def db() -> Any:
    db = Database("sqlite://", metadata=Base.metadata)
    db.create_all()
    yield db
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


def saved(db: Database[Session]) -> list[str]:
    with sessionmaker(db.engine)() as session:
        return sorted(session.scalars(text("SELECT name FROM parent")))


class Requests:
    """A WSGI app that runs the function that a test gives it, once per request."""

    def __init__(self, db: Database[Session]) -> None:
        self.db = db
        self.kept: dict[str, Any] = {}
        self.client = Client(wsgi.SessionScopeMiddleware(self, db))
        self.work: Callable[[], None] = lambda: None

    def __call__(self, environ: Any, start_response: Any) -> Any:
        self.work()
        start_response("200 OK", [])
        return [b""]

    def do(self, work: Callable[[], None]) -> None:
        self.work = work
        self.client.post("/").close()


def test_objects_kept_from_a_request_cannot_reach_another(db: Database[Session]) -> None:
    """A kept session, scope, context or generator raises ScopeClosedError and leaves the other request's work alone."""
    requests, kept = Requests(db), {}

    def generator() -> Any:
        with db.session_scope() as session:
            while True:
                yield session

    def first() -> None:
        kept.update(session=db.session, scope=db.scope, context=contextvars.copy_context(), generator=generator())
        next(kept["generator"])
        try:
            db.session.execute(text("SELECT nonsense"))
        except Exception as error:
            kept["error"] = error
        db.session.rollback()

    def second() -> None:
        mine = db.session
        mine.add(Parent(name="mine"))
        assert mine is not kept["session"]
        assert next(kept["generator"]) is kept["session"]
        for reach in (
            lambda: kept["session"].execute(text("DELETE FROM parent")),
            lambda: kept["scope"].session.scalar(text("SELECT 1")),
            lambda: kept["context"].run(lambda: db.session),
        ):
            with pytest.raises(ScopeClosedError):
                reach()
        with kept["context"].run(db.session_scope) as independent:
            assert independent is mine  # entered here, in this request's context

        def in_its_context() -> Any:
            with db.session_scope(new=True) as own:
                return own

        assert kept["context"].run(in_its_context) not in (mine, kept["session"])
        kept["scope"].doom("a stranger")

    requests.do(first)
    requests.do(second)
    assert saved(db) == ["mine"]
    kept["generator"].close()


def test_threads_and_tasks_with_a_leftover_context_are_refused(db: Database[Session]) -> None:
    requests = Requests(db)
    results: list[Any] = []
    with ThreadPoolExecutor(1) as pool:

        def first() -> None:
            _ = db.session
            context = contextvars.copy_context()
            pool.submit(context.run, lambda: None).result()
            results.append(context)

        requests.do(first)

        def second() -> None:
            db.session.add(Parent(name="mine"))
            results.append(pool.submit(results[0].run, lambda: db.session).exception())
            results.append(pool.submit(lambda: db.session).exception())

        requests.do(second)
    assert isinstance(results[1], ScopeClosedError)
    assert "a thread does not inherit one" in str(results[2])
    assert saved(db) == ["mine"]


def test_a_recycled_id_is_another_session(db: Database[Session]) -> None:
    """No state is looked up by an object's id: each session starts empty, even at a recycled memory address."""
    seen: set[int] = set()
    for number in range(200):
        with db.session_scope() as session:
            assert not [*session] and db.scope.session is session
            assert not session.info
            session.info["number"] = number
            seen.add(id(session))
        del session
        gc.collect(0)
    assert len(seen) < 200  # ids were recycled


def test_a_url_in_a_note_on_an_error_shows_no_password(tmp_path: Any) -> None:
    """A URL that is shown in a note on an error contains neither its password nor its query."""
    engine = create_engine(f"sqlite:///file:{tmp_path}/x.db?uri=true&password={SECRET}")
    assert SECRET not in session_plugin.exceptions.url_for_message(engine.url)


@pytest.mark.parametrize("driver", ["psycopg", "nodriver"])
def test_a_password_with_an_at_sign_is_refused_and_not_shown(driver: str) -> None:
    """An unquoted ``@`` ends the password, and the rest of it becomes part of the host."""
    with pytest.raises(ConfigurationError, match=r"urllib\.parse\.quote_plus") as raised:
        Database(f"postgresql+{driver}://user:p@{SECRET}@localhost/shop")
    assert SECRET not in str(raised.value)


def test_the_host_of_a_users_engine_shows_no_password() -> None:
    engine = create_engine(f"postgresql+psycopg://user:p@{SECRET}@localhost/shop")
    with pytest.raises(ConfigurationError, match="localhost") as raised:
        AsyncDatabase(engine)
    assert SECRET not in str(raised.value)
