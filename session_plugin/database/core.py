"""`DatabaseCore`: a database as the units of work and the adapters see it.

An app sees it as a `Database` or an `AsyncDatabase`, both of which have one.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol, Self
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Engine, MetaData, Table
from sqlalchemy.orm import Mapper, Session, sessionmaker

from ..engines.event_loop import loop_of_worker_thread, running_loop
from ..engines.forks import check_process
from ..engines.making import require_greenlet
from ..engines.registry import DEFAULT, Engines
from ..engines.semaphore import MAX_PENDING_SESSIONS, ExtraThreads, FairSemaphore, PendingSessions
from ..exceptions import ConfigurationError
from ..policy import Policy, as_policy
from ..scope.blocks import asession_scope, session_scope
from ..scope.locks import explain_locks
from ..scope.log import log_failed_hook, logger
from ..scope.session import scope_session_class
from ..scope.unit_of_work import UnitOfWork
from .configuration import Configuration


class HasDatabase(Protocol):
    """Anything with a database: a `Database`, an `AsyncDatabase`, or a plugin."""

    @property
    def database(self) -> Any:
        """The `Database` or `AsyncDatabase`."""


class DatabaseCore(ABC):
    """What sync and async databases share.

    Attributes:
        engines: by name.
        maker: the session factory.
        configuration: as given; that of a plugin may be replaced by a later one.
        metadata: as given, or None.
        default_policy: of units of work that choose no other one.
        semaphore: with a permit for each connection, for sync sessions under an event loop.
        pending_sessions: with a place for each of these sessions that has no permit yet.
        closes_itself: True if the user's session class has a ``close()`` of its own.
        isolated: True while a test has isolated it.
    """

    is_async: bool
    isolated: bool = False
    _max_pending_sessions: int = MAX_PENDING_SESSIONS

    def __init__(self, configuration: Configuration) -> None:
        """Make the engines and the session factory; nothing connects yet.

        Raises:
            ConfigurationError: the configuration cannot work.
        """
        self._configuring = threading.Lock()
        self._find_change: Callable[[bool], Configuration | None] | None = None
        self._disposed: bool = False
        self._changed: Configuration | None = None
        self._retired: list[Engines] = []
        self._configure(configuration)
        alive.add(self)

    def _configure(self, configuration: Configuration) -> None:
        self.configuration: Configuration = configuration
        factory = configuration.session_factory
        factory_options = None if factory is None else dict(factory.kw)
        configuration = configuration.unfolded()
        if configuration.source in (None, {}) and configuration.binds:
            configuration = replace(configuration, source={})  # every entity has an engine of its own
        elif configuration.source in (None, {}):
            raise ConfigurationError(
                "No database is configured. Give a URL, such as sqlite:///shop.db, or an Engine as the first argument; "
                "in Flask the configuration may name it: SQLALCHEMY_DATABASE_URI."
            )
        self.default_policy: Policy = as_policy(configuration.policy)
        self.metadata: MetaData | None = configuration.metadata
        configuration = self.with_own_options(configuration)
        session_class = configuration.session_class(self.default_session_class())
        session_options, engine_options = configuration.divided_options(session_class)
        binds = configuration.binds or {}
        self.engines: Engines = Engines(configuration.source, binds, engine_options, self, is_async=self.is_async)
        explain_locks(self.engines.known)
        if self.engines.binds:
            session_options["binds"] = self.engines.binds
        self.maker: Any = self.make_maker(session_class, self.engines.named.get(DEFAULT), session_options)
        classes = (session_class, self.maker.kw.get("sync_session_class", session_class))
        self.streams_results: bool = self.engines.stream_results
        self.closes_itself: bool = any(
            "close" in vars(base) and not base.__module__.startswith(("sqlalchemy.", "session_plugin."))
            for each in classes
            for base in each.__mro__
        )
        self.make_permits()
        self._factory = factory
        self._factory_options: dict[str, Any] | None = factory_options  # last: what failed before is tried again
        self._may_change: bool = factory is not None or self._find_change is not None

    def watch(self, find_change: Callable[[bool], Configuration | None]) -> None:
        """Take over each configuration that ``find_change`` returns; None stands for that of before.

        Its argument is True after ``dispose()``, when it may take its time.
        """
        self._find_change = find_change
        self._may_change = True

    def up_to_date(self) -> Self:
        """Return this object, configured anew if what names the database has changed.

        Sessions that exist keep their engines; those that are made from now on have the new ones.

        Raises:
            ConfigurationError: the new configuration cannot work, or a test has isolated the database.
        """
        if self._may_change:
            with self._configuring:
                if self._find_change is not None:
                    self._changed = self._find_change(self._disposed) or self._changed
                    self._disposed = False
                if self._factory is not None and self._factory.kw != self._factory_options:
                    self._changed = self._changed or self.configuration
                if self._changed is not None:
                    self._configure_anew(self._changed)
                    self._changed = None
        return self

    def check_may_change(self) -> None:
        """Raise `ConfigurationError` if a test has isolated the database."""
        if self.isolated:
            raise ConfigurationError(
                "What names the database was changed inside isolated(). Change it before the block, so that the block "
                "isolates the new database."
            )

    def _configure_anew(self, configuration: Configuration) -> None:
        self.check_may_change()
        before = self.engines
        self._configure(configuration)
        self._retired.append(before)  # a session that exists may still take a connection from their pools
        self.close_retired()
        logger.info("What names the database has changed: sessions that are made from now on use the new one.")

    @abstractmethod
    def close_retired(self) -> None:
        """Close the pooled connections of the engines that were replaced, unless only `dispose` can."""

    @property
    def made_here(self) -> list[Any]:
        """The engines that were made here, those that were replaced included."""
        return [engine for engines in (self.engines, *self._retired) for engine in engines.made_here]

    def with_own_options(self, configuration: Configuration) -> Configuration:
        """Return ``configuration`` without the options that are neither the session's nor the engine's."""
        return configuration

    def make_permits(self) -> None:
        """Make the permits and places of sync sessions under an event loop; nobody has one yet."""
        self.semaphore: FairSemaphore = self.engines.make_semaphore()
        self.pending_sessions: PendingSessions = self.engines.make_pending_sessions(self._max_pending_sessions)
        self._extra_threads: WeakKeyDictionary[asyncio.AbstractEventLoop, ExtraThreads] = WeakKeyDictionary()

    def extra_threads(self, loop: asyncio.AbstractEventLoop) -> ExtraThreads:
        """Return what counts the threads of ``loop`` that wait for a connection or hold one."""
        threads = self._extra_threads.get(loop)
        if threads is None:  # of two threads that make one at once, both get the first
            threads = self._extra_threads.setdefault(loop, ExtraThreads(loop, self._max_pending_sessions))
        return threads

    @abstractmethod
    def default_session_class(self) -> type[Any]:
        """Return SQLAlchemy's own session class."""

    @abstractmethod
    def make_maker(self, class_: Any, bind: Any, options: dict[str, Any]) -> Any:
        """Make the session factory."""

    @abstractmethod
    def new_session(self, unit: UnitOfWork[Any] | None) -> Any:
        """Make the session of ``unit``; for None, one that belongs to no unit of work."""

    @abstractmethod
    def run_hooks(self, calls: list[Callable[[], Any]]) -> KeyboardInterrupt | None:
        """Make the calls that are due, each in a unit of work of its own.

        What they raise is logged, by whatever exception they end: it comes too late to change what the client
        receives, and the other hooks are run.

        Returns:
            a Ctrl-C that came meanwhile.
        """

    def forget_parent(self) -> None:
        """In a forked child, start with empty pools and all permits, and leave the parent's sockets alone."""
        self._configuring = threading.Lock()  # another thread of the parent may have held it
        self.forget_connections()
        self.make_permits()

    def forget_connections(self) -> None:
        """Start with empty pools, and leave their connections alone."""
        for engines in (self.engines, *self._retired):
            engines.forget_connections()
        self._retired.clear()

    def engine_for(self, engine: Engine, policy: Policy, *, may_write: bool) -> Engine:
        """Return ``engine``, or its variant that begins as ``policy`` says."""
        engines = self.engines
        if self._retired and engine not in engines.known:  # its session was made before a change
            engines = next((before for before in self._retired if engine in before.known), engines)
        return engines.variants.engine_for(engine, policy, may_write=may_write)

    def schema_connection(self, engine: Any) -> Any:
        """Return a block with a connection that creates or drops tables, and commits that."""
        return engine.begin()

    def tables_by_engine(self, metadata: MetaData) -> Iterator[tuple[Any, list[Table]]]:
        """Yield each engine with the tables of ``metadata`` that live on it."""
        binds = self.engines.binds
        bound = {table: engine for key, engine in binds.items() for table in _tables(key)}
        default = self.engines.named.get(DEFAULT)
        mapped = {mapper.local_table for key in binds for mapper in _mappers_beside(key)}
        for table in metadata.sorted_tables:
            referred = {bound.get(foreign_key.column.table, default) for foreign_key in table.foreign_keys}
            if table not in bound and table not in mapped and len(referred) == 1:  # an association table
                bound[table] = referred.pop()
        for engine in dict.fromkeys([*self.engines.named.values(), *binds.values()]):
            tables = [table for table in metadata.sorted_tables if bound.get(table, default) is engine]
            if tables:
                yield engine, tables


