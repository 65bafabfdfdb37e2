"""`Engines`: the engines of one database, by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Mapper

from ..exceptions import ConfigurationError
from .making import check_engine, connection_limit, prepare, resolve, sync_engine
from .semaphore import DEFAULT_TIMEOUT, FairSemaphore, PendingSessions
from .variants import EngineVariants

DEFAULT = "default"
"""The name of the only engine of a database."""


class Engines:
    """Engines by name, and the binds that refer to them; `AsyncEngine` instances on an async database.

    Attributes:
        named: the engines by name.
        binds: from a mapped class, a mapper or a table to its engine.
        variants: how transactions begin on them.
        stream_results: True if an engine has the execution option of that name.
    """

    def __init__(
        self, source: Any, binds: Mapping[Any, Any], options: Mapping[str, Any], owner: object, *, is_async: bool
    ) -> None:
        """Make the engines, or take the user's.

        Args:
            source: a URL, an engine, or a mapping of names to any of these.
            binds: from a mapped class, a mapper or a table to an engine or the name of one.
            options: of ``create_engine()``.
            owner: what the engines belong to; see `make_engine`.
            is_async: True for an async database.

        Raises:
            ConfigurationError: any of it cannot work.
        """
        self._is_async = is_async
        given = source if isinstance(source, Mapping) else {DEFAULT: source}
        resolved = {name: resolve(each, options, owner, is_async=is_async) for name, each in given.items()}
        named = {name: engine for name, (engine, _) in resolved.items()}
        self.named: Mapping[str, Any] = MappingProxyType(named)  # assigning to it would replace no session's engine
        self._options = {name: made_with for name, (_, made_with) in resolved.items()}
        self.binds: Mapping[type[Any] | Mapper[Any] | Any, Any] = {key: self._bind(bind) for key, bind in binds.items()}
        self._made_with: dict[Engine, Mapping[str, Any] | None] = {
            **{sync_engine(engine): None for engine in self.binds.values()},
            **{sync_engine(engine): made_with for engine, made_with in resolved.values()},
        }
        self.variants: EngineVariants = EngineVariants(self._made_with, owner, is_async=is_async)
        for engine, options_of_engine in self._made_with.items():
            prepare(engine, made_here=options_of_engine is not None)
        self.stream_results: bool = any(engine.get_execution_options().get("stream_results") for engine in self.known)

    def _bind(self, bind: Any) -> Any:
        if not isinstance(bind, str):
            check_engine(bind, is_async=self._is_async)
            return bind
        if bind not in self.named:
            what = "a URL" if "://" in bind else f"the engine {bind!r}"
            raise ConfigurationError(
                f"binds names {what}, but the engines are called {self._names()}. Name one of these, or give an Engine."
            )
        return self.named[bind]

    def _names(self) -> str:
        return ", ".join(map(repr, self.named)) or "none by name"

    @property
    def known(self) -> Collection[Engine]:
        """The sync engines inside all of them, those that read without transactions included."""
        return self._made_with.keys()

    @property
    def made_here(self) -> list[Any]:
        """The engines that were made here, and that ``dispose()`` ends; the user disposes of the others."""
        named = [engine for name, engine in self.named.items() if self._options[name] is not None]
        return [*named, *self.variants.autocommit_engines.values()]

    def called(self, name: str) -> Any:
        """Return the engine of that name.

        Raises:
            ConfigurationError: no engine has that name.
        """
        if name not in self.named:
            raise ConfigurationError(
                f"No engine is called {name!r}; there are {self._names()}. Take one of them, "
                "db.engines[...], or one that binds names."
            )
        return self.named[name]

    def make_semaphore(self) -> FairSemaphore:
        """Make a semaphore with a permit for each connection of the smallest pool.

        The engines of ``binds`` count only where there is no other one.
        """
        engines = self.named.values() or self.binds.values()
        limits = [
            limit
            for engine in map(sync_engine, engines)
            if (limit := connection_limit(engine, self._made_with[engine])) is not None
        ]
        return FairSemaphore(*min(limits, default=(None, None)))

    def make_pending_sessions(self, limit: int) -> PendingSessions:
        """Make ``limit`` places for sessions that have no connection yet; one waits for a place as for a connection."""
        timeouts = [
            found[1]
            for name, engine in self.named.items()
            if (found := connection_limit(sync_engine(engine), self._options[name])) is not None
        ]
        return PendingSessions(limit, min(timeouts, default=DEFAULT_TIMEOUT))

    def forget_connections(self) -> None:
        """Replace the pools by empty ones, and leave their connections to whoever else uses them."""
        for engine in list(self.known):
            engine.dispose(close=False)
