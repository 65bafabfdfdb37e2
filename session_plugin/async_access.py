"""The interface of an async database."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, cast

from .access import Access, ScopeRegistry, caller
from .configuration import DEFAULT
from .current import find_scope
from .exceptions import ConcurrentUseError
from .policy import Outcome
from .scope import SessionScope
from .typevars import AsyncS

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, async_scoped_session, async_sessionmaker

    from .database import AsyncDatabase


class AsyncAccess(Access[AsyncS]):
    """What an async database adds."""

    @property
    @abstractmethod
    def database(self) -> AsyncDatabase[AsyncS]:
        """The database behind this object, here and now."""

    @asynccontextmanager
    async def session_scope(self, *, new: bool = False) -> AsyncGenerator[AsyncS]:
        """A unit of work: commit at the end of the block, roll back if an error leaves it.

        Inside a unit of work that is open and unsettled it joins that one, which then decides;
        an error that leaves the block dooms it.  With ``new`` it is always one of its own.

        Yields:
            the session of the unit of work.
        """
        outer = find_scope(self.database)
        if outer is not None and outer.can_be_joined and not new:
            with joining(outer), outer.joined() as session:
                yield session
            return
        scope = SessionScope(self.database, origin=caller())
        with scope.entered():
            try:
                yield scope.session
                check_joined(scope)
            except BaseException as error:
                await scope.asettle(Outcome.raised(error))
                raise
            else:
                await scope.asettle(Outcome())
            finally:
                await scope.aclose()

    @asynccontextmanager
    async def isolated(self) -> AsyncGenerator[AsyncS]:
        """For a test: whatever is done through this database in the block commits, and is undone at its end.

        That holds for requests, ``session_scope()``, background work, tasks and hooks, on the event loop of
        the block.

        Yields:
            a session of the test's own, to arrange and to assert with.

        Raises:
            IsolationError: it is isolated already, or something was done that cannot be undone.
        """
        from .testing._isolation import Isolation

        isolation = Isolation(self.database)
        async with isolation.aentered():
            yield isolation.session

    @property
    def engine(self) -> AsyncEngine:
        """The default engine."""
        engine: AsyncEngine = self.database._engine_called(DEFAULT)
        return engine

    @property
    def engines(self) -> Mapping[str, AsyncEngine]:
        """The engines by name; a database with one engine calls it ``"default"``."""
        return self.database._named_engines

    @property
    def sessionmaker(self) -> async_sessionmaker[AsyncS]:
        """Makes sessions that belong to no unit of work, configured like those that do."""
        return self.database._maker

    @property
    def scoped_session(self) -> async_scoped_session[AsyncS]:
        """For libraries that expect `async_scoped_session`: its scope is our unit of work.

        A plugin has it before any app is known, since such libraries ask for it at import time.
        """
        from sqlalchemy.ext.asyncio import async_scoped_session

        registry = async_scoped_session(cast(Any, lambda **options: self.sessionmaker(**options)), scopefunc=object)
        registry.registry = ScopeRegistry(self)
        return registry

    async def create_all(self) -> None:
        """Create the missing tables of ``metadata``, each on the engine that ``binds`` names."""
        self.database._adopt_running_loop()
        for engine, tables in self.database._tables_by_engine(self.metadata):
            async with self.database._schema_connection(engine) as connection:
                await connection.run_sync(self.metadata.create_all, tables=tables)

    async def drop_all(self) -> None:
        """Drop the tables of ``metadata``, each on the engine that ``binds`` names."""
        self.database._adopt_running_loop()
        for engine, tables in self.database._tables_by_engine(self.metadata):
            async with self.database._schema_connection(engine) as connection:
                await connection.run_sync(self.metadata.drop_all, tables=tables)

    async def dispose(self) -> None:
        """Close the pooled connections of the engines made here; those made elsewhere are their maker's."""
        await self.database._dispose_engines()


@contextmanager
def joining(scope: SessionScope[Any]) -> Generator[None]:
    """Note that this task works in ``scope``."""
    task = asyncio.current_task()
    scope.joining.append(task)
    try:
        yield
    finally:
        scope.joining.remove(task)


def check_joined(scope: SessionScope[Any]) -> None:
    """Raise `ConcurrentUseError` if a block that joined ``scope`` is open in another task: half of it would commit."""
    if any(task is not asyncio.current_task() and not task.done() for task in scope.joining):
        raise ConcurrentUseError(
            "This session_scope() has ended while another task was in a block that had joined it; nothing was "
            "committed. Await that task inside, or open a session_scope(new=True) in it."
        )
