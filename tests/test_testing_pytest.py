"""The pytest plugin in separate test runs: with each framework's client, pytest-asyncio, anyio and pytest-xdist."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from textwrap import dedent

import fastapi  # noqa: F401  otherwise each test run imports it again
import flask  # noqa: F401
import httpx  # noqa: F401
import pytest
from sqlalchemy import create_engine, text

from .test_imports import loaded_by

pytest_plugins = ["pytester"]

QUIET = "filterwarnings = ignore:Using .httpx. with .starlette.testclient.\n"
MODELS = """
    from sqlalchemy import select
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

    class Base(DeclarativeBase):
        pass

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        item: Mapped[str] = mapped_column(unique=True)
"""
FLASK = """
    from flask import Flask
    from models import *
    from session_plugin.flask import SessionPlugin

    db = SessionPlugin("sqlite:///{location}/orders.db", metadata=Base.metadata)
    app = Flask(__name__)
    db.init_app(app)

    @app.post("/orders/<item>")
    def create(item):
        db.session.add(Order(item=item))
        return "", 201
"""
FASTAPI = """
    from typing import Annotated
    from fastapi import Depends, FastAPI
    from models import *
    from session_plugin.fastapi import {plugin}

    db = {plugin}("{scheme}:///{location}/orders.db", metadata=Base.metadata)
    app = FastAPI()
    db.init_app(app)

    @app.post("/orders/{{item}}", status_code=201)
    {define} create(item: str, session: Annotated[object, Depends(db.get_session)]):
        session.add(Order(item=item))
"""
CONFTEST = """
    import pytest
    from app import app, db

    @pytest.fixture(scope="session")
    def session_plugin_database():
        yield db
        disposing = db.dispose()
        if disposing is not None:
            disposing.close()  # the fixtures have disposed of an async one
"""
TWICE = """
    import pytest
    from models import Order, select

    @pytest.mark.parametrize("time", [1, 2])
    def test_order(isolated_database, db_session, client, time):
        db_session.add(Order(item="coffee"))
        db_session.commit()
        assert client.post("/orders/tea").status_code == 201
        assert db_session.scalars(select(Order.item).order_by(Order.item)).all() == ["coffee", "tea"]
        with isolated_database.session_scope() as session:
            session.add(Order(item="honey"))
        assert db_session.get(Order, 3).item == "honey"
"""
FLASK_CLIENT = """
    @pytest.fixture
    def client():
        return app.test_client()
"""
TEST_CLIENT = """
    @pytest.fixture
    def client():
        from fastapi.testclient import TestClient

        with TestClient(app) as client:
            yield client
"""
TWICE_ASYNC = """
    import httpx, pytest
    from app import app
    from models import Order, select

    {mark}
    @pytest.mark.parametrize("time", [1, 2])
    async def test_order(isolated_database, db_session, time):
        db_session.add(Order(item="coffee"))
        await db_session.commit()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/orders/tea")).status_code == 201
        items = await db_session.scalars(select(Order.item).order_by(Order.item))
        assert items.all() == ["coffee", "tea"]
        async with isolated_database.session_scope() as session:
            assert (await session.get(Order, 1)).item == "coffee"
"""
PORTAL = """
    import pytest
    from app import app, db
    from models import Order, select

    @pytest.fixture
    def client(session_plugin_schema):
        from fastapi.testclient import TestClient

        with TestClient(app) as client, client.portal.wrap_async_context_manager(db.isolated()) as client.session:
            yield client

    @pytest.mark.parametrize("time", [1, 2])
    def test_order(client, time):
        assert client.post("/orders/tea").status_code == 201
        assert client.portal.call(client.session.scalar, select(Order.item)) == "tea"
"""


class Project:
    """An app with its tests, in a separate folder."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.location = pytester.path / "data"
        self.location.mkdir()
        pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n" + QUIET)
        pytester.syspathinsert()
        self.write("models", MODELS)

    def write(self, name: str, *parts: str) -> None:
        (self.pytester.path / f"{name}.py").write_text("".join(dedent(part) for part in parts))

    def flask(self) -> None:
        self.write("app", FLASK.format(location=self.location))

    def fastapi(self, plugin: str = "AsyncSessionPlugin") -> None:
        is_async = plugin.startswith("Async")
        scheme, define = ("sqlite+aiosqlite", "async def") if is_async else ("sqlite", "def")
        self.write("app", FASTAPI.format(plugin=plugin, scheme=scheme, location=self.location, define=define))

    def run(self, *arguments: str, passed: int = 0, failed: int = 0, errors: int = 0) -> pytest.RunResult:
        result = self.pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)
        result.assert_outcomes(passed=passed, failed=failed, errors=errors)
        return result

    def orders(self) -> int:
        """How many orders a run has left in the database."""
        engine = create_engine(f"sqlite:///{self.location}/orders.db")
        with engine.connect() as connection:
            found = connection.scalar(text("SELECT count(*) FROM orders"))
        engine.dispose()
        return found or 0


