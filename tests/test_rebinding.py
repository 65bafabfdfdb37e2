"""What names a database may change after its first unit of work, as in test suites: the next one follows, or raises."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from flask import Flask
from sqlalchemy import URL, Engine, create_engine, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from session_plugin import (
    AsyncDatabase,
    ConfigurationError,
    Database,
    NoScopeError,
    Policy,
    read_only,
    read_only_autocommit,
)
from session_plugin.asgi import SessionScopeMiddleware as ASGIMiddleware
from session_plugin.database.interface import core_of
from session_plugin.fastapi import AsyncSessionPlugin
from session_plugin.fastapi import SessionPlugin as FastAPIPlugin
from session_plugin.flask import SessionPlugin as FlaskPlugin
from session_plugin.wsgi import SessionScopeMiddleware as WSGIMiddleware

from .harness import Base, Parent
from .test_starlette import Lifespan

WHO = text("select name from who")


class Folder:
    """SQLite files, each with its own name in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made: list[Any] = []

    def url(self, name: str, driver: str = "sqlite") -> str:
        """The URL of the file."""
        file = self._path / f"{name}.db"
        if not file.exists():
            engine = create_engine(f"sqlite:///{file}")
            with engine.begin() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                connection.execute(text("create table who (name text)"))
                connection.execute(text(f"insert into who values ('{name}')"))
            engine.dispose()
        return f"{driver}:///{file}"

    def engine(self, name: str, *, is_async: bool = False) -> Any:
        """An engine for the file."""
        driver = "sqlite+aiosqlite" if is_async else "sqlite"
        engine: Any = (create_async_engine if is_async else create_engine)(self.url(name, driver))
        self._made.append(engine)
        return engine

    def dispose(self) -> None:
        """Dispose of the engines."""
        for engine in self._made:
            if isinstance(engine, Engine):
                engine.dispose()
            else:
                asyncio.run(engine.dispose())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path)
    yield folder
    folder.dispose()


def who(db: Any) -> str:
    with db.session_scope() as session:
        return str(session.scalar(WHO))


# -- every adapter -----------------------------------------------------------------------------


def on_flask(source: Any) -> tuple[Any, Callable[[], str]]:
    app, db = Flask(__name__), FlaskPlugin(source)
    db.init_app(app)
    app.add_url_rule("/", view_func=lambda: str(db.session.scalar(WHO)))
    return db, lambda: app.test_client().get("/").text


def on_wsgi(source: Any) -> tuple[Any, Callable[[], str]]:
    db, initialised = FlaskPlugin(source), Flask(__name__)
    db.init_app(initialised)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [db.session.scalar(WHO).encode()]

    wrapped = WSGIMiddleware(app, db)

    def ask(kept: Any = initialised) -> str:
        return b"".join(wrapped({"REQUEST_METHOD": "GET"}, lambda *started: lambda data: None)).decode()

    return db, ask


def asked(app: Any) -> str:
    async def ask() -> str:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/")).text.strip('"')

    return asyncio.run(ask())


def on_fastapi(source: Any) -> tuple[Any, Callable[[], str]]:
    app, db = FastAPI(), FastAPIPlugin(source)
    db.init_app(app)

    @app.get("/")
    def name(session: Annotated[Any, Depends(db.get_session)]) -> str:
        return str(session.scalar(WHO))

    return db, lambda: asked(app)


def on_asgi(source: Any) -> tuple[Any, Callable[[], str]]:
    db, initialised = FastAPIPlugin(source), FastAPI()
    db.init_app(initialised)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        name = await asyncio.to_thread(lambda: db.session.scalar(WHO))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": name.encode()})

    wrapped = ASGIMiddleware(app, db)
    return db, lambda kept=initialised: asked(wrapped)


ADAPTERS = [on_flask, on_wsgi, on_fastapi, on_asgi]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_function_that_names_another_engine(folder: Folder, adapter: Any) -> None:
    """The next request has a session on the engine that the function names then."""
    settings = {"engine": folder.engine("one")}
    db, ask = adapter(lambda: settings["engine"])
    assert ask() == "one"
    settings["engine"] = folder.engine("two")
    assert ask() == "two"
    assert who(db) == "two"
    assert db.engine is settings["engine"]
    assert db.engine.pool.checkedout() == 0


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_session_factory_that_is_bound_anew(folder: Folder, adapter: Any) -> None:
    """The next request has a session on the engine of the factory."""
    factory = sessionmaker(folder.engine("one"))
    db, ask = adapter(factory)
    assert ask() == "one"
    factory.configure(bind=folder.engine("two"))
    assert db.engine.url.database.endswith("two.db")
    assert ask() == "two"


