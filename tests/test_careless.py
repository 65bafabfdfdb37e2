"""Mistakes of a caller raise an error of session_plugin at once, which says what to do and contains no password.

Each row is what the caller does, the exception, and a regular expression for its message.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import re
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from flask import Flask
from sqlalchemy import create_engine, event, func, select, text
from sqlalchemy.engine import IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

import session_plugin.asgi
import session_plugin.flask
import session_plugin.starlette
import session_plugin.wsgi
from session_plugin import (
    AsyncDatabase,
    ConcurrentUseError,
    ConfigurationError,
    Database,
    Decision,
    NoScopeError,
    Policy,
    PolicyError,
    ScopeClosedError,
    TransactionAbortedError,
    exceptions,
    manual,
    read_only,
)
from session_plugin.database.interface import core_of

from .harness import Base, Parent, insert
from .units import Units, on

ROOT = Path(__file__).parent.parent
MEMORY, ASYNC_MEMORY = "sqlite://", "sqlite+aiosqlite://"
SECRET = "postgresql+psycopg://u:secret@h/d?password=secret"

Wsgi = session_plugin.wsgi.SessionScopeMiddleware
Asgi = session_plugin.asgi.SessionScopeMiddleware
FlaskPlugin = session_plugin.flask.SessionPlugin
SyncPlugin = session_plugin.starlette.SessionPlugin
AsyncPlugin = session_plugin.starlette.AsyncSessionPlugin


async def a_coroutine_function(*args: Any) -> Any:
    """An async function where a plain function is required."""


class AsyncCallable:
    async def __call__(self) -> None:
        """An async function where a plain function is required."""


def app(*args: Any) -> Any:
    """A WSGI or ASGI app that is never called."""


def flask_app(**config: Any) -> Flask:
    made = Flask("careless")
    made.config.update(config)
    return made


def twice(plugin: Any, app: Any) -> None:
    plugin.init_app(app)
    plugin.init_app(app)


def after_the_first_request() -> None:
    app = flask_app()
    app.test_client().get("/")
    FlaskPlugin(MEMORY).init_app(app)


async def ignore(*args: Any) -> dict[str, str]:
    return {"type": "lifespan.startup"}


def after_the_start() -> None:
    app = FastAPI()
    app.middleware_stack = app.build_middleware_stack()
    AsyncPlugin(ASYNC_MEMORY).init_app(app)


AT_CONSTRUCTION: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("nothing", lambda: Database(), ConfigurationError, "URL.*first argument"),
    ("None", lambda: Database(None), ConfigurationError, "No database is configured"),
    ("no engines", lambda: Database({}), ConfigurationError, "No database is configured"),
    ("url=", lambda: Database(url=SECRET), ConfigurationError, "first argument"),
    ("an empty URL", lambda: Database(""), ConfigurationError, "dialect\\+driver"),
    ("a path", lambda: Database("shop.db"), ConfigurationError, "dialect\\+driver"),
    ("a URL of two slashes", lambda: Database("sqlite://shop.db"), ConfigurationError, "sqlite:///relative/path"),
    ("an invalid port", lambda: Database("postgresql://u:secret@h:p/d"), ConfigurationError, "dialect\\+driver"),
    ("an old dialect", lambda: Database("postgres://u:secret@h/d"), ConfigurationError, "has no dialect for"),
    ("bytes", lambda: Database(SECRET.encode()), ConfigurationError, "type bytes.*Give a URL"),
    ("a list", lambda: Database([SECRET]), ConfigurationError, "type list.*Give a URL"),
    ("a path object", lambda: Database(Path("x.db")), ConfigurationError, "Give a URL"),
    ("a session", lambda: Database(Session()), ConfigurationError, "type Session"),
    ("a database", lambda: Database(Database(MEMORY)), ConfigurationError, "a plugin also takes a Database"),
    ("a function", lambda: Database(lambda: MEMORY), ConfigurationError, "a plugin also takes"),
    ("a missing driver", lambda: Database(f"mysql+cymysql{SECRET[18:]}"), ConfigurationError, "pip install cymysql"),
    ("an async URL", lambda: Database(f"postgresql+asyncpg{SECRET[18:]}"), ConfigurationError, "Use AsyncDatabase"),
    ("a sync URL", lambda: AsyncDatabase("sqlite://"), ConfigurationError, "sqlite\\+aiosqlite"),
    ("an engine and options", lambda: Database(engine(), pool_size=3), ConfigurationError, "to create_engine"),
    ("an async engine", lambda: Database(create_async_engine(ASYNC_MEMORY)), ConfigurationError, "to AsyncDatabase"),
    ("a secret engine", lambda: AsyncDatabase(create_engine(SECRET)), ConfigurationError, "AsyncEngine to"),
    ("two sources", lambda: Database(MEMORY, bind=engine()), ConfigurationError, "Give one of them"),
    ("an async sessionmaker", lambda: Database(async_sessionmaker(engine())), ConfigurationError, "of Session"),
    ("a sessionmaker", lambda: AsyncDatabase(sessionmaker(engine())), ConfigurationError, "subclass of AsyncSession"),
    ("an async class", lambda: Database(MEMORY, class_=AsyncSession), ConfigurationError, "subclass of Session"),
    ("a sync class", lambda: AsyncDatabase(ASYNC_MEMORY, class_=Session), ConfigurationError, "of AsyncSession"),
    ("a name of a class", lambda: Database(MEMORY, class_="Session"), ConfigurationError, "subclass of Session"),
    ("a session as class", lambda: Database(MEMORY, class_=Session()), ConfigurationError, "subclass of Session"),
    ("no metadata", lambda: Database(MEMORY, metadata=Base), ConfigurationError, "Give Base.metadata"),
    ("binds as a list", lambda: Database(MEMORY, binds=[Parent]), ConfigurationError, "must be a mapping"),
    ("binds to None", lambda: Database(MEMORY, binds={Parent: None}), ConfigurationError, "Give a URL, an Engine"),
    ("binds to a URL", lambda: Database(MEMORY, binds={Parent: SECRET}), ConfigurationError, "give an Engine"),
    ("binds to no engine", lambda: Database(MEMORY, binds={Parent: "r"}), ConfigurationError, "'default'. Name one"),
    ("binds of a name", lambda: Database(MEMORY, binds={SECRET: "default"}), ConfigurationError, "Give a mapped class"),
    ("binds to async", lambda: Database(MEMORY, binds={Parent: create_async_engine(ASYNC_MEMORY)}), ConfigurationError,
     "does not fit"),
    ("an unknown option", lambda: Database(SECRET, poolsize=3), ConfigurationError, "poolsize.*Correct"),
    ("a number as string", lambda: Database("sqlite:///x.db", pool_timeout="5"), ConfigurationError, "int\\("),
    ("a wrong value", lambda: Database(MEMORY, echo="loud"), ConfigurationError, "echo.*Correct"),
    ("a policy's name", lambda: Database(MEMORY, policy="read_only"), PolicyError, "Give commit_on_success"),
    ("None for a policy", lambda: Database(MEMORY, policy=None), PolicyError, "Give commit_on_success"),
    ("an async policy", lambda: Database(MEMORY, policy=a_coroutine_function), PolicyError, "a plain function"),
    ("a policy of None", lambda: Policy(None), PolicyError, "takes one Outcome"),
    ("a policy of no argument", lambda: SyncPlugin(policy=lambda: True), PolicyError, "takes one Outcome"),
    ("a bare decorator", lambda: Database(MEMORY).policy(lambda: None), PolicyError, "@db.policy\\("),
    ("a decorated number", lambda: Database(MEMORY).policy(manual)(3), ConfigurationError, "Put it directly above"),
    ("the app as source", lambda: FlaskPlugin(flask_app()), ConfigurationError, "db.init_app\\(app\\)"),
    ("the ASGI app as source", lambda: AsyncPlugin(FastAPI()), ConfigurationError, "db.init_app\\(app\\)"),
    ("a source of an argument", lambda: FlaskPlugin(lambda app: MEMORY), ConfigurationError, "without arguments"),
    ("an async source", lambda: AsyncPlugin(a_coroutine_function), ConfigurationError, "must be a plain function"),
    ("init_app(None)", lambda: FlaskPlugin(MEMORY).init_app(None), ConfigurationError, "Flask.* returned"),
    ("init_app(Flask)", lambda: FlaskPlugin(MEMORY).init_app(Flask), ConfigurationError, "Flask.* returned"),
    ("another framework", lambda: AsyncPlugin().init_app(Flask("x")), ConfigurationError, "before you wrap the app"),
    ("a router", lambda: AsyncPlugin().init_app(APIRouter()), ConfigurationError, "takes a Starlette or FastAPI app"),
    ("init_app twice", lambda: twice(FlaskPlugin(MEMORY), flask_app()), ConfigurationError, "Call it once"),
    ("init_app twice, ASGI", lambda: twice(SyncPlugin(MEMORY), FastAPI()), ConfigurationError, "Call it once"),
    ("init_app too late", after_the_first_request, ConfigurationError, "where you create the app"),
    ("init_app too late, ASGI", after_the_start, ConfigurationError, "where you create the app"),
    ("no configuration", lambda: FlaskPlugin().init_app(flask_app()), ConfigurationError, "SQLALCHEMY_DATABASE_URI"),
    ("a wrong key", lambda: FlaskPlugin().init_app(flask_app(SQLALCHEMY_ENGINES=SECRET)), ConfigurationError,
     "SQLALCHEMY_ENGINES.*must be a dict"),
    ("wrong options", lambda: FlaskPlugin(MEMORY).init_app(flask_app(SQLALCHEMY_ENGINE_OPTIONS=[1])),
     ConfigurationError, "must be a dict"),
    ("an async one in Flask", lambda: FlaskPlugin(AsyncDatabase(ASYNC_MEMORY)).init_app(flask_app()),
     ConfigurationError, "needs a database of class Database"),
    ("a middleware with a URL", lambda: Wsgi(app, SECRET), ConfigurationError, "with a Database"),
    ("a middleware without a database", lambda: Asgi(app, None), ConfigurationError, "with a Database"),
    ("arguments swapped", lambda: Asgi(Database(MEMORY), app), ConfigurationError, "\\(app, database\\)"),
    ("a middleware without an app", lambda: Wsgi(None, Database(MEMORY)), ConfigurationError, "cannot be called"),
    ("a policy to find policies", lambda: Asgi(app, Database(MEMORY), find_policy=read_only), ConfigurationError,
     "its find_policy"),
    ("an async one under WSGI", lambda: Wsgi(app, AsyncDatabase(ASYNC_MEMORY)), ConfigurationError, "cannot await"),
    ("no metadata at all", lambda: Database(MEMORY).create_all(), ConfigurationError, "metadata=Base.metadata"),
    ("no default engine", lambda: Database({"r": MEMORY}).engine, ConfigurationError, "'r'. Take"),
    ("no init_app", lambda: FlaskPlugin(MEMORY).session, NoScopeError, "call db.init_app\\(app\\)"),
    ("no init_app, ASGI", lambda: asyncio.run(AsyncPlugin(ASYNC_MEMORY).get_session()), NoScopeError, "init_app"),
    ("no init_app, create_all", lambda: SyncPlugin(MEMORY).create_all(), NoScopeError, "call db.init_app"),
    ("a session at import", lambda: Database(MEMORY).session, NoScopeError, "here,.*`with db.session_scope"),
    ("an async session at import", lambda: AsyncDatabase(ASYNC_MEMORY).session, NoScopeError, "`async with"),
    ("use() outside", lambda: Database(MEMORY).use(read_only), NoScopeError, "open one"),
    ("doom() outside", lambda: Database(MEMORY).doom(), NoScopeError, "open one"),
    ("on_commit() outside", lambda: Database(MEMORY).on_commit(print), NoScopeError, "open one"),
    ("on_rollback() outside", lambda: Database(MEMORY).on_rollback(print), NoScopeError, "open one"),
    ("scoped_session outside", lambda: Database(MEMORY).scoped_session(), NoScopeError, "open one"),
]  # fmt: skip


def engine() -> Any:
    return create_engine(MEMORY)


@pytest.mark.parametrize(
    ("act", "error", "names"), [row[1:] for row in AT_CONSTRUCTION], ids=[r[0] for r in AT_CONSTRUCTION]
)
def test_configuration_mistakes_raise_at_once(act: Callable[[], Any], error: type[Exception], names: str) -> None:
    """A mistake in the configuration raises an error before any request and any statement."""
    with pytest.raises(error, match=f"(?s){names}") as caught:
        act()
    assert "secret" not in str(caught.value)


def select_one(db: Any) -> Any:
    return db.session.execute(text("SELECT 1"))


INSIDE: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("no hook", lambda db: db.on_commit(None), ConfigurationError, "db.on_commit\\(send, order_id\\)"),
    ("a called hook", lambda db: db.on_rollback([].append(1)), ConfigurationError, "Give the function"),
    ("a coroutine function", lambda db: db.on_commit(a_coroutine_function), ConfigurationError, "or use AsyncDatabase"),
    ("an async partial", lambda db: db.on_commit(functools.partial(a_coroutine_function)), ConfigurationError, "plain"),
    ("an async object", lambda db: db.on_commit(AsyncCallable()), ConfigurationError, "The hook AsyncCallable"),
    ("a hook's arguments", lambda db: db.on_commit(lambda order: None), ConfigurationError, "'order'. Give its"),
    ("use(None)", lambda db: db.use(None), PolicyError, "Give commit_on_success"),
    ("use() of a coroutine function", lambda db: db.use(a_coroutine_function), PolicyError, "a plain function"),
    ("use() too late", lambda db: (select_one(db), db.use(read_only)), PolicyError, "Choose the policy before"),
    ("a policy that raises", lambda db: (db.use(lambda o: 1 / 0), select_one(db)), PolicyError, "ZeroDivisionError"),
    ("a policy of True", lambda db: (db.use(lambda o: True), select_one(db)), PolicyError, "Decision\\(commit"),
    ("a decision of strings", lambda db: (db.use(lambda o: Decision("no", "")), select_one(db)), PolicyError, "True"),
    ("another session", lambda db: db.scoped_session.registry.set(Session()), ConfigurationError, "cannot replace it"),
    ("a doomed commit", lambda db: (db.doom(None), select_one(db), db.session.commit()), TransactionAbortedError,
     "session_scope\\(new=True\\)"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "names"), [row[1:] for row in INSIDE], ids=[row[0] for row in INSIDE])
def test_mistakes_in_a_unit_of_work_raise(act: Callable[[Any], Any], error: type[Exception], names: str) -> None:
    """A mistake in a unit of work raises at the call or when the policy is called, and nothing is saved."""
    db = Database(MEMORY, metadata=Base.metadata)
    db.create_all()
    with pytest.raises(error, match=names):
        with db.session_scope() as session:
            session.add(Parent(name="tea"))
            session.flush()
            act(db)
    with db.session_scope() as session:
        assert session.scalar(select(func.count()).select_from(Parent)) == 0
    assert db.engine.pool.checkedout() == 0
    db.dispose()


@pytest.mark.parametrize("reason", [None, "", "dry run"])
def test_doom_rolls_back_for_any_reason(reason: Any) -> None:
    """doom() rolls back for any reason, including an empty one."""
    db = Database(MEMORY, metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:
        session.add(Parent(name="tea"))
        db.doom(reason)
    with db.session_scope() as session:
        assert session.scalar(select(func.count()).select_from(Parent)) == 0
    db.dispose()


def test_a_hook_without_a_signature_is_accepted() -> None:
    """A hook without a signature is accepted, because its arguments cannot be checked before the call."""
    seen: list[str] = []
    db = Database(MEMORY)
    with db.session_scope():
        db.on_commit(type, "tea")  # a builtin without a signature
        db.on_commit(seen.append, "tea")
    assert seen == ["tea"]
    db.dispose()


def test_builtins_without_a_signature_are_accepted() -> None:
    """Builtins without a signature are accepted as a source and as a policy."""
    Policy(type)
    SyncPlugin(dict)


def test_arguments_take_precedence_over_a_session_factory() -> None:
    """Arguments of `Database` take precedence over those of a session factory."""

    class Own(Session):
        """A session class."""

    other = create_engine(MEMORY)
    maker = sessionmaker(engine(), binds={Parent: engine()})
    db = Database(maker, class_=Own, binds={Parent: other})
    assert (core_of(db).engines.binds, issubclass(db.sessionmaker.class_, Own)) == ({Parent: other}, True)
    assert core_of(Database(maker)).engines.binds == maker.kw["binds"]


def test_the_configuration_takes_precedence_over_bind() -> None:
    """Flask's configuration takes precedence over ``bind``."""
    plugin = FlaskPlugin(bind=create_engine("sqlite:///production.db"))
    app = flask_app(SQLALCHEMY_DATABASE_URI=MEMORY)
    plugin.init_app(app)
    assert "production" not in str(plugin.database_for(app).engine.url)


