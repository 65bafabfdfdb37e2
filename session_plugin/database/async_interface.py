"""`AsyncInterface`: what an app calls on an async database."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from ..engines.registry import DEFAULT
from ..policy import PolicyLike
from ..scope import blocks, ending
from ..scope.typevars import AsyncS
from .interface import DatabaseInterface, ScopeRegistry, core_of, engine_is_fixed
from .isolation import make_isolation

if TYPE_CHECKING:
    from contextlib import _AsyncGeneratorContextManager

    from sqlalchemy.ext.asyncio import AsyncEngine, async_scoped_session, async_sessionmaker


class AsyncInterface(DatabaseInterface[AsyncS]):
    """What an async database adds."""

    @property
    @abstractmethod
    def database(self) -> Any:
        """The `AsyncDatabase` behind this object, for the current app."""

    def session_scope(
        self, *, new: bool = False, name: str | None = None, policy: PolicyLike | None = None
    ) -> _AsyncGeneratorContextManager[AsyncS, None]:
        """Open a unit of work: commit at the end of the block, roll back if an error leaves it.

        Inside a unit of work that is open and unsettled it joins that one, which then decides;
        an error that leaves the block dooms it.  With ``new`` it is always one of its own.

        Args:
            new: True for a unit of work of its own, also inside another one.
            name: what logs and warnings call it; where it was opened, unless given.
            policy: how it begins and ends; the database's policy, unless given.

        Yields:
            the session of the unit of work.

        Raises:
            PolicyError: ``policy`` is not a policy, or it would join a unit of work under another one.
        """
        return blocks.asession_scope(core_of(self), new=new, name=name, policy=policy)

    async def release(self) -> None:
        """Give the connection back while the app waits for something else; the next statement takes another one.

        It ends a transaction that has written nothing and holds nothing.  What was loaded stays readable, and the
        hooks wait on for the end of the unit of work.  If no connection is held, nothing happens.

        Raises:
            NoScopeError: there is no unit of work here.
            ScopeClosedError: it has ended.
            ReleaseError: something would be lost: changes, uncommitted work, a lock, a setting, or a result that was
                not read to its end.
            ConcurrentUseError: another task is executing a statement.
        """
        await ending.arelease(self._unit_of_work())

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
        isolation = make_isolation(core_of(self).up_to_date())
        async with isolation.aentered():
            yield isolation.session

    @property
    def engine(self) -> AsyncEngine:
        """The default engine."""
        engine: AsyncEngine = core_of(self).up_to_date().engines.called(DEFAULT)
        return engine

    @engine.setter
    def engine(self, engine: object) -> None:
        raise engine_is_fixed()

    @property
    def engines(self) -> Mapping[str, AsyncEngine]:
        """The engines by name; a database with one engine calls it ``"default"``."""
        named: Mapping[str, AsyncEngine] = core_of(self).up_to_date().engines.named
        return named

    @property
    def sessionmaker(self) -> async_sessionmaker[AsyncS]:
        """A factory of sessions that belong to no unit of work, configured like those that do."""
        maker: async_sessionmaker[AsyncS] = core_of(self).up_to_date().maker
        return maker

    @property
    def scoped_session(self) -> async_scoped_session[AsyncS]:
        """SQLAlchemy's `async_scoped_session` for libraries that expect one; its scope is our unit of work.

        A plugin has it before any app is known, since such libraries ask for it at import time.
        """
        from sqlalchemy.ext.asyncio import async_scoped_session

        registry = async_scoped_session(cast(Any, lambda **options: self.sessionmaker(**options)), scopefunc=object)
        registry.registry = ScopeRegistry(self)
        return registry

    async def create_all(self) -> None:
        """Create the missing tables of ``metadata``, each on the engine that ``binds`` names."""
        core = core_of(self).up_to_date()
        core.adopt_running_loop()
        for engine, tables in core.tables_by_engine(self.metadata):
            async with core.schema_connection(engine) as connection:
                await connection.run_sync(self.metadata.create_all, tables=tables)

    async def drop_all(self) -> None:
        """Drop the tables of ``metadata``, each on the engine that ``binds`` names."""
        core = core_of(self).up_to_date()
        core.adopt_running_loop()
        for engine, tables in core.tables_by_engine(self.metadata):
            async with core.schema_connection(engine) as connection:
                await connection.run_sync(self.metadata.drop_all, tables=tables)

    async def dispose(self) -> None:
        """Close the pooled connections of the engines made here; you dispose of engines that you created yourself."""
        await core_of(self).dispose()