class SyncCore(DatabaseCore):
    """The core of a `Database`."""

    is_async: bool = False

    def with_own_options(self, configuration: Configuration) -> Configuration:
        """Return ``configuration`` without ``max_pending_sessions``."""
        options = dict(configuration.options)
        limit = options.pop("max_pending_sessions", MAX_PENDING_SESSIONS)
        if not isinstance(limit, int) or limit < 1:
            raise ConfigurationError(
                "max_pending_sessions must be an integer of at least 1. Leave it out for the default of "
                f"{MAX_PENDING_SESSIONS}."
            )
        self._max_pending_sessions = limit
        return replace(configuration, options=options)

    def default_session_class(self) -> type[Any]:
        """Return `Session`."""
        return Session

    def make_maker(self, class_: Any, bind: Any, options: dict[str, Any]) -> Any:
        """Make a `sessionmaker`."""
        return _fixed(sessionmaker)(bind, class_=scope_session_class(class_), **options)

    def close_retired(self) -> None:
        """Close their pooled connections."""
        for engines in self._retired:
            for engine in engines.made_here:
                engine.dispose()

    def dispose(self) -> None:
        """Close the pooled connections of the engines made here."""
        self._disposed = True
        for engine in self.made_here:
            engine.dispose()
        self._retired.clear()

    def new_session(self, unit: UnitOfWork[Any] | None) -> Any:
        """Make a session."""
        check_process()
        if self._may_change:
            self.up_to_date()
        session = self.maker()
        session._unit_of_work = unit
        return session

    def run_hooks(self, calls: list[Callable[[], Any]]) -> KeyboardInterrupt | None:
        """Make the calls."""
        interrupt = None
        for call in calls:
            try:
                with session_scope(self, new=True, for_hook=True):
                    result = call()
                    if inspect.iscoroutine(result):
                        result.close()
                        raise TypeError("a hook of a sync database returned a coroutine, which nothing awaits")
            except BaseException as error:
                interrupt = log_failed_hook(call, error) or interrupt
        return interrupt