def test_an_async_database_follows_too(folder: Folder) -> None:
    """An async plugin whose function names another engine, and an async factory that is bound anew."""
    settings = {"engine": folder.engine("one", is_async=True)}
    app, db = FastAPI(), AsyncSessionPlugin(lambda: settings["engine"])
    db.init_app(app)

    @app.get("/")
    async def name(session: Annotated[Any, Depends(db.get_session)]) -> str:
        return str(await session.scalar(WHO))

    async def both() -> list[str]:
        names = []
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for each in ("one", "two"):
                settings["engine"] = folder.engine(each, is_async=True)
                names.append((await client.get("/")).json())
                await settings["engine"].dispose()
        return names

    assert asyncio.run(both()) == ["one", "two"]

    async def bound_anew() -> str:
        factory = async_sessionmaker(folder.engine("one", is_async=True))
        database = AsyncDatabase(factory)
        factory.configure(bind=folder.engine("two", is_async=True))
        async with database.session_scope() as session:
            found = str(await session.scalar(WHO))
        await database.engine.dispose()
        return found

    assert asyncio.run(bound_anew()) == "two"


# -- functions ---------------------------------------------------------------------------------


class Settings:
    """Those of an app."""

    url: Any


@pytest.mark.parametrize("make", [str, lambda url: URL.create("sqlite", database=url[10:])])
def test_a_function_that_looks_a_url_up(folder: Folder, make: Any) -> None:
    """A new URL is a new engine, and the connections of the old one are closed; an equal one changes nothing."""
    settings = Settings()
    settings.url = make(folder.url("one"))
    app, db = Flask(__name__), FlaskPlugin(lambda: settings.url)
    db.init_app(app)
    assert who(db) == "one"
    engine = db.engine
    settings.url = make(folder.url("one"))
    assert db.engine is engine
    settings.url = make(folder.url("two"))
    assert (who(db), engine.pool.checkedin()) == ("two", 0)
    db.dispose()


def test_a_function_that_makes_an_engine(folder: Folder) -> None:
    """One that makes another engine at each call does not replace the first one."""
    calls = []

    def make() -> Any:
        calls.append(1)
        return folder.engine("one")

    db = FlaskPlugin(make)
    db.init_app(Flask(__name__))
    engine = db.engine
    for _ in range(3):
        assert who(db) == "one"
    assert db.engine is engine
    assert len(calls) == 3  # the first, and two that show that it makes what it returns


def test_a_function_that_keeps_what_it_made(folder: Folder) -> None:
    """One that calls others, and returns the same engine until a test replaces that, is followed."""
    engines: dict[str, Any] = {}

    def get_engine() -> Any:
        return engines.setdefault("engine", folder.engine("one"))

    db = FlaskPlugin(get_engine)
    db.init_app(Flask(__name__))
    assert who(db) == "one"
    engines["engine"] = folder.engine("two")
    assert who(db) == "two"


def test_a_function_that_may_be_slow_is_called_once_until_dispose(folder: Folder) -> None:
    """One that calls others and returns a URL may ask a server for it; after ``dispose()`` it is called again."""
    names = ["one"]
    calls = []

    def read_url() -> str:
        calls.append(1)
        return folder.url(names[-1])

    db = FlaskPlugin(read_url)
    db.init_app(Flask(__name__))
    assert (who(db), who(db)) == ("one", "one")
    names.append("two")
    assert (who(db), len(calls)) == ("one", 1)
    db.dispose()
    assert who(db) == "two"
    assert (who(db), len(calls)) == ("two", 3)
    db.dispose()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_is_called_again_when_an_app_starts_again(folder: Folder, is_async: bool) -> None:
    """At the shutdown of an ASGI app its engines are disposed of; the next start asks for the database again."""
    names = ["one"]
    app = FastAPI()
    plugin: Any = AsyncSessionPlugin if is_async else FastAPIPlugin
    db = plugin(lambda: folder.url(names[-1], "sqlite+aiosqlite" if is_async else "sqlite"))
    db.init_app(app)

    @app.get("/")
    async def name(session: Annotated[Any, Depends(db.get_session)]) -> str:
        return str(await session.scalar(WHO) if is_async else session.scalar(WHO))

    for each in ("one", "two"):
        names.append(each)
        assert asyncio.run(started(app)) == each