@pytest.fixture
def collected() -> Iterator[None]:
    """Collect the garbage of an inner run at its end, so that its warnings do not appear in other tests."""
    yield
    with warnings.catch_warnings(action="ignore"):
        gc.collect()


@pytest.fixture
def project(collected: None, pytester: pytest.Pytester) -> Project:
    return Project(pytester)


def test_flask(project: Project) -> None:
    """With Flask's test client no test sees rows of another, and no row is left."""
    project.flask()
    project.write("conftest", CONFTEST, FLASK_CLIENT)
    project.write("test_app", TWICE)
    project.run(passed=2)
    assert project.orders() == 0


def test_without_the_plugin_a_row_stays(project: Project) -> None:
    """The same two tests pass with `isolated_database`; without it the second finds the row of the first and fails."""
    project.flask()
    project.write("conftest", CONFTEST, FLASK_CLIENT)
    twice = """
    import pytest

    @pytest.mark.parametrize("time", [1, 2])
    def test_order({fixture}, client, time):
        assert client.post("/orders/tea").status_code == 201
    """
    project.write("test_with", twice.format(fixture="isolated_database"))
    project.write("test_without", twice.format(fixture="session_plugin_schema"))
    project.run(passed=3, failed=1)
    assert project.orders() == 1


def test_fastapi_sync_with_test_client(project: Project) -> None:
    project.fastapi("SessionPlugin")
    project.write("conftest", CONFTEST, TEST_CLIENT)
    project.write("test_app", TWICE)
    project.run(passed=2)
    assert project.orders() == 0


def test_fastapi_async(project: Project) -> None:
    """Async tests run on the event loop of pytest-asyncio, of anyio or of a `TestClient`.

    A sync test has no event loop for the app, so the fixture raises IsolationError.
    """
    project.fastapi()
    backend = """
    @pytest.fixture
    def anyio_backend():
        return "asyncio"
    """
    project.write("conftest", CONFTEST, backend)
    project.write("test_portal", PORTAL)
    project.write("test_anyio", TWICE_ASYNC.format(mark="@pytest.mark.anyio"))
    project.write("test_asyncio", TWICE_ASYNC.format(mark="@pytest.mark.asyncio"))
    project.write("test_plain", "def test_order(db_session): pass")
    result = project.run(passed=6, errors=1)
    result.stdout.fnmatch_lines(["*IsolationError*wrap_async_context_manager*"])
    assert project.orders() == 0


def test_pytest_asyncio_by_itself(project: Project) -> None:
    project.fastapi()
    project.write("conftest", CONFTEST)
    project.write("test_app", TWICE_ASYNC.format(mark=""))
    project.run("--asyncio-mode=auto", passed=2)
    assert project.orders() == 0


def test_a_missing_database_fixture_is_an_error(project: Project) -> None:
    project.write("test_app", "def test_order(isolated_database): pass")
    project.run(errors=1).stdout.fnmatch_lines(["*The fixture session_plugin_database is not defined*"])


def test_xdist_gives_each_worker_a_database(project: Project) -> None:
    project.flask()
    database = f"""
    from session_plugin.testing import worker_database

    @pytest.fixture(scope="session")
    def session_plugin_database():
        with worker_database("sqlite:///{project.location}/parallel.db") as url:
            app = Flask("shop", instance_path="{project.location}")
            plugin = SessionPlugin(url, metadata=Base.metadata)
            plugin.init_app(app)
            yield plugin
            plugin.dispose()
    """
    project.write("conftest", "import pytest\nfrom app import *\n", database)
    project.write(
        "test_app",
        """
    import os, pytest
    from models import Order, select

    @pytest.mark.parametrize("time", range(6))
    def test_order(isolated_database, db_session, time):
        assert isolated_database.engine.url.database.endswith(os.environ["PYTEST_XDIST_WORKER"] + ".db")
        with isolated_database.session_scope() as session:
            session.add(Order(item="tea"))
        assert db_session.scalars(select(Order.item)).all() == ["tea"]
    """,
    )
    project.run("-n", "2", passed=6)
    assert sorted(path.name for path in project.location.iterdir()) == []


def test_the_core_does_not_import_the_test_kit() -> None:
    assert not [name for name in loaded_by("session_plugin", "session_plugin.flask") if "testing" in name]