class AsyncCore(DatabaseCore):
    """The core of an `AsyncDatabase`, which serves one event loop at a time."""

    is_async: bool = True
    _loop: asyncio.AbstractEventLoop | None = None

    def default_session_class(self) -> type[Any]:
        """Return `AsyncSession`."""
        require_greenlet()
        from sqlalchemy.ext.asyncio import AsyncSession

        return AsyncSession

    def make_maker(self, class_: Any, bind: Any, options: dict[str, Any]) -> Any:
        """Make an `async_sessionmaker`; without expiry, since an async session cannot load lazily what it expired."""
        from sqlalchemy.ext.asyncio import async_sessionmaker

        sync_class = options.pop("sync_session_class", class_.sync_session_class)
        options.setdefault("expire_on_commit", False)
        options["sync_session_class"] = scope_session_class(sync_class)
        return _fixed(async_sessionmaker)(bind, class_=class_, **options)

    def close_retired(self) -> None:
        """Leave them to `dispose`, which can await."""

    def new_session(self, unit: UnitOfWork[Any] | None) -> Any:
        """Make a session on the running event loop.

        Raises:
            ConfigurationError: another event loop that is not closed uses this database.
        """
        check_process()
        if self._may_change:
            self.up_to_date()
        self.adopt_running_loop()
        session = self.maker()
        session.sync_session._unit_of_work = unit
        return session

    def adopt_running_loop(self) -> None:
        """Let the running event loop use this database, with connections of its own.

        Raises:
            ConfigurationError: another event loop that is not closed uses this database.
        """
        loop = running_loop() or loop_of_worker_thread()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            state = "runs" if self._loop.is_running() else "has stopped and was not closed"
            raise ConfigurationError(
                "This async database is in use on another event loop, and its connections cannot serve "
                "two. Make one AsyncDatabase per loop, or `await db.dispose()` on the first one. "
                f"The other loop {state}: close it if nothing uses it any more, as asyncio.run() does. With "
                "pytest-asyncio, give fixtures and tests the same loop_scope."
            )
        if self._loop is not None:
            self.forget_connections()
            gc.collect()  # closes the sockets of the loop that has ended, which are in reference cycles
        self._loop = loop

    async def dispose(self) -> None:
        """Close the pooled connections of the engines made here; then another event loop may use the database."""
        self._disposed = True
        for engine in self.made_here:
            await engine.dispose()
        self._retired.clear()
        self._loop = None

    def forget_parent(self) -> None:
        """As for every database; and the event loop, which runs in the parent only."""
        super().forget_parent()
        self._loop = None

    def run_hooks(self, calls: list[Callable[[], Any]]) -> KeyboardInterrupt | None:
        """Make and await the calls inside SQLAlchemy's greenlet."""
        if not calls:
            return None
        from sqlalchemy.util import await_only

        return await_only(self.arun_hooks(calls))

    async def arun_hooks(self, calls: list[Callable[[], Any]]) -> KeyboardInterrupt | None:
        """Make and await the calls."""
        interrupt = None
        for call in calls:
            try:
                async with asession_scope(self, new=True, for_hook=True):
                    result = call()
                    if inspect.isawaitable(result):
                        await result
            except GeneratorExit:
                raise  # this coroutine itself is being closed, and can await nothing more
            except BaseException as error:  # this task's own cancellation waits in `uncancelled`
                interrupt = log_failed_hook(call, error) or interrupt
        return interrupt


