"""What is different about a database while it is isolated."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool

from ...database.core import DatabaseCore
from .session import IsolatedSession, SessionOfTheTest, SharedConnections, isolated_class

_classes: WeakKeyDictionary[DatabaseCore, dict[tuple[type[Session], type[IsolatedSession]], type[Session]]]
_classes = WeakKeyDictionary()


def session_of_the_test(core: DatabaseCore, isolation: SharedConnections) -> Any:
    """Make a session that belongs to no unit of work, for the test itself."""
    with _session_class(core, isolation, SessionOfTheTest):
        return core.new_session(None)


def give_back(connection: Connection, pool: Pool, engine: Engine) -> None:
    """Give ``connection`` back; if ``pool`` was disposed of meanwhile, close it, since nobody would do so later."""
    if engine.pool is not pool and not connection.invalidated:
        connection.detach()
    connection.close()


@contextmanager
def switched(core: DatabaseCore, isolation: SharedConnections) -> Generator[None]:
    """Isolate the sessions of a database for the block; its engines give no connection to anybody else."""
    engines = list(core.engines.known)
    connect = _schema_connection_async if core.is_async else _schema_connection
    core.isolated = True
    core.engine_for = lambda engine, policy, *, may_write: engine  # type: ignore[method-assign]
    core.schema_connection = partial(connect, core.maker)  # type: ignore[method-assign]
    for engine in engines:
        event.listen(engine, "checkout", isolation.refuse_checkout)
        event.listen(engine, "handle_error", isolation.keep_cancelled)
    try:
        with _session_class(core, isolation, IsolatedSession):
            yield
    finally:
        core.isolated = False
        del core.engine_for, core.schema_connection
        for engine in engines:
            event.remove(engine, "checkout", isolation.refuse_checkout)
            event.remove(engine, "handle_error", isolation.keep_cancelled)


def _class_of(core: DatabaseCore, session_class: type[Session], base: type[IsolatedSession]) -> type[Session]:
    """Return the class of isolated sessions; it is kept, since making one costs more than the rest of an isolation."""
    classes = _classes.setdefault(core, {})
    if (session_class, base) not in classes:
        classes[session_class, base] = isolated_class(session_class, base)
    return classes[session_class, base]


@contextmanager
def _session_class(core: DatabaseCore, isolation: SharedConnections, base: type[IsolatedSession]) -> Generator[None]:
    """Let the session factory, to which others may refer, make sessions of ``base`` for the block."""
    maker = core.maker
    session_class = maker.kw["sync_session_class"] if core.is_async else maker.class_
    isolated = _class_of(core, session_class, base)
    if not core.is_async:
        maker.class_ = isolated
    else:
        maker.configure(sync_session_class=isolated)
    maker.configure(isolation=isolation)
    try:
        yield
    finally:
        del maker.kw["isolation"]
        if not core.is_async:
            maker.class_ = session_class
        else:
            maker.configure(sync_session_class=session_class)


@contextmanager
def _schema_connection(maker: Any, engine: Engine) -> Generator[Connection]:
    """Return a block in which tables are created or dropped for the duration of the test."""
    with maker() as session:
        yield session.connection(bind_arguments={"bind": engine})
        session.commit()


@asynccontextmanager
async def _schema_connection_async(maker: Any, engine: Any) -> AsyncGenerator[Any]:
    """Return a block in which tables are created or dropped for the duration of the test."""
    async with maker() as session:
        yield await session.connection(bind_arguments={"bind": engine.sync_engine})
        await session.commit()
