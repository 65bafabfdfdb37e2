"""What type checkers must infer; `make lint` checks this file with mypy and pyright, and nothing executes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

from fastapi import FastAPI
from flask import Flask
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from sqlmodel import Field, SQLModel, select
from sqlmodel import Session as SQLModelSession
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from session_plugin import AsyncDatabase, Database, fastapi, flask, manual, starlette, testing


class Order:
    """A stand-in for a mapped class."""


class Hero(SQLModel, table=True):
    """An SQLModel model."""

    id: int | None = Field(default=None, primary_key=True)


def sync_databases() -> None:
    """A session is typed as the class that was configured."""
    plain = Database("sqlite://", pool_size=5)
    assert_type(plain, Database[Session])
    assert_type(plain.session, Session)
    with plain.session_scope() as session:
        assert_type(session, Session)


async def async_databases() -> None:
    """An async session is typed as the class that was configured."""
    plain = AsyncDatabase("sqlite+aiosqlite://", policy=manual)
    assert_type(plain.session, AsyncSession)
    async with plain.session_scope() as session:
        assert_type(session, AsyncSession)


async def isolated() -> None:
    """The test's session has the type of the app's session."""
    with Database("sqlite://", class_=SQLModelSession).isolated() as session:
        assert_type(session, SQLModelSession)
    async with fastapi.AsyncSessionPlugin().isolated() as async_session:
        assert_type(async_session, AsyncSession)
    with testing.assert_queries(flask.SessionPlugin(), max=3) as queries:
        assert_type(queries, list[testing.Query])


async def plugins() -> None:
    """The accessor and the dependency have the same session type."""
    assert_type(flask.SessionPlugin().session, Session)
    assert_type(flask.SessionPlugin().get_or_404(Order, 1), Order)
    assert_type(await fastapi.SessionPlugin().get_session(), Session)
    assert_type(await fastapi.AsyncSessionPlugin().get_session(), AsyncSession)
    assert_type(await starlette.SessionPlugin().get_session(), Session)
    assert_type(await starlette.AsyncSessionPlugin().get_session(), AsyncSession)


def sync_sqlmodel() -> None:
    """SQLModel's session and the result of its ``exec()`` keep their types, wherever the session comes from."""
    database = Database("sqlite://", class_=SQLModelSession)
    assert_type(database, Database[SQLModelSession])
    assert_type(database.session, SQLModelSession)
    assert_type(database.sessionmaker(), SQLModelSession)
    assert_type(database.scoped_session, scoped_session[SQLModelSession])
    with database.session_scope(new=True) as session:
        assert_type(session, SQLModelSession)
        assert_type(session.exec(select(Hero)).all(), Sequence[Hero])

    in_flask = flask.SessionPlugin(class_=SQLModelSession)
    assert_type(in_flask.session, SQLModelSession)
    assert_type(in_flask.scoped_session(), SQLModelSession)
    assert_type(in_flask.get_or_404(Hero, 1), Hero)
    with in_flask.session_scope() as session:
        assert_type(session, SQLModelSession)


async def sync_sqlmodel_under_asgi() -> None:
    """SQLModel's sync session keeps its type in the FastAPI and Starlette plugins."""
    for plugin in (fastapi.SessionPlugin(class_=SQLModelSession), starlette.SessionPlugin(class_=SQLModelSession)):
        assert_type(plugin.session, SQLModelSession)
        assert_type(await plugin.get_session(), SQLModelSession)
        with plugin.session_scope() as session:
            assert_type(session, SQLModelSession)


