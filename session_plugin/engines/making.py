"""From a URL, or whatever else names a database, to an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, InvalidRequestError, NoSuchModuleError
from sqlalchemy.pool import QueuePool

from ..exceptions import ConfigurationError, url_for_message
from .backends import backend_for
from .guard import guard_connections
from .pools import fair_pool_class


def resolve(
    given: Any, options: Mapping[str, Any], owner: object, *, is_async: bool
) -> tuple[Any, Mapping[str, Any] | None]:
    """Return the engine that ``given`` names, and the options with which it was made here, or None if the user made it.

    Raises:
        ConfigurationError: ``given`` does not name an engine, or names one of the other kind.
    """
    if isinstance(given, Mapping):
        options = {**options, **given}
        given = options.pop("url", None)
        if given is None:
            raise ConfigurationError('Named engines need a "url" each: {"reports": {"url": ..., "pool_size": 2}}.')
    if isinstance(given, str | URL):
        return make_engine(given, options, owner, is_async=is_async), options
    check_engine(given, is_async=is_async)
    if options:
        raise ConfigurationError(
            f"The options {', '.join(sorted(options))} cannot be applied to the engine of "
            f"{url_for_message(sync_engine(given).url)}, which exists already. Give them to create_engine()."
        )
    return given, None


def check_engine(given: Any, *, is_async: bool) -> None:
    """Check that ``given`` is an engine of the right kind.

    Raises:
        ConfigurationError: it is not.
    """
    kind = type(given).__name__  # its repr might hold a password
    if isinstance(given, Connection) or hasattr(given, "sync_connection"):
        raise ConfigurationError(
            f"An object of type {kind} cannot name a database: whoever began its transaction decides later whether "
            "what a request has committed is kept. Give the Engine, and in a test use `with db.isolated() as "
            "session:`, at whose end everything that the app has committed is undone."
        )
    if not isinstance(sync_engine(given), Engine):
        raise ConfigurationError(
            f"An object of type {kind} does not name a database. Give a URL, an Engine, or named engines; a plugin "
            "also takes a Database, or a function that returns any of these."
        )
    if isinstance(given, Engine) == is_async:
        raise ConfigurationError(
            f"The {kind} of {url_for_message(sync_engine(given).url)} does not fit {_database_class(is_async)}: give "
            "an Engine to Database, and an AsyncEngine to AsyncDatabase."
        )


def _database_class(is_async: bool) -> str:
    return "AsyncDatabase" if is_async else "Database"


def sync_engine(engine: Any) -> Any:
    """Return the `Engine` inside an `AsyncEngine`; anything else as it is."""
    return getattr(engine, "sync_engine", engine)


_prepared: WeakSet[Engine] = WeakSet()
"""The engines that have our listeners: `event.contains` goes by an id, which another engine may have had."""


def prepare(engine: Engine, *, made_here: bool) -> None:
    """Add the listeners to ``engine``, which was made here or by the user, that the promises need; once.

    An engine with other execution options has the listeners of the engine that it was made from.
    """
    if engine in _prepared:
        return
    _prepared.add(engine)
    guard_connections(engine)
    backend_for(engine.dialect.name).prepare(engine, made_here=made_here)


def make_engine(url: str | URL, options: Mapping[str, Any], owner: object, *, is_async: bool) -> Any:
    """Make an `Engine`, or an `AsyncEngine` if ``is_async``.

    Args:
        url: the database.
        options: of ``create_engine()``.
        owner: a database in memory exists as long as this object.
        is_async: the kind of the engine.

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
    if "@" in (parsed.host or ""):
        raise ConfigurationError(
            f"The password in the URL of {url_for_message(parsed)} contains an @, which also ends it. Quote the "
            "password with urllib.parse.quote_plus(), or pass sqlalchemy.URL.create(...)."
        )
    _check_numbers(options)
    try:
        connects_to = backend_for(parsed.get_backend_name()).connect_url(parsed, owner)
        engine = _creator(is_async)(connects_to, **_pool_options(connects_to, options, is_async=is_async))
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"The driver of {url_for_message(parsed)} is not installed: pip install {_distribution_of(error.name)}."
        ) from error
    except NoSuchModuleError as error:
        raise ConfigurationError(f"SQLAlchemy has no dialect for {url_for_message(parsed)}: {error}.") from error
    except InvalidRequestError as error:
        raise _needs_async_driver(parsed) from error
    except (TypeError, ValueError, LookupError, ArgumentError) as error:
        names = ", ".join(sorted(options)) or "none"
        raise ConfigurationError(
            f"create_engine() rejected {url_for_message(parsed)} or one of these options: {names}. Options that the "
            f"session class does not have go to create_engine(). Correct the URL, or the option: {error}"
        ) from error
    if not is_async and engine.dialect.is_async:
        raise ConfigurationError(
            f"{url_for_message(parsed)} has an async driver, and this is a sync database. Use AsyncDatabase or "
            "AsyncSessionPlugin, or write the URL with a sync driver."
        )
    return engine


def _pool_options(url: URL, options: Mapping[str, Any], *, is_async: bool) -> Mapping[str, Any]:
    """Return ``options`` with a pool that serves in order, unless the user or a plugin of SQLAlchemy chooses one."""
    if options.get("poolclass") or options.get("pool") or options.get("plugins") or "plugin" in url.query:
        return options
    return {**options, "poolclass": fair_pool_class(url, is_async=is_async)}


def _check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse strings here: SQLAlchemy compares these options with a number when it first needs them."""
    for name in ("pool_size", "max_overflow", "pool_timeout", "pool_recycle"):
        if isinstance(options.get(name), str):
            raise ConfigurationError(f"{name} must be a number, and is a string. Convert it: int(...).")


def require_greenlet() -> None:
    """Check for greenlet before `sqlalchemy.ext.asyncio` is imported, whose own error does not mention our extra.

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


DISTRIBUTIONS = {
    "MySQLdb": "mysqlclient",
    "cx_Oracle": "oracledb",
    "mysql": "mysql-connector-python",
    "psycopg": '"psycopg[binary]"',
    "psycopg2": "psycopg2-binary",
    "sqlcipher3": "sqlcipher3-binary",
    "pysqlcipher3": "sqlcipher3-binary",
}
"""What to install for a driver whose module has another name."""


def _distribution_of(module: str | None) -> str:
    top_level = (module or "").partition(".")[0]
    return DISTRIBUTIONS.get(top_level, top_level)


def _needs_async_driver(url: URL) -> ConfigurationError:
    backend = url.get_backend_name()
    driver = backend_for(backend).async_driver or "<an async driver>"
    return ConfigurationError(
        f"{url.drivername} is a sync driver, and this is an async database. Write {backend}+{driver}://... or use "
        "Database or SessionPlugin."
    )


def connection_limit(engine: Engine, options: Mapping[str, Any] | None) -> tuple[int, float] | None:
    """Return how many connections the pool hands out at once, and for how many seconds one waits; None without limit.

    Args:
        engine: whose pool.
        options: with which it was created, or None if the user made it: then its overflow, which no
            public attribute shows, counts as 0.
    """
    pool = engine.pool
    if not isinstance(pool, QueuePool) or pool.size() == 0:
        return None
    overflow: int = 0 if options is None else options.get("max_overflow", 10)
    return None if overflow < 0 else (pool.size() + overflow, pool.timeout())
