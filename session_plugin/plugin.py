"""What the frameworks' plugins share: one object, declared once, that serves each app its database."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .access import Access
from .configuration import Configuration
from .current import entered_databases
from .database import BaseDatabase
from .exceptions import ConfigurationError, NoScopeError
from .typevars import S

if TYPE_CHECKING:
    pass


class Plugin(Access[S]):
    """Declared at import time; each app that it is initialised with gets a `Database` of its own.

    A plugin made from a `Database` shares that one among its apps and with whoever made it.
    """

    database_class: type[BaseDatabase[Any]]

    def _set_up(self, configuration: Configuration) -> None:
        self.configuration: Configuration = configuration
        self._databases: WeakKeyDictionary[Any, AppDatabase] = WeakKeyDictionary()

    def register(self, app: Any, configuration: Configuration) -> AppDatabase:
        """Note that ``app`` uses ``configuration``.

        Raises:
            ConfigurationError: it was noted before, or cannot work.
        """
        if app in self._databases:
            raise ConfigurationError(f"init_app() was called twice with {app!r}; once is enough.")
        database = AppDatabase(configuration, self.database_class)
        if not is_late(configuration.source):
            database.database  # noqa: B018  what cannot work is told now
        self._databases[app] = database
        return database

    def database_for(self, app: Any) -> Any:
        """The database of ``app``.

        Raises:
            ConfigurationError: ``init_app()`` was not called with it.
        """
        database = self._databases.get(app)
        if database is None:
            raise ConfigurationError(f"{app!r} is not known here: call db.init_app(app) first.")
        return database.database

    def _the_database(self) -> Any:
        known = list(self._databases.values())
        if len(known) == 1:
            return known[0].database
        if not known:
            raise NoScopeError("No app is known here, so there is no database: call db.init_app(app) first.")
        databases = [each.database for each in known]
        for entered in entered_databases():
            if entered in databases:
                return entered
        raise NoScopeError(
            f"This plugin serves {len(known)} apps, and which one is meant cannot be told here: say "
            "db.database_for(app).session_scope()."
        )


class AppDatabase:
    """Answers for the database of one app: made at once or, if a function names its source, when needed."""

    def __init__(self, configuration: Configuration, database_class: Callable[..., Any]) -> None:
        self._configuration = configuration
        self._database_class = database_class

    @cached_property
    def database(self) -> Any:
        """The database.

        Raises:
            ConfigurationError: it cannot be configured.
        """
        given = self._configuration
        source: Any = given.source
        if is_late(source):
            source = source()
        if not isinstance(source, BaseDatabase):
            return self._database_class(
                source,
                class_=given.class_,
                policy=given.policy,
                metadata=given.metadata,
                binds=given.binds,
                **given.options,
            )
        if given.options or not isinstance(source, self._database_class):  # type: ignore[arg-type]
            raise ConfigurationError(
                f"A {type(source).__name__} made elsewhere does not fit here: it must be a "
                f"{self._database_class.__name__}, and options ({', '.join(given.options) or 'none'}) belong to its "
                "own construction."
            )
        return source


def is_late(source: Any) -> bool:
    """True for a function that will name the source; a session factory, which is callable too, is none."""
    return callable(source) and not hasattr(source, "class_")
