"""`Configuration`: the arguments of a database, checked, before anything is made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import URL, Engine, FromClause, MetaData
from sqlalchemy.orm import Mapper, Session, sessionmaker

from ..exceptions import ConfigurationError
from ..policy import PolicyLike, as_policy, commit_on_success

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

    Source: TypeAlias = (
        str
        | URL
        | Engine
        | AsyncEngine
        | Mapping[str, Any]
        | sessionmaker[Any]
        | async_sessionmaker[Any]
        | Callable[[], Any]
    )
    """What names a database; a plugin also takes a `Database` or an `AsyncDatabase`."""


@dataclass(frozen=True, slots=True, repr=False)
class Configuration:
    """The arguments of a `Database` or of a plugin; it has no repr, since a URL may hold a password.

    Raises:
        ConfigurationError: one of them has a type that SQLAlchemy would refuse late, or not at all.
        PolicyError: ``policy`` is not a policy.
    """

    source: Source | None
    class_: type[Any] | None
    policy: PolicyLike
    metadata: MetaData | None
    binds: Mapping[Any, Any] | None
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if is_late(self.source):
            _check_late_source(self.source)
        as_policy(self.policy)
        if not isinstance(self.metadata, MetaData | None):
            raise ConfigurationError(
                f"metadata must be a MetaData, and {_kind(self.metadata)} is not one. Give Base.metadata."
            )
        if not isinstance(self.binds, Mapping | None):
            raise ConfigurationError(
                f"binds must be a mapping, and is of type {_kind(self.binds)}. Give {{Order: engine}}, with an engine "
                "or the name of one."
            )
        for key in self.binds or ():
            if not isinstance(key, type | FromClause | Mapper):
                raise ConfigurationError(
                    f"The keys of binds must be mapped classes, mappers or tables, and one is of type {_kind(key)}. "
                    "Give a mapped class: {Order: engine}."
                )

    def updated(self, source: Source | None, options: Mapping[str, Any]) -> Configuration:
        """Return this configuration with another source, unless that is None, and with further options."""
        if source is None:
            return replace(self, options={**self.options, **options})
        kept = {name: value for name, value in self.options.items() if name != "bind"}
        return replace(self, source=source, options={**kept, **options})

    def names_more_than_a_source(self) -> bool:
        """Return True if anything but the source was given."""
        given = self.options or self.binds or self.metadata is not None or self.policy is not commit_on_success
        return bool(given) or self.class_ is not None

    @property
    def session_factory(self) -> Any:
        """The user's session factory, if one names the database, or None; its ``configure()`` may change it later."""
        source = self.options.get("bind") if self.source is None else self.source
        return source if hasattr(source, "class_") else None

    def unfolded(self) -> Configuration:
        """Return this configuration with ``bind=`` and a session factory replaced by what they contain.

        Raises:
            ConfigurationError: two databases are named.
        """
        options = dict(self.options)
        bind = options.pop("bind", None)
        if bind is not None and self.source is not None:
            raise ConfigurationError("Both a source and bind= name the database. Give one of them.")
        source: Any = bind if self.source is None else self.source
        if not hasattr(source, "class_"):
            return replace(self, source=source, options=_unfold_sync_session_class(options))
        options = _unfold_sync_session_class({**source.kw, **options})
        return replace(
            self,
            source=options.pop("bind", None),
            class_=self.class_ or source.class_,
            binds=self.binds or options.pop("binds", None),
            options={name: value for name, value in options.items() if name != "binds"},
        )

    def session_class(self, default: type[Any]) -> type[Any]:
        """Return the session class: ``default``, or a subclass of it.

        Raises:
            ConfigurationError: ``class_`` is not a subclass of ``default``.
        """
        if self.class_ is None:
            return default
        if not (isinstance(self.class_, type) and issubclass(self.class_, default)):
            owner = "Database" if default is Session else "AsyncDatabase"
            raise ConfigurationError(
                f"{owner} needs a subclass of {default.__name__}, and {_kind(self.class_)} is not one. Give another "
                "class_ or session factory, or use the database class that fits it."
            )
        return self.class_

    def divided_options(self, session_class: type[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options of ``session_class``, and the others, which are the engine's."""
        session_options = dict(self.options)
        session_names = _session_option_names(session_class)  # type: ignore[arg-type]  # a class is hashable
        engine_options = {name: session_options.pop(name) for name in self.options if name not in session_names}
        return session_options, engine_options


def _kind(given: Any) -> str:
    """Return the name of a type for a message; a repr might hold a password."""
    return given.__name__ if isinstance(given, type) else type(given).__name__


def is_late(source: Any) -> bool:
    """Return True for a function that returns the source; a session factory, which is callable too, is the source."""
    return callable(source) and not hasattr(source, "class_")


def _check_late_source(source: Any) -> None:
    try:
        inspect.signature(source).bind()
        is_plain = not inspect.iscoroutinefunction(source)
    except TypeError:
        is_plain = False
    except ValueError:
        is_plain = True  # a builtin without a signature
    if not is_plain:
        raise ConfigurationError(
            f"{source!r} cannot name a database: it must be a plain function without arguments. Give an app to "
            "db.init_app(app)."
        )


def _unfold_sync_session_class(options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options`` with a `sessionmaker` in place of ``sync_session_class`` replaced by what it contains.

    SQLAlchemy documents such a `sessionmaker` as the target of events of async sessions.  Of its own options, an
    `async_sessionmaker` always overrides three.
    """
    maker = options.get("sync_session_class")
    if not isinstance(maker, sessionmaker):
        return options
    own = {name: value for name, value in maker.kw.items() if name not in ("bind", "autoflush", "expire_on_commit")}
    return {**own, **options, "sync_session_class": maker.class_}


@lru_cache(maxsize=16)
def _session_option_names(session_class: type[Any]) -> set[str]:
    """Return the options of the session class, without ``execution_options``, which every engine has too."""
    classes = [*session_class.__mro__, *getattr(session_class, "sync_session_class", Session).__mro__]
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    return (names | {"sync_session_class"}) - {"self", "args", "kwargs", "kw", "execution_options"}
