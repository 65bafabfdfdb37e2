"""Engines and the session factory, configured in one place."""

from __future__ import annotations

import asyncio
import inspect
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Engine, MetaData, Table
from sqlalchemy.orm import Mapper, Session, sessionmaker

from . import _engines
from ._begin import Twins
from ._hooks import log_failed
from ._permits import Permits
from ._processes import databases
from ._session import scope_session_class
from .access import Access
from .async_access import AsyncAccess
from .configuration import DEFAULT, Configuration
from .exceptions import ConfigurationError
from .policy import Policy, as_policy
from .scope import SessionScope
from .sync_access import SyncAccess
from .typevars import AsyncS, S, SyncS

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker


AnyEngine: TypeAlias = "Engine | AsyncEngine"


class BaseDatabase(Access[S]):
    """What `Database` and `AsyncDatabase` share: the reading of their configuration."""

    is_async: bool
    _maker: Any
    _named_engines: Mapping[str, Any]

    def _set_up(self, configuration: Configuration) -> None:
        configuration = configuration.unfolded()
        if configuration.source is None or configuration.source == {}:
            raise ConfigurationError(
                "No database is configured. Give a URL, such as sqlite:///shop.db, or an Engine as the first argument; "
                "in Flask the configuration may name it: SQLALCHEMY_DATABASE_URI."
            )
        self._default_policy: Policy = as_policy(configuration.policy)
        self._given_metadata: MetaData | None = configuration.metadata
        session_class = configuration.session_class(self._default_session_class(), self)
        session_options, options = configuration.divided_options(session_class)
        source = configuration.source
        named = source if isinstance(source, Mapping) else {DEFAULT: source}
        resolved = {
            name: _engines.resolve(given, options, self, is_async=self.is_async) for name, given in named.items()
        }
        self._named_engines = {name: engine for name, (engine, _) in resolved.items()}
        self._engine_options = {name: made_with for name, (_, made_with) in resolved.items()}
        self._twins = Twins(self)
        self.binds: Mapping[Any, AnyEngine] = {
            key: self._bind(bind) for key, bind in (configuration.binds or {}).items()
        }
        bound = {*self._named_engines.values(), *self.binds.values()}
        self._known_engines: set[Engine] = {_engines.sync_engine(engine) for engine in bound}
        for engine in self._known_engines:
            _engines.prepare(engine)
        self._has_lazy_cursors: bool = not self.is_async and any(
            engine.dialect.name == "sqlite" for engine in self._known_engines
        )
        self._streams_results: bool = any(
            engine.get_execution_options().get("stream_results") for engine in self._known_engines
        )
        if self.binds:
            session_options["binds"] = self.binds
        self._maker = self._make_maker(session_class, self._named_engines.get(DEFAULT), session_options)
        classes = (session_class, self._maker.kw.get("sync_session_class", session_class))
        self._has_own_close: bool = any(not each.close.__module__.startswith("sqlalchemy.") for each in classes)
        self._permits = self._make_permits()
        databases.add(self)

    def _bind(self, bind: Any) -> AnyEngine:
        if not isinstance(bind, str):
            _engines.check_engine(bind, self, is_async=self.is_async)
            return bind  # type: ignore[no-any-return]
        if bind not in self._named_engines:
            what = "a URL" if "://" in bind else f"the engine {bind!r}"
            raise ConfigurationError(
                f"binds names {what}, and the engines are called {self._names()}. Name one of these, or give an Engine."
            )
        return self._named_engines[bind]  # type: ignore[no-any-return]

    def _names(self) -> str:
        return ", ".join(map(repr, self._named_engines))

    @abstractmethod
    def _default_session_class(self) -> type[Any]:
        """SQLAlchemy's own."""

    @abstractmethod
    def _make_maker(self, class_: Any, bind: Any, options: dict[str, Any]) -> Any:
        """The session factory."""

    @abstractmethod
    def _run_hooks(self, calls: list[Callable[[], Any]]) -> None:
        """Make the calls that a finished transaction has earned, each in a unit of work of its own."""

    @abstractmethod
    def dispose(self) -> Awaitable[None] | None:
        """Close the pooled connections of the engines made here."""

    def _new_session(self) -> S:
        """A session for a scope of this database."""
        session: S = self._maker()
        return session

    def _schema_connection(self, engine: Any) -> Any:
        """A block with a connection that creates or drops tables, and commits that."""
        return engine.begin()

    @property
    def _own_engines(self) -> list[Any]:
        """The engines that were made here, and that ``dispose()`` ends."""
        named = [engine for name, engine in self._named_engines.items() if self._engine_options[name] is not None]
        return [*named, *self._twins.readers.values()]

    def _make_permits(self) -> Permits:
        """One permit per connection of the smallest pool, for sync sessions under an event loop."""
        limits = [
            limit
            for name, engine in self._named_engines.items()
            if (limit := _engines.limits(_engines.sync_engine(engine), self._engine_options[name])) is not None
        ]
        return Permits(*min(limits, default=(None, None)))

    def _engine_called(self, name: str) -> Any:
        """The engine of that name.

        Raises:
            ConfigurationError: there is none.
        """
        if name not in self._named_engines:
            raise ConfigurationError(
                f"No engine is called {name!r}; there are {self._names()}. Ask for one by db.engines[...]."
            )
        return self._named_engines[name]

    def _begin_engine(self, engine: Engine, scope: SessionScope[Any]) -> Engine:
        """``engine``, or its twin that begins as the scope's policy says."""
        return self._twins.engine_for(engine, scope)

    def _options_of(self, engine: Engine) -> Mapping[str, Any] | None:
        """What ``engine`` was made with, or None if it was made elsewhere."""
        names = {_engines.sync_engine(named): name for name, named in self._named_engines.items()}
        return self._engine_options[names[engine]] if engine in names else None

    def _tables_by_engine(self, metadata: MetaData) -> Iterator[tuple[Any, list[Table]]]:
        """Each engine with the tables of ``metadata`` that live on it."""
        bound = {table: engine for key, engine in self.binds.items() for table in _tables(key)}
        default = self._named_engines.get(DEFAULT)
        engines = list(dict.fromkeys([*self._named_engines.values(), *self.binds.values()]))
        for engine in engines:
            tables = [table for table in metadata.sorted_tables if bound.get(table, default) is engine]
            if tables:
                yield engine, tables


