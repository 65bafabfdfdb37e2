"""From what a user names a database by to engines, and from a policy to a way to begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import sqlalchemy
from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoSuchModuleError
from sqlalchemy.pool import QueuePool

from . import _mysql, _sqlite
from ._pools import fair_pool_class
from ._watch import watch_engine
from .exceptions import ConfigurationError, shown

ASYNC_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "mysql": "mysql+asyncmy",
    "mariadb": "mariadb+asyncmy",
}


def resolve(
    given: Any, options: Mapping[str, Any], owner: object, *, is_async: bool
) -> tuple[Any, Mapping[str, Any] | None]:
    """The engine that ``given`` names, and the options it was made with here, or None if it was made elsewhere.

    Raises:
        ConfigurationError: ``given`` names none, or not one of this kind.
    """
    if isinstance(given, Mapping):
        options = {**options, **given}
        given = options.pop("url", None)
        if given is None:
            raise ConfigurationError('Named engines need a "url" each: {"reports": {"url": ..., "pool_size": 2}}.')
    if isinstance(given, str | URL):
        return make_engine(given, options, owner, is_async=is_async), options
    check_engine(given, owner, is_async=is_async)
    if options:
        raise ConfigurationError(
            f"The options {', '.join(sorted(options))} came too late for {shown(sync_engine(given).url)}, whose engine "
            "is already made. Give them to create_engine()."
        )
    return given, None


def check_engine(given: Any, owner: object, *, is_async: bool) -> None:
    """Insist on an engine that fits ``owner``.

    Raises:
        ConfigurationError: it is none, or not of this kind.
    """
    kind = type(given).__name__  # its repr might hold a password
    if not isinstance(sync_engine(given), Engine):
        raise ConfigurationError(
            f"An object of type {kind} names no database. Give a URL, an Engine, or named engines; a plugin also takes "
            "a Database, or a function that answers any of these."
        )
    if isinstance(given, Engine) == is_async:
        raise ConfigurationError(
            f"The {kind} of {shown(sync_engine(given).url)} does not fit {type(owner).__name__}: an Engine goes to "
            "Database, and an AsyncEngine to AsyncDatabase."
        )


def sync_engine(engine: Any) -> Any:
    """The `Engine` inside an `AsyncEngine`; anything else as it is."""
    return getattr(engine, "sync_engine", engine)


_prepared: WeakSet[Engine] = WeakSet()
"""The engines that are listened to: `event.contains` goes by an id, which another engine may have had."""


def prepare(engine: Engine) -> None:
    """Listen on ``engine`` for what the promises need; a second call changes nothing."""
    if engine in _prepared:
        return
    _prepared.add(engine)
    watch_engine(engine)
    if engine.dialect.name == "sqlite":
        _sqlite.prepare(engine)
    elif engine.dialect.name in _mysql.NAMES:
        _mysql.prepare(engine)


def make_engine(url: str | URL, options: Mapping[str, Any], owner: object, *, is_async: bool) -> Any:
    """An `Engine`, or an `AsyncEngine` if ``is_async``.

    Raises:
        ConfigurationError: the URL or an option is wrong, or a driver is missing.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "The database URL cannot be read. It has the form dialect+driver://user:password@host/database, "
            "for example postgresql+psycopg://localhost/shop."
        ) from None
    _check_numbers(options)
    try:
        connects_to = _sqlite.shared_memory_url(parsed, owner)
        engine = _creator(is_async)(connects_to, **_pool_options(connects_to, options, is_async=is_async))
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The driver of {shown(parsed)} is not installed: pip install {error.name}."
        ) from error
    except NoSuchModuleError as error:
        raise ConfigurationError(f"SQLAlchemy knows no dialect for {shown(parsed)}: {error}.") from error
    except InvalidRequestError as error:
        raise _needs_async_driver(parsed) from error
    except (TypeError, ValueError, LookupError, ArgumentError) as error:
        names = ", ".join(sorted(options)) or "none"
        raise ConfigurationError(
            f"create_engine() refuses {shown(parsed)}, or one of the options that the session class does not know "
            f"({names}). Correct the URL, or the option's name or value: {error}"
        ) from error
    if not is_async and engine.dialect.is_async:
        raise ConfigurationError(
            f"{shown(parsed)} names an async driver, and this is a sync database. Use AsyncDatabase or "
            "AsyncSessionPlugin, or write the URL with a sync driver."
        )
    return engine


def _pool_options(url: URL, options: Mapping[str, Any], *, is_async: bool) -> Mapping[str, Any]:
    """``options``, and a pool in which nobody is overtaken, unless the user or a plugin of SQLAlchemy chooses it."""
    if options.get("poolclass") or options.get("pool") or options.get("plugins") or "plugin" in url.query:
        return options
    return {**options, "poolclass": fair_pool_class(url, is_async=is_async)}


def _check_numbers(options: Mapping[str, Any]) -> None:
    """SQLAlchemy compares these with a number when it first needs them."""
    for name in ("pool_size", "max_overflow", "pool_timeout", "pool_recycle"):
        if isinstance(options.get(name), str):
            raise ConfigurationError(f"{name} must be a number, and is a string. Turn it into one: int(...).")


def require_greenlet() -> None:
    """Look before `sqlalchemy.ext.asyncio` is imported, which fails without it and says nothing of extras.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import greenlet  # noqa: F401
    except ImportError as error:
        raise ConfigurationError('An async database needs greenlet: pip install "session_plugin[asyncio]".') from error


def _creator(is_async: bool) -> Callable[..., Any]:
    if not is_async:
        return sqlalchemy.create_engine  # looked up late, so that instrumentation may have replaced it
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine


def _needs_async_driver(url: URL) -> ConfigurationError:
    backend = url.get_backend_name()
    suggested = ASYNC_DRIVERS.get(backend, f"{backend}+<an async driver>")
    return ConfigurationError(
        f"{url.drivername} is a sync driver, and this is an async database. Write {suggested}://... or use "
        "Database or SessionPlugin."
    )


def limits(engine: Engine, options: Mapping[str, Any] | None) -> tuple[int, float] | None:
    """How many connections the pool hands out at once, and the seconds that it lets one wait; None if it has no limit.

    ``options`` are those the engine was created with; None means that it was made elsewhere, and
    its overflow, which no public attribute tells, counts as none.
    """
    pool = engine.pool
    if not isinstance(pool, QueuePool) or pool.size() == 0:
        return None
    overflow: int = 0 if options is None else options.get("max_overflow", 10)
    return None if overflow < 0 else (pool.size() + overflow, pool.timeout())