async def started(app: Any) -> str:
    """Return what ``app`` says between its start and its shutdown."""
    async with Lifespan(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return str((await client.get("/")).json())


def test_a_database_that_a_function_names(folder: Folder) -> None:
    """A shared `Database` may be replaced as a whole; a wrong one raises until it is right."""
    databases = {"now": Database(folder.engine("one"))}
    app, db = Flask(__name__), FlaskPlugin(lambda: databases["now"])
    db.init_app(app)
    app.add_url_rule("/", view_func=lambda: str(db.session.scalar(WHO)))
    assert db.database is databases["now"]
    assert app.test_client().get("/").text == "one"
    databases["now"] = Database(folder.engine("two"))
    assert app.test_client().get("/").text == "two"
    assert db.database is databases["now"]
    wrong: Any = AsyncDatabase("sqlite+aiosqlite://")
    databases["now"] = wrong
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="needs a database of class Database"):
            who(db)
    databases["now"] = Database(folder.engine("one"))
    assert who(db) == "one"


def test_a_function_that_looks_up_a_mapping(folder: Folder) -> None:
    """A mapping that is changed in place is another one."""
    named: dict[str, Any] = {"default": {"url": folder.url("one")}}
    db = FlaskPlugin(lambda: named)
    app = Flask(__name__)
    db.init_app(app)
    assert who(db) == "one"
    engine = db.engine
    assert db.engine is engine
    named["default"]["url"] = folder.url("two")
    assert who(db) == "two"
    named["default"] = folder.url("one")
    assert who(db) == "one"
    db.dispose()


def test_a_function_that_no_longer_names_a_database(folder: Folder) -> None:
    """Sessions raise, as before it named one, and are not made on the old database."""
    settings = Settings()
    settings.url = folder.url("one")
    app, db = Flask(__name__), FlaskPlugin(lambda: settings.url)
    db.init_app(app)
    assert who(db) == "one"
    settings.url = None
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="No database is configured"):
            who(db)
    settings.url = folder.url("one")
    assert who(db) == "one"
    db.dispose()


def test_a_shared_database_is_not_replaced_while_it_is_isolated(folder: Folder) -> None:
    """Otherwise a test would write to a database on which nothing is undone."""
    databases = {"now": Database(folder.engine("one"))}
    app, db = Flask(__name__), FlaskPlugin(lambda: databases["now"])
    db.init_app(app)
    with db.isolated():
        databases["now"] = Database(folder.engine("two"))
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"changed inside isolated\(\)"):
                who(db)
    assert who(db) == "two"


def test_an_engine_that_was_replaced_is_disposed_of_with_the_others(folder: Folder) -> None:
    """A session that exists may put a connection into its pool after the change."""
    settings = Settings()
    settings.url = folder.url("one")
    app, db = Flask(__name__), FlaskPlugin(lambda: settings.url)
    db.init_app(app)
    before = db.engine
    with db.session_scope() as session:
        settings.url = folder.url("two")
        with db.session_scope(new=True) as other:
            assert other.scalar(WHO) == "two"
        assert session.scalar(WHO) == "one"
    assert before.pool.checkedin() == 1
    db.dispose()
    assert before.pool.checkedin() == 0


@pytest.mark.parametrize("policy", [read_only_autocommit, read_only])
def test_a_session_that_begins_after_a_change_begins_as_its_policy_says(folder: Folder, policy: Policy) -> None:
    """Also where that needs a second pool for the engine that was replaced."""
    settings = Settings()
    settings.url = folder.url("one")
    app, db = Flask(__name__), FlaskPlugin(lambda: settings.url)
    db.init_app(app)
    for _ in range(2):
        with db.session_scope(policy=policy) as session:
            settings.url = folder.url("two")
            with db.session_scope(new=True) as other:
                assert other.scalar(WHO) == "two"
            assert session.scalar(WHO) == "one"
            with pytest.raises(OperationalError, match="readonly"):
                session.execute(text("insert into who values ('written')"))
        settings.url = folder.url("one")
    made = core_of(db).made_here
    db.dispose()
    assert not any(engine.pool.checkedin() for engine in made)


@pytest.mark.filterwarnings("ignore:.*was deleted before being closed:ResourceWarning")
def test_an_engine_that_was_replaced_on_another_event_loop(folder: Folder) -> None:
    """Its connections ended with their event loop: ``dispose()`` on the next one leaves them alone."""
    settings = Settings()
    settings.url = folder.url("one", "sqlite+aiosqlite")
    db = AsyncSessionPlugin(lambda: settings.url)
    app = FastAPI()
    db.init_app(app)

    async def name() -> str:
        async with db.session_scope() as session:
            return str(await session.scalar(WHO))

    async def name_and_dispose() -> str:
        found = await name()
        assert not core_of(db)._retired
        await db.dispose()
        return found

    assert asyncio.run(name()) == "one"
    settings.url = folder.url("two", "sqlite+aiosqlite")
    assert asyncio.run(name_and_dispose()) == "two"