def test_a_thread_does_not_inherit_the_unit_of_work() -> None:
    """The error in a new thread says that threads do not inherit the unit of work."""
    db = Database(MEMORY)
    caught_errors: list[BaseException] = []

    def work() -> None:
        try:
            _ = db.session
        except NoScopeError as error:
            caught_errors.append(error)

    with db.session_scope():
        thread = threading.Thread(target=work, name="mailer")
        thread.start()
        thread.join()
    assert "in the thread mailer (a thread does not inherit one)" in str(caught_errors[0])
    assert "`with db.session_scope()" in str(caught_errors[0])
    db.dispose()


def test_a_thread_without_an_event_loop_is_not_advised_to_write_async_with() -> None:
    """A thread cannot write `async with`: where a database is async, the error says what a thread can do."""
    db = AsyncDatabase(ASYNC_MEMORY)

    async def in_a_loop() -> None:
        with pytest.raises(NoScopeError, match=r"In a thread of your own, open one: `async with"):
            _ = db.session

    async def scenario() -> None:
        async with db.session_scope():
            with ThreadPoolExecutor(1) as pool:
                with pytest.raises(NoScopeError, match=r"this thread has none: .*run_coroutine_threadsafe.*or use a D"):
                    pool.submit(lambda: db.session).result()
                pool.submit(asyncio.run, in_a_loop()).result()
        await db.dispose()

    asyncio.run(scenario())


