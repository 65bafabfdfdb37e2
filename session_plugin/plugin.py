"""What the frameworks' plugins share: one object, declared once, that serves each app its database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from .access import Access
from .configuration import Configuration, is_late
from .current import entered_databases
from .database import BaseDatabase
from .exceptions import ConfigurationError, NoScopeError
from .typevars import S


class Plugin(Access[S]):
    """Declared at import time; each app that it is initialised with gets a `Database` of its own.

    A plugin made from a `Database` shares that one among its apps and with whoever made it.
    """

    database_class: type[BaseDatabase[Any]]

    def _set_up(self, configuration: Configuration) -> None:
        self.configuration: Configuration = configuration
        self._databases: WeakKeyDictionary[Any, AppDatabase] = WeakKeyDictionary()
        self._apps_served = 0
        self._the_only_app: Callable[[], Any] = _unknown
        self._the_only: Callable[[], AppDatabase | None] = _unknown

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
        self._apps_served += 1
        is_only = self._apps_served == 1
        self._the_only_app, self._the_only = (ref(app), ref(database)) if is_only else (_unknown, _unknown)
        return database

    def database_for(self, app: Any) -> Any:
        """The database of ``app``.

        Raises:
            ConfigurationError: ``init_app()`` was not called with it.
        """
        database = self._the_only() if self._the_only_app() is app else self._databases.get(app)
        if database is None:
            raise ConfigurationError(f"This plugin was not initialised with {app!r}: call db.init_app(app).")
        return database.database

    def _the_database(self) -> Any:
        if (only := self._the_only()) is not None:
            return only.database
        if not self._apps_served:
            raise NoScopeError("No app is known here, so there is no database: call db.init_app(app) first.")
        databases = {each.database for each in self._databases.values()}
        for entered in entered_databases():
            if entered in databases:
                return entered
        raise NoScopeError(
            f"This plugin was initialised with {self._apps_served} apps, and which one is meant cannot be told here: "
            "say db.database_for(app).session_scope(), or in Flask enter app.app_context()."
        )


def _unknown() -> None:
    """The only app, where there is none or more than one."""


class AppDatabase:
    """Answers for the database of one app: made at once or, if a function names its source, when needed."""

    def __init__(self, configuration: Configuration, database_class: Callable[..., Any]) -> None:
        self._configuration = configuration
        self._database_class = database_class
        self._database: BaseDatabase[Any] | None = None
        self._making = threading.Lock()

    @property
    def database(self) -> BaseDatabase[Any]:
        """The database.

        Raises:
            ConfigurationError: it cannot be configured.
        """
        if self._database is None:
            with self._making:
                self._database = self._database or self._make()
        return self._database

    def _make(self) -> BaseDatabase[Any]:
        given = self._configuration
        source: Any = given.source
        if is_late(source):
            source = source()
        if not isinstance(source, BaseDatabase):
            made: BaseDatabase[Any] = self._database_class(
                source,
                class_=given.class_,
                policy=given.policy,
                metadata=given.metadata,
                binds=given.binds,
                **given.options,
            )
            return made
        if given.names_more_than_a_source() or not isinstance(source, self._database_class):  # type: ignore[arg-type]
            raise ConfigurationError(
                f"The {type(source).__name__} made elsewhere does not fit here: it must be a "
                f"{self._database_class.__name__}, and whatever else is said of it belongs to its own construction."
            )
        return source