async def async_sqlmodel() -> None:
    """SQLModel's async session and the result of its ``exec()`` keep their types."""
    database = AsyncDatabase("sqlite+aiosqlite://", class_=SQLModelAsyncSession)
    assert_type(database, AsyncDatabase[SQLModelAsyncSession])
    assert_type(database.session, SQLModelAsyncSession)
    assert_type(database.sessionmaker(), SQLModelAsyncSession)
    assert_type(database.scoped_session, async_scoped_session[SQLModelAsyncSession])
    async with database.session_scope() as session:
        assert_type(session, SQLModelAsyncSession)
        assert_type((await session.exec(select(Hero))).all(), Sequence[Hero])

    for plugin in (
        fastapi.AsyncSessionPlugin(class_=SQLModelAsyncSession),
        starlette.AsyncSessionPlugin(class_=SQLModelAsyncSession),
    ):
        assert_type(plugin.session, SQLModelAsyncSession)
        assert_type(await plugin.get_session(), SQLModelAsyncSession)
        async with plugin.session_scope() as session:
            assert_type(session, SQLModelAsyncSession)


db = Database("sqlite://")


@db.policy(manual)
def endpoint(number: int) -> str:
    """A decorated function keeps its type."""
    return str(number)


assert_type(endpoint(1), str)


class OwnSession(Session):
    """A session class with an option of its own."""

    def __init__(self, *args: Any, tenant: str = "", **options: Any) -> None:
        """Keep the tenant."""
        super().__init__(*args, **options)
        self.tenant = tenant


def options() -> None:
    """The options have SQLAlchemy's names and types; with ``class_``, any name may be an option of that class."""
    assert_type(Database("sqlite://", pool_size=5, echo=True, isolation_level="SERIALIZABLE"), Database[Session])
    assert_type(Database("sqlite://", expire_on_commit=False, info={"a": 1}, max_pending_sessions=9), Database[Session])
    assert_type(Database("sqlite://", class_=OwnSession, tenant="a", pool_size=5), Database[OwnSession])
    assert_type(AsyncDatabase("sqlite+aiosqlite://", pool_pre_ping=True), AsyncDatabase[AsyncSession])
    read_from_elsewhere: dict[str, Any] = {}
    Database("sqlite://", **read_from_elsewhere)
    flask.SessionPlugin(class_=None).init_app(Flask("shop"), "sqlite://", pool_size=5)


def wrong_options() -> None:
    """Both type checkers report a comment below that has nothing to ignore."""
    Database("sqlite://", pool_sze=5)  # type: ignore[call-overload]
    Database("sqlite://", pool_size="5")  # type: ignore[call-overload]
    AsyncDatabase("sqlite+aiosqlite://", expire_on_comit=True)  # type: ignore[call-overload]
    fastapi.SessionPlugin("sqlite://", pool_sze=5)  # type: ignore[call-overload]
    starlette.AsyncSessionPlugin("sqlite+aiosqlite://", pool_sze=5)  # type: ignore[call-overload]
    flask.SessionPlugin(pool_sze=5)  # type: ignore[call-overload]
    flask.SessionPlugin().init_app(Flask("shop"), pool_sze=5)  # type: ignore[call-arg]
    starlette.SessionPlugin().init_app(FastAPI(), pool_sze=5)  # type: ignore[call-arg]


def send(number: int, *, to: str = "") -> None:
    """A hook."""


async def asend(number: int) -> None:
    """A hook of an async database."""


def hooks() -> None:
    """The arguments of a hook are those of its function."""
    db.on_commit(send, 1, to="shop")
    db.on_rollback(print, "sorry", end="")
    db.on_unknown(lambda number: send(number), 1)
    AsyncDatabase("sqlite+aiosqlite://").on_commit(asend, 1)


def wrong_hooks() -> None:
    """As above."""
    db.on_commit(send, "1")  # type: ignore[arg-type]
    db.on_commit(send, 1, t="shop")  # type: ignore[call-arg]
    db.on_rollback(send)  # type: ignore[call-arg]
    fastapi.AsyncSessionPlugin().on_unknown(asend, "1")  # type: ignore[arg-type]


def databases() -> None:
    """The database of an app is of the plugin's kind."""
    assert_type(flask.SessionPlugin(class_=OwnSession).database_for(Flask("shop")), Database[OwnSession])
    assert_type(fastapi.SessionPlugin().database_for(FastAPI()), Database[Session])
    assert_type(starlette.AsyncSessionPlugin().database_for(FastAPI()), AsyncDatabase[AsyncSession])
