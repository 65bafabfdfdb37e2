"""What is different about a database while it is isolated."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from ._session import IsolatedSession, SessionOfTheTest, isolated_class

if TYPE_CHECKING:
    from ..database import BaseDatabase
    from ._isolation import Isolation


_classes: WeakKeyDictionary[BaseDatabase[Any], dict[tuple[type[Session], type[IsolatedSession]], type[Session]]]
_classes = WeakKeyDictionary()


def session_of_the_test(database: BaseDatabase[Any], isolation: Isolation) -> Any:
    """A session that belongs to no unit of work, for the test itself."""
    with _session_class(database, isolation, SessionOfTheTest):
        return database._new_session()


def give_back(connection: Connection, pool: Pool, engine: Engine) -> None:
    """End what was done on ``connection``; if ``pool`` was disposed of meanwhile, nobody would close it later."""
    if engine.pool is not pool and not connection.invalidated:
        connection.detach()
    connection.close()


@contextmanager
def switched(database: BaseDatabase[Any], isolation: Isolation) -> Generator[None]:
    """In the block its sessions are isolated, and its engines give no connection to anybody else."""
    engines = list(database._known_engines)
    connect = _schema_connection_async if database.is_async else _schema_connection
    database._begin_engine = lambda engine, scope: engine  # type: ignore[method-assign]
    database._schema_connection = partial(connect, database._maker)  # type: ignore[method-assign]
    for engine in engines:
        event.listen(engine, "checkout", isolation.refuse_checkout)
        event.listen(engine, "handle_error", isolation.spare_cancelled)
    try:
        with _session_class(database, isolation, IsolatedSession):
            yield
    finally:
        del database._begin_engine, database._schema_connection
        for engine in engines:
            event.remove(engine, "checkout", isolation.refuse_checkout)
            event.remove(engine, "handle_error", isolation.spare_cancelled)


def _class_of(database: BaseDatabase[Any], session_class: type[Session], base: type[IsolatedSession]) -> type[Session]:
    """The class of isolated sessions: making one costs more than all else that an isolation does."""
    classes = _classes.setdefault(database, {})
    if (session_class, base) not in classes:
        classes[session_class, base] = isolated_class(session_class, base)
    return classes[session_class, base]


@contextmanager
def _session_class(database: BaseDatabase[Any], isolation: Isolation, base: type[IsolatedSession]) -> Generator[None]:
    """In the block the session factory, which others may have kept, makes sessions of ``base``."""
    maker = database._maker
    session_class = maker.kw["sync_session_class"] if database.is_async else maker.class_
    isolated = _class_of(database, session_class, base)
    if not database.is_async:
        maker.class_ = isolated
    else:
        maker.configure(sync_session_class=isolated)
    maker.configure(isolation=isolation)
    try:
        yield
    finally:
        del maker.kw["isolation"]
        if not database.is_async:
            maker.class_ = session_class
        else:
            maker.configure(sync_session_class=session_class)


@contextmanager
def _schema_connection(maker: Any, engine: Engine) -> Generator[Connection]:
    """A block in which tables are created or dropped for the time of the test."""
    with maker() as session:
        yield session.connection(bind_arguments={"bind": engine})
        session.commit()


@asynccontextmanager
async def _schema_connection_async(maker: Any, engine: Any) -> AsyncGenerator[Any]:
    """A block in which tables are created or dropped for the time of the test."""
    async with maker() as session:
        yield await session.connection(bind_arguments={"bind": engine.sync_engine})
        await session.commit()