# -- two at once -----------------------------------------------------------------------------------


def async_units(act: Callable[[AsyncDatabase[AsyncSession]], Any]) -> Any:
    async def main() -> Any:
        db = AsyncDatabase(ASYNC_MEMORY, metadata=Base.metadata)
        await db.create_all()
        try:
            return await asyncio.wait_for(act(db), 20)
        finally:
            assert db.engine.pool.checkedout() == 0
            await db.dispose()

    return asyncio.run(main())


async def count(session: AsyncSession) -> int:
    return await session.scalar(select(func.count()).select_from(Parent)) or 0


async def flush(session: AsyncSession) -> None:
    await session.flush()


@pytest.mark.parametrize("connected", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("acts", [(flush, flush), (count, flush), (flush, count)], ids=["2 flushes", "cf", "fc"])
def test_two_tasks_at_once_raise_concurrent_use_error(acts: Any, connected: bool) -> None:
    """If two tasks use a session at once, the second raises an error that names session_scope(new=True).

    This also holds if they flush, and if neither has used the session before.
    """

    async def work(db: AsyncDatabase[AsyncSession]) -> list[Any]:
        async with db.session_scope() as session:
            if connected:
                await count(session)
            session.add(Parent(name="tea"))
            results = await asyncio.gather(*(act(session) for act in acts), return_exceptions=True)
            await session.rollback()
            return results

    first, second = async_units(work)
    assert not isinstance(first, Exception)
    assert isinstance(second, ConcurrentUseError)
    assert "session_scope(new=True)" in str(second)


def test_a_flush_that_failed_before_it_connected_can_be_repeated_by_the_end() -> None:
    """The end, which runs in a task of its own, is no concurrent use of the session by the task that waits for it."""

    async def work(db: AsyncDatabase[AsyncSession]) -> int:
        async with db.session_scope() as session:

            @event.listens_for(session.sync_session, "before_flush")
            def refuse(session: Session, context: Any, instances: Any) -> None:
                if not row.name:
                    raise ValueError("the name is empty")

            row = Parent(name="")
            session.add(row)
            with pytest.raises(ValueError, match="the name is empty"):
                await session.flush()
            row.name = "tea"
        async with db.session_scope() as session:
            return await count(session)

    assert async_units(work) == 1


def test_a_flush_within_a_flush_raises_sqlalchemys_error() -> None:
    """A flush inside a flush raises SQLAlchemy's own error."""
    db = Database(MEMORY, metadata=Base.metadata)
    db.create_all()
    with db.session_scope() as session:

        @event.listens_for(session, "after_flush")
        def flush_again(session: Session, context: Any) -> None:
            with pytest.raises(InvalidRequestError, match="already flushing"):
                session.flush()

        session.add(Parent(name="tea"))
    db.dispose()


def test_a_cached_statement_does_not_use_the_session() -> None:
    """A task whose statement is served from a cache, as with dogpile, does not count as a user of the session."""

    async def work(db: AsyncDatabase[AsyncSession]) -> int | None:
        served, done = asyncio.Event(), asyncio.Event()

        async def ask_the_cache() -> None:
            await session.execute(select(1), execution_options={"cached": True})
            served.set()
            await done.wait()

        async with db.session_scope() as session:

            @event.listens_for(session.sync_session, "do_orm_execute")
            def answer(state: Any) -> Any:
                if state.execution_options.get("cached"):
                    return IteratorResult(SimpleResultMetaData(["n"]), iter([(1,)]))
                return None

            async with asyncio.TaskGroup() as group:
                group.create_task(ask_the_cache())
                await served.wait()
                try:
                    return await session.scalar(select(2))
                finally:
                    done.set()

    assert async_units(work) == 2


def test_an_outer_block_that_ends_before_a_joined_one_raises() -> None:
    """If an outer block ends before a joined block in another task, it raises and commits nothing."""

    async def work(db: AsyncDatabase[AsyncSession]) -> tuple[int, Any]:
        half_done, go_on = asyncio.Event(), asyncio.Event()

        async def join() -> None:
            async with db.session_scope() as session:
                session.add(Parent(name="half"))
                half_done.set()
                await go_on.wait()
                session.add(Parent(name="rest"))

        with pytest.raises(
            ConcurrentUseError, match=r"Await the task before the block ends, or open a session_scope\(new=True\)"
        ):
            async with db.session_scope():
                left_behind = asyncio.create_task(join())
                await half_done.wait()
        go_on.set()
        (error,) = await asyncio.gather(left_behind, return_exceptions=True)
        async with db.session_scope() as session:
            return await count(session), error

    saved, error = async_units(work)
    assert saved == 0
    assert isinstance(error, ScopeClosedError)


def test_an_awaited_joined_block_is_committed() -> None:
    """The work of a joined block in a task is committed if the outer block awaits the task."""

    async def work(db: AsyncDatabase[AsyncSession]) -> int:
        async def join() -> None:
            async with db.session_scope() as session:
                session.add(Parent(name="half"))

        async with db.session_scope():
            await asyncio.create_task(join())
        async with db.session_scope() as session:
            return await count(session)

    assert async_units(work) == 1


def test_a_task_may_go_on_after_its_joined_block() -> None:
    """A task may go on after it has left its joined block, because the work in the block is complete."""

    async def work(db: AsyncDatabase[AsyncSession]) -> int:
        left, go_on = asyncio.Event(), asyncio.Event()

        async def join() -> None:
            async with db.session_scope() as session:
                session.add(Parent(name="whole"))
            left.set()
            await go_on.wait()

        async with db.session_scope():
            going_on = asyncio.create_task(join())
            await left.wait()
        go_on.set()
        await going_on
        async with db.session_scope() as session:
            return await count(session)

    assert async_units(work) == 1


def test_a_joined_block_in_an_unfinished_generator_does_not_prevent_the_commit() -> None:
    """A joined block in a generator that is not read to its end does not prevent the commit."""

    async def work(db: AsyncDatabase[AsyncSession]) -> int:
        async def generate() -> AsyncIterator[None]:
            async with db.session_scope() as session:
                session.add(Parent(name="read"))
                yield

        async with db.session_scope():
            generator: Any = generate()
            await anext(generator)
        await generator.aclose()
        async with db.session_scope() as session:
            return await count(session)

    assert async_units(work) == 1


@on("postgresql+psycopg", "postgresql+psycopg2")
def test_a_swallowed_error_of_a_raw_cursor_is_no_success(units: Units) -> None:
    """An error of a raw DBAPI cursor that is swallowed prevents the commit, because libpq reports the state."""

    def work(session: Session) -> None:
        insert("tea")(session)
        cursor = session.connection().connection.cursor()
        with pytest.raises(Exception, match="division by zero"):
            cursor.execute("SELECT 1/0")
        cursor.close()

    with pytest.raises(TransactionAbortedError, match="An error was raised and caught"):
        units.run(work)
    assert units.store.names() == []


# -- the page --------------------------------------------------------------------------------------


def messages() -> list[str]:
    """The first sentence of every error message of the package, with an ellipsis for each variable part."""
    found = []
    for path in sorted(Path(exceptions.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in OURS and node.args:
                found.append(first_sentence(node.args[0]))
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(target).endswith(("_AT_ONCE", "_message")):
                    found.append(first_sentence(node.value))
            elif isinstance(node, ast.FunctionDef) and node.name.endswith("_message"):
                found += [
                    first_sentence(step.value) for step in node.body if isinstance(step, ast.Return) and step.value
                ]
    return sorted({*found} - {"…"})


OURS = {*exceptions.__all__, "_without_secrets"}


def first_sentence(text: ast.expr) -> str:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    whole = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)
    return re.split(r"(?<=[^.])\. |: ", whole)[0].rstrip(".")


@pytest.mark.parametrize("message", messages())
def test_every_message_is_explained(message: str) -> None:
    """errors.md lists the first sentence of every message."""
    page = " ".join((ROOT / "docs/errors.md").read_text().split())
    assert f"`{message}`" in page


def test_the_page_lists_no_obsolete_message() -> None:
    """errors.md lists no message that the package does not raise."""
    page = (ROOT / "docs/errors.md").read_text().split("## Warnings")[0]
    listed = {
        message for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for message in re.findall("`([^`]+)`", row)
    }
    assert listed == {*messages()}
