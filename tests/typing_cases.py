"""What the type checkers must infer; `make lint` runs mypy and pyright on this file, nothing runs it."""

from __future__ import annotations

from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel import Session as SQLModelSession
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

from session_plugin import AsyncDatabase, Database, fastapi, flask, manual, starlette


class Order:
    """Stands for a mapped class."""


def sync_databases() -> None:
    """A session is typed as the class that was configured."""
    plain = Database("sqlite://", pool_size=5)
    assert_type(plain, Database[Session])
    assert_type(plain.session, Session)
    with plain.session_scope() as session:
        assert_type(session, Session)

    sqlmodel = Database("sqlite://", class_=SQLModelSession)
    assert_type(sqlmodel.session, SQLModelSession)
    with sqlmodel.session_scope(new=True) as session:
        assert_type(session, SQLModelSession)
    assert_type(sqlmodel.sessionmaker(), SQLModelSession)


async def async_databases() -> None:
    """As for the sync ones."""
    plain = AsyncDatabase("sqlite+aiosqlite://", policy=manual)
    assert_type(plain.session, AsyncSession)
    async with plain.session_scope() as session:
        assert_type(session, AsyncSession)

    sqlmodel = AsyncDatabase("sqlite+aiosqlite://", class_=SQLModelAsyncSession)
    async with sqlmodel.session_scope() as session:
        assert_type(session, SQLModelAsyncSession)


async def plugins() -> None:
    """The accessor and the dependency alike."""
    assert_type(flask.SessionPlugin().session, Session)
    assert_type(flask.SessionPlugin(class_=SQLModelSession).session, SQLModelSession)
    assert_type(flask.SessionPlugin().get_or_404(Order, 1), Order)
    assert_type(await fastapi.SessionPlugin().get_session(), Session)
    assert_type(await fastapi.AsyncSessionPlugin().get_session(), AsyncSession)
    assert_type(await starlette.AsyncSessionPlugin(class_=SQLModelAsyncSession).get_session(), SQLModelAsyncSession)


db = Database("sqlite://")


@db.policy(manual)
def endpoint(number: int) -> str:
    """A decorated function keeps its type."""
    return str(number)


assert_type(endpoint(1), str)
