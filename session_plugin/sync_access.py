"""The interface of a sync database."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Engine
from sqlalchemy.orm import scoped_session, sessionmaker

from .access import Access, ScopeRegistry, caller
from .configuration import DEFAULT
from .current import find_scope
from .policy import Outcome
from .scope import SessionScope
from .typevars import SyncS

if TYPE_CHECKING:
    from .database import Database


class SyncAccess(Access[SyncS]):
    """What a sync database adds."""

    @property
    @abstractmethod
    def database(self) -> Database[SyncS]:
        """The database behind this object, here and now."""

    @contextmanager
    def session_scope(self, *, new: bool = False) -> Generator[SyncS]:
        """A unit of work: commit at the end of the block, roll back if an error leaves it.

        Inside a unit of work that is open and unsettled it joins that one, which then decides;
        an error that leaves the block dooms it.  With ``new`` it is always one of its own.

        Yields:
            the session of the unit of work.
        """
        outer = find_scope(self.database)
        if outer is not None and outer.can_be_joined and not new:
            with outer.joined() as session:
                yield session
            return
        scope = SessionScope(self.database, origin=caller())
        with scope.entered():
            try:
                yield scope.session
            except BaseException as error:
                scope.settle(Outcome.raised(error))
                raise
            else:
                scope.settle(Outcome())
            finally:
                scope.close()

    @contextmanager
    def isolated(self) -> Generator[SyncS]:
        """For a test: whatever is done through this database in the block commits, and is undone at its end.

        That holds for requests, ``session_scope()``, background work, threads and hooks.

        Yields:
            a session of the test's own, to arrange and to assert with.

        Raises:
            IsolationError: it is isolated already, or something was done that cannot be undone.
        """
        from .testing._isolation import Isolation

        isolation = Isolation(self.database)
        with isolation.entered():
            yield isolation.session

    @property
    def engine(self) -> Engine:
        """The default engine."""
        engine: Engine = self.database._engine_called(DEFAULT)
        return engine

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines by name; a database with one engine calls it ``"default"``."""
        return self.database._named_engines

    @property
    def sessionmaker(self) -> sessionmaker[SyncS]:
        """Makes sessions that belong to no unit of work, configured like those that do."""
        return self.database._maker

    @property
    def scoped_session(self) -> scoped_session[SyncS]:
        """For libraries that expect SQLAlchemy's `scoped_session`: its scope is our unit of work.

        A plugin has it before any app is known, since such libraries ask for it at import time.
        """
        registry: scoped_session[SyncS] = scoped_session(cast(Any, lambda **options: self.sessionmaker(**options)))
        registry.registry = ScopeRegistry(self)
        return registry

    def create_all(self) -> None:
        """Create the missing tables of ``metadata``, each on the engine that ``binds`` names."""
        for engine, tables in self.database._tables_by_engine(self.metadata):
            with self.database._schema_connection(engine) as connection:
                self.metadata.create_all(connection, tables=tables)

    def drop_all(self) -> None:
        """Drop the tables of ``metadata``, each on the engine that ``binds`` names."""
        for engine, tables in self.database._tables_by_engine(self.metadata):
            with self.database._schema_connection(engine) as connection:
                self.metadata.drop_all(connection, tables=tables)

    def dispose(self) -> None:
        """Close the pooled connections of the engines made here; those made elsewhere are their maker's."""
        for engine in self.database._own_engines:
            engine.dispose()