def test_a_process_that_is_forked_while_a_change_is_looked_for(folder: Folder) -> None:
    """The child does not wait for a lock that a thread of the parent held."""
    db = Database(sessionmaker(folder.engine("one")))
    core = core_of(db)
    assert core._configuring.acquire()
    core.forget_parent()
    assert who(db) == "one"
    assert core._configuring.acquire(blocking=False)


def test_a_function_that_fails_when_a_database_is_replaced(folder: Folder) -> None:
    """What it raises goes through each time, and the next success counts."""
    databases: dict[str, Any] = {"now": Database(folder.engine("one"))}
    calls = []

    def get_database() -> Any:
        calls.append(1)
        if databases["fails"](len(calls)):
            raise LookupError("no database")
        return databases["now"]

    databases["fails"] = lambda count: False
    db = FlaskPlugin(get_database)
    app = Flask(__name__)
    db.init_app(app)
    assert who(db) == "one"
    called = len(calls)
    databases["now"] = Database(folder.engine("two"))
    databases["fails"] = lambda count: count > called + 2  # after the two calls that look for a change
    for _ in range(3):
        with pytest.raises(LookupError):
            who(db)
    databases["fails"] = lambda count: False
    assert who(db) == "two"


# -- session factories -------------------------------------------------------------------------


def test_every_option_of_a_session_factory_is_followed(folder: Folder) -> None:
    """What ``configure()`` sets later is what the next session has."""
    factory = sessionmaker(folder.engine("one"), info={"by": "test"})
    db = Database(bind=factory)
    with db.session_scope() as session:
        assert session.expire_on_commit
    factory.configure(expire_on_commit=False)
    with db.session_scope() as session:
        assert (session.expire_on_commit, session.info["by"]) == (False, "test")


def test_binds_of_a_session_factory_are_followed(folder: Folder) -> None:
    """``configure(binds=...)`` sends an entity elsewhere."""
    factory = sessionmaker(folder.engine("one"))
    db = Database(factory, metadata=Base.metadata)
    other = folder.engine("two")
    factory.configure(binds={Parent: other})
    db.create_all()
    with db.session_scope() as session:
        session.add(Parent(name="kept"))
    with other.connect() as connection:
        assert connection.scalar(select(Parent.name)) == "kept"


def test_a_session_keeps_its_engine(folder: Folder) -> None:
    """What a unit of work has begun, it ends on the same database."""
    factory = sessionmaker(folder.engine("one"))
    db = Database(factory)
    with db.session_scope() as session:
        factory.configure(bind=folder.engine("two"))
        with db.session_scope(new=True) as other:
            assert other.scalar(WHO) == "two"
        assert session.scalar(WHO) == "one"
        session.execute(text("update who set name = 'changed'"))
    assert who(db) == "two"
    factory.configure(bind=folder.engine("one"))
    assert who(db) == "changed"


def test_a_change_that_cannot_work_raises_until_it_can(folder: Folder) -> None:
    """No session is made on the old engine meanwhile."""
    factory = sessionmaker(folder.engine("one"))
    db = Database(factory)
    assert who(db) == "one"
    factory.configure(bind=folder.engine("two", is_async=True))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="does not fit Database"):
            who(db)
    factory.configure(bind=folder.engine("two"))
    assert who(db) == "two"


def test_a_database_is_not_changed_while_it_is_isolated(folder: Folder) -> None:
    """Otherwise a test would write to a database on which nothing is undone."""
    factory = sessionmaker(folder.engine("one"))
    db = Database(factory)
    with db.isolated():
        factory.configure(bind=folder.engine("two"))
        with pytest.raises(ConfigurationError, match=r"changed inside isolated\(\)"):
            who(db)
    with db.isolated() as session:
        session.execute(text("update who set name = 'undone'"))
        session.commit()
        assert who(db) == "undone"
    assert who(db) == "two"


# -- connections -------------------------------------------------------------------------------


def test_a_connection_cannot_name_a_database(folder: Folder) -> None:
    """Its transaction is somebody else's, so no response could tell the truth: sync and async alike."""
    refused = pytest.raises(ConfigurationError, match=r"cannot name a database: .*isolated\(\)")
    engine = folder.engine("one")
    with engine.connect() as connection:
        for source in (connection, sessionmaker(connection), sessionmaker(binds={Parent: connection})):
            with refused:
                Database(source)
        factory = sessionmaker(engine)
        db = Database(factory)
        factory.configure(bind=connection)
        for _ in range(2):
            with refused:
                who(db)
    factory.configure(bind=engine)
    assert who(db) == "one"

    async def refuse_async() -> None:
        async_engine = folder.engine("one", is_async=True)
        async with async_engine.connect() as connection:
            for source in (connection, async_engine.connect(), async_sessionmaker(connection)):
                with refused:
                    AsyncDatabase(source)
        await async_engine.dispose()

    asyncio.run(refuse_async())


