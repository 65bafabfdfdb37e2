"""What a user said of a database, before anything is made of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import URL, Engine, MetaData
from sqlalchemy.orm import Session, sessionmaker

from .policy import Decision, Outcome, Policy, commit_on_success

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

    from .database import BaseDatabase

    Source: TypeAlias = (
        str
        | URL
        | Engine
        | AsyncEngine
        | Mapping[str, Any]
        | sessionmaker[Any]
        | async_sessionmaker[Any]
        | BaseDatabase[Any]
        | Callable[[], Any]
    )

PolicyLike: TypeAlias = Policy | Callable[[Outcome], Decision]

DEFAULT = "default"
"""What the only engine of a database is called."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The arguments of a `Database` or of a plugin."""

    source: Source | None
    class_: type[Any] | None
    policy: PolicyLike
    metadata: MetaData | None
    binds: Mapping[Any, Any] | None
    options: Mapping[str, Any]

    def updated(self, source: Source | None, options: Mapping[str, Any]) -> Configuration:
        """This configuration with a later word on its source and its options."""
        return replace(
            self,
            source=self.source if source is None else source,
            options={**self.options, **options},
        )

    def names_more_than_a_source(self) -> bool:
        """True if anything but the source was said."""
        said = self.options or self.binds or self.metadata is not None or self.policy is not commit_on_success
        return bool(said) or self.class_ is not None

    def unfolded(self) -> Configuration:
        """What ``bind=`` and a session factory mean, said as everything else is."""
        options = dict(self.options)
        bind = options.pop("bind", None)
        source: Any = bind if self.source is None else self.source
        if not hasattr(source, "class_"):
            return replace(self, source=source, options=options)
        options = {**source.kw, **options}
        return replace(
            self,
            source=options.pop("bind", None),
            class_=source.class_,
            binds=options.pop("binds", self.binds),
            options=options,
        )

    def divided_options(self, session_class: type[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of ``session_class``, and the others, which are the engine's."""
        session_options = dict(self.options)
        session_names = _session_option_names(session_class)
        engine_options = {name: session_options.pop(name) for name in self.options if name not in session_names}
        return session_options, engine_options


def _session_option_names(session_class: type[Any]) -> set[str]:
    """What the session class takes, but for ``execution_options``, which every engine takes too."""
    classes = [*session_class.__mro__, *getattr(session_class, "sync_session_class", Session).__mro__]
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    return (names | {"sync_session_class"}) - {"self", "args", "kwargs", "kw", "execution_options"}