class Database(SyncAccess[SyncS], BaseDatabase[SyncS]):
    """A sync database: its engines, its session factory, and its units of work.

    ::

        db = Database("sqlite:///shop.db")
        with db.session_scope() as session:
            session.add(Order(item="tea"))
    """

    is_async: bool = False
    _named_engines: Mapping[str, Engine]
    _maker: sessionmaker[SyncS]

    @property
    def database(self) -> Database[SyncS]:
        """This object."""
        return self

    def _default_session_class(self) -> type[Any]:
        return Session

    def _make_maker(self, class_: Any, bind: Any, options: dict[str, Any]) -> Any:
        return sessionmaker(bind, class_=scope_session_class(class_), **options)

    def _run_hooks(self, calls: list[Callable[[], Any]]) -> None:
        """Make the calls that a finished transaction has earned, each in a unit of work of its own."""
        for call in calls:
            try:
                with self.session_scope(new=True):
                    result = call()
                    if inspect.iscoroutine(result):
                        result.close()
                        raise TypeError("a hook of a sync database returned a coroutine, which nothing awaits")
            except Exception:
                log_failed(call)


class AsyncDatabase(AsyncAccess[AsyncS], BaseDatabase[AsyncS]):
    """An async database: its engines, its session factory, and its units of work.

    ``expire_on_commit`` is False unless given, since an async session cannot load lazily what
    its commit has expired.
    """

    is_async: bool = True
    _named_engines: Mapping[str, AsyncEngine]
    _maker: async_sessionmaker[AsyncS]

    _loop: asyncio.AbstractEventLoop | None = None

    @property
    def database(self) -> AsyncDatabase[AsyncS]:
        """This object."""
        return self

    def _default_session_class(self) -> type[Any]:
        _engines.require_greenlet()
        from sqlalchemy.ext.asyncio import AsyncSession

        return AsyncSession

    def _make_maker(self, class_: Any, bind: Any, options: dict[str, Any]) -> async_sessionmaker[AsyncS]:
        from sqlalchemy.ext.asyncio import async_sessionmaker

        sync_class = options.pop("sync_session_class", class_.sync_session_class)
        options.setdefault("expire_on_commit", False)
        return async_sessionmaker(bind, class_=class_, sync_session_class=scope_session_class(sync_class), **options)

    def _new_session(self) -> AsyncS:
        """A session for a scope of this database, on the running event loop.

        Raises:
            ConfigurationError: another event loop, still running, uses this database.
        """
        self._adopt_running_loop()
        return super()._new_session()

    def _adopt_running_loop(self) -> None:
        """Let the running event loop use this database, with connections of its own.

        Raises:
            ConfigurationError: another event loop, still running, uses this database.
        """
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise ConfigurationError(
                "This async database is in use on another event loop, and its connections cannot serve "
                "two. Make one AsyncDatabase per loop, or `await db.dispose()` on the first one."
            )
        if self._loop is not None:
            for engine in self._known_engines:
                engine.dispose(close=False)
        self._loop = loop

    async def _dispose_engines(self) -> None:
        """Close the pooled connections of the engines made here; another event loop may use it then."""
        for engine in self._own_engines:
            await engine.dispose()
        self._loop = None

    def _run_hooks(self, calls: list[Callable[[], Any]]) -> None:
        """Make and await the calls that a finished transaction has earned, each in a unit of work of its own."""
        if calls:
            from sqlalchemy.util import await_only

            await_only(self._arun_hooks(calls))

    async def _arun_hooks(self, calls: list[Callable[[], Any]]) -> None:
        for call in calls:
            try:
                async with self.session_scope(new=True):
                    result = call()
                    if inspect.isawaitable(result):
                        await result
            except (Exception, asyncio.CancelledError):  # this task's own cancellation waits in `uncancelled`
                log_failed(call)


def _tables(key: Any) -> Iterator[Table]:
    """The tables of a key of ``binds``: a table, or a mapper or mapped class with its subclasses."""
    if isinstance(key, Table):
        yield key
        return
    mapped_class: type[Any] = key.class_ if isinstance(key, Mapper) else key
    if isinstance(table := getattr(mapped_class, "__table__", None), Table):
        yield table
    subclasses: list[type[Any]] = mapped_class.__subclasses__()
    for subclass in subclasses:
        yield from _tables(subclass)
