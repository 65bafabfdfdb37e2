"""The interface of a sync database."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Engine, MetaData
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from .access import Access, ScopeRegistry, caller
from .configuration import DEFAULT, Configuration, PolicyLike
from .current import find_scope
from .policy import Outcome, commit_on_success
from .scope import SessionScope
from .typevars import SyncS

if TYPE_CHECKING:
    from .configuration import Source
    from .database import Database


class SyncAccess(Access[SyncS]):
    """What a sync database adds."""

    def __init__(
        self,
        source: Source | None = None,
        *,
        class_: type[SyncS] | None = None,
        policy: PolicyLike = commit_on_success,
        metadata: MetaData | None = None,
        binds: Mapping[Any, Any] | None = None,
        **options: Any,
    ) -> None:
        """Configure a database; nothing connects yet.

        Args:
            source: a URL, an engine, a session factory, a `Database` made elsewhere, or named
                engines: ``{"default": ..., "reports": {"url": ..., "pool_size": 2}}``.  A plugin also
                takes a function that answers one of these when the app starts.
            class_: the session class; `Session` unless given.
            policy: how units of work begin and end unless they say otherwise.
            metadata: for ``create_all()`` and for migration tools.
            binds: from a mapped class or a table to an engine or the name of one.
            **options: of the session class and of ``create_engine()``, under SQLAlchemy's names.

        Raises:
            ConfigurationError: any of it cannot work.
        """
        configuration = Configuration(source, class_ or Session, policy, metadata, binds, options)
        self._set_up(configuration)

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

    @property
    def engine(self) -> Engine:
        """The default engine."""
        engine: Engine = self.database.engine_called(DEFAULT)
        return engine

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines by name; a database with one engine calls it ``"default"``."""
        return self.database.named_engines

    @property
    def sessionmaker(self) -> sessionmaker[SyncS]:
        """Makes sessions that belong to no unit of work, configured like those that do."""
        return self.database.maker

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
        for engine, tables in self.database.tables_by_engine(self.metadata):
            self.metadata.create_all(engine, tables=tables)

    def drop_all(self) -> None:
        """Drop the tables of ``metadata``, each on the engine that ``binds`` names."""
        for engine, tables in self.database.tables_by_engine(self.metadata):
            self.metadata.drop_all(engine, tables=tables)

    def dispose(self) -> None:
        """Close the pooled connections of the engines made here; those made elsewhere are their maker's."""
        for engine in self.database.own_engines:
            engine.dispose()