def test_what_a_database_has_cannot_be_replaced(folder: Folder) -> None:
    """Assigning an engine, or binding the factory of a database, would change some sessions and not others."""
    engine = folder.engine("one")
    async_db: Any = AsyncDatabase(folder.engine("one", is_async=True))
    for db in (Database(engine), async_db):
        with pytest.raises(ConfigurationError, match=r"db\.engine cannot be replaced"):
            db.engine = engine
        with pytest.raises(TypeError):
            db.engines["default"] = engine
        for option in ({"bind": engine}, {"binds": {Parent: engine}}):
            with pytest.raises(ConfigurationError, match=r"db\.sessionmaker cannot be bound"):
                db.sessionmaker.configure(**option)
        db.sessionmaker.configure(autoflush=False)
        assert db.sessionmaker.kw["autoflush"] is False


# -- Flask's configuration ---------------------------------------------------------------------


def test_a_flask_configuration_that_changes_after_init_app(folder: Folder) -> None:
    """A test suite that sets its URI late does not write to the app's database."""
    app, db = Flask(__name__), FlaskPlugin()
    app.config["SQLALCHEMY_DATABASE_URI"] = folder.url("one")
    db.init_app(app)
    app.add_url_rule("/", view_func=lambda: str(db.session.scalar(WHO)))
    assert app.test_client().get("/").text == "one"
    app.config["SQLALCHEMY_DATABASE_URI"] = folder.url("two")
    with app.app_context():
        assert db.engine.url.database.endswith("two.db")  # type: ignore[union-attr]
        assert db.session.scalar(WHO) == "two"
    assert app.test_client().get("/").text == "two"
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_size": 7}
    assert db.engine.pool.size() == 7  # type: ignore[attr-defined]
    app.config["SQLALCHEMY_ENGINE_OPTIONS"]["pool_size"] = 8
    assert db.engine.pool.size() == 8  # type: ignore[attr-defined]
    del app.config["SQLALCHEMY_DATABASE_URI"]
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="No database is configured"):
            who(db)
    app.config["SQLALCHEMY_DATABASE_URI"] = folder.url("one")
    assert who(db) == "one"
    app.config["SQLALCHEMY_BINDS"] = ["wrong"]
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="must be a dict"):
            who(db)
    app.config["SQLALCHEMY_BINDS"] = None
    assert who(db) == "one"
    db.dispose()


def test_a_flask_configuration_over_a_shared_database(folder: Folder) -> None:
    """The app gets a database of its own, and whoever shares the other one keeps that."""
    shared = Database(folder.engine("one"))
    app, db = Flask(__name__), FlaskPlugin(shared)
    db.init_app(app)
    assert (who(db), db.database) == ("one", shared)
    app.config["SQLALCHEMY_DATABASE_URI"] = folder.url("two")
    assert (who(db), who(shared)) == ("two", "one")
    app.config["SQLALCHEMY_DATABASE_URI"] = folder.url("one")
    assert who(db) == "one"
    db.dispose()


def test_a_flask_configuration_over_a_function(folder: Folder, tmp_path: Path) -> None:
    """The app's configuration wins later too; a relative path lies in the app's own folder."""
    settings = Settings()
    settings.url = "sqlite:///one.db"
    folder.url("one")
    app, db = Flask(__name__, instance_path=str(tmp_path)), FlaskPlugin(lambda: settings.url)
    db.init_app(app)
    assert who(db) == "one"
    folder.url("two")
    settings.url = "sqlite:///two.db"
    assert who(db) == "two"
    app.config["SQLALCHEMY_DATABASE_URI"] = folder.url("three")
    assert who(db) == "three"
    del app.config["SQLALCHEMY_DATABASE_URI"]
    assert who(db) == "two"
    db.dispose()


# -- its cost ----------------------------------------------------------------------------------


def test_a_database_that_cannot_change_asks_nobody(folder: Folder) -> None:
    """With a URL or an engine, making a session looks at one attribute more."""
    assert not core_of(Database(folder.engine("one")))._may_change
    plugin = FastAPIPlugin(folder.engine("one"))
    plugin.init_app(FastAPI())
    assert not core_of(plugin)._may_change
    with pytest.raises(NoScopeError):
        _ = plugin.session
