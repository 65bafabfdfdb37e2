"""``by_method()``, a policy that the HTTP method of the request chooses, and the policy of a block."""

import asyncio
from typing import Annotated, Any

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from flask import Blueprint, Flask
from sqlalchemy import text
from sqlalchemy.orm import Session

from session_plugin import (
    AsyncDatabase,
    Database,
    Decision,
    Outcome,
    PolicyError,
    by_method,
    commit_on_success,
    manual,
    read_only,
    read_only_autocommit,
)
from session_plugin.fastapi import SessionPlugin as FastAPIPlugin
from session_plugin.flask import SessionPlugin as FlaskPlugin

from .harness import Base, Parent, add, count

POLICY = by_method(safe=read_only_autocommit, other=commit_on_success)


@pytest.fixture
def database() -> Any:
    database = Database("sqlite://", metadata=Base.metadata, policy=POLICY)
    database.create_all()
    yield database
    database.dispose()


def names(database: Database[Session]) -> list[str]:
    with database.session_scope() as session:
        return sorted(session.scalars(text("SELECT name FROM parent")))


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "QUERY", "TRACE"])
def test_safe_methods(method: str) -> None:
    """Those of RFC 9110, and QUERY."""
    assert POLICY.for_method(method) is read_only_autocommit


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "CONNECT", "get", None])
def test_other_methods(method: str | None) -> None:
    """Whatever is not known to be safe may write, and so may what is outside HTTP."""
    assert POLICY.for_method(method).decide is commit_on_success.decide
    assert not POLICY.for_method(method).read_only


def test_its_parts_are_policies() -> None:
    """Functions are policies too; anything else is refused when the policy is made."""

    def never(outcome: Outcome) -> Decision:
        return Decision(False, "never")

    assert by_method(safe=never, other=never).for_method("GET").name == "never"
    with pytest.raises(PolicyError, match="is not a policy"):
        by_method(safe="read_only", other=manual)  # type: ignore[arg-type]


def test_policies_by_method_inside_one_another() -> None:
    """Each half is what it would be by itself."""
    nested = by_method(
        safe=by_method(safe=read_only, other=manual),
        other=by_method(safe=manual, other=commit_on_success),
    )
    assert nested.for_method("GET") is read_only
    assert nested.for_method("POST").name == commit_on_success.name


def test_flask(database: Any, caplog: pytest.LogCaptureFixture) -> None:
    """For an app, and for a blueprint and a view that have another one."""
    app, db = Flask("shop"), FlaskPlugin(database)
    db.init_app(app)
    held: list[int] = []

    @app.route("/", methods=["GET", "POST"])
    def view() -> Any:
        db.session.execute(text("SELECT 1"))
        held.append(database.engine.pool.checkedout())
        db.session.execute(text("INSERT INTO parent (name) VALUES ('tea')"))
        return {}

    reports = db.policy(by_method(safe=commit_on_success, other=manual))(Blueprint("reports", "reports"))

    @reports.route("/<name>", methods=["GET", "POST"])
    def report(name: str) -> Any:
        db.session.add(Parent(name=name))
        return {}

    app.register_blueprint(reports)
    client = app.test_client()
    assert client.post("/").status_code == 200
    assert client.get("/").status_code == 500
    assert "is under the read-only policy read_only_autocommit. To write, choose another one" in caplog.text
    assert held == [1, 0]  # a read has given its connection, one of the second pool, back
    assert [client.get("/report").status_code, client.post("/draft").status_code] == [200, 200]
    assert names(database) == ["report", "tea"]


def test_fastapi(database: Any) -> None:
    """In the endpoint and in a background task, which keeps the policy; a unit of work of its own is outside HTTP."""
    app, db = FastAPI(), FastAPIPlugin(database)
    db.init_app(app)
    policies: list[bool] = []

    def note(session: Session) -> None:
        policies.append(db.scope.policy.read_only)
        assert count(session) == 0

    def own() -> None:
        with db.session_scope(new=True) as session:
            policies.append(db.scope.policy.read_only)
            add("audit")(session)

    def late(session: Session) -> None:
        note(session)
        db.use(commit_on_success)
        add("late")(session)

    @app.get("/")
    def view(tasks: BackgroundTasks, session: Annotated[Session, Depends(db.get_session)]) -> None:
        note(session)
        tasks.add_task(late, session)
        tasks.add_task(own)

    async def get() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            return (await client.get("/")).status_code

    assert asyncio.run(get()) == 200
    assert policies == [True, True, False]
    assert names(database) == ["audit", "late"]


def test_a_unit_of_work_chooses_for_itself(database: Any) -> None:
    """``use()`` takes one as well, and outside HTTP it is the other policy."""
    with database.session_scope() as session:
        database.use(by_method(safe=commit_on_success, other=read_only))
        assert database.scope.policy.read_only
        session.execute(text("SELECT 1"))


def test_a_block_with_a_name_and_a_policy(database: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A job says in one line what it is called in the log, and how it begins and ends."""
    caplog.set_level("DEBUG", "session_plugin")
    with database.session_scope(name="nightly", policy=manual) as session:
        assert database.scope.policy is manual
        session.add(Parent(name="lost"))
    assert names(database) == []
    assert "nightly: ROLLBACK, its work is discarded" in caplog.text
    with database.session_scope(policy=by_method(safe=manual, other=read_only)):
        assert database.scope.policy.read_only


def test_a_block_joins_under_the_same_policy_only(database: Any) -> None:
    """The policy of the unit of work around it decides, so another one would silently be none."""
    with database.session_scope(policy=manual):
        with database.session_scope(policy=manual, name="inner"):
            assert str(database.scope).startswith("session_scope() at ")
        with pytest.raises(PolicyError, match=r"under the policy read_only would join session_scope\(\) at .*new=True"):
            with database.session_scope(policy=read_only):
                raise AssertionError
        with database.session_scope(new=True, policy=read_only):
            assert database.scope.policy is read_only


def test_the_same_of_an_async_database() -> None:
    """Name and policy."""

    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://")
        async with db.session_scope(name="nightly", policy=manual):
            assert str(db.scope) == "nightly"
            with pytest.raises(PolicyError, match="would join nightly"):
                async with db.session_scope(policy=read_only):
                    raise AssertionError
            async with db.session_scope(new=True, policy=read_only, name="report"):
                assert (str(db.scope), db.scope.policy) == ("report", read_only)
        await db.dispose()

    asyncio.run(main())