class _FixedBinds:
    """First base of the session factory of a database, whose engines the database knows."""

    def configure(self, **options: Any) -> None:
        """As SQLAlchemy's, but the engines cannot be replaced."""
        if "bind" in options or "binds" in options:
            raise ConfigurationError(
                "db.sessionmaker cannot be bound to another engine or connection. In a test, use "
                "`with db.isolated() as session:`; to change the database later, let a function name it, or your own "
                "sessionmaker."
            )
        super().configure(**options)  # type: ignore[misc]


@lru_cache
def _fixed(factory_class: type[Any]) -> type[Any]:
    return type(factory_class.__name__, (_FixedBinds, factory_class), {"__module__": factory_class.__module__})


alive: WeakSet[DatabaseCore] = WeakSet()
"""Those of all databases that are alive."""


def _mappers_beside(key: Any) -> Iterable[Mapper[Any]]:
    """Return the mappers of all classes that have the same declarative base as a key of ``binds``."""
    registry = getattr(key.class_ if isinstance(key, Mapper) else key, "registry", None)
    return registry.mappers if registry is not None else ()


def _tables(key: Any) -> Iterator[Table]:
    """Yield the tables of a key of ``binds``: a table, or a mapper or mapped class with its subclasses."""
    if isinstance(key, Table):
        yield key
        return
    mapped_class: type[Any] = key.class_ if isinstance(key, Mapper) else key
    if isinstance(table := getattr(mapped_class, "__table__", None), Table):
        yield table
    subclasses: list[type[Any]] = mapped_class.__subclasses__()
    for subclass in subclasses:
        yield from _tables(subclass)
