"""`Plugin`: what the plugins of the frameworks share; declared once, it serves each app its database."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

from sqlalchemy import MetaData

from .database.configuration import Configuration, is_late
from .database.interface import DatabaseInterface, core_of
from .database.late_source import UNCHANGED, LateSource
from .exceptions import ConfigurationError, NoScopeError
from .policy import Policy, PolicyAbove, endpoint_policy, policies_above, wrapped_functions
from .scope.current import entered_databases
from .scope.typevars import S


class Plugin(DatabaseInterface[S]):
    """Declared at import time; each app that it is initialised with gets a `Database` of its own.

    A plugin made from a `Database` shares that one among its apps and with whoever made it.
    """

    _database_class: type[DatabaseInterface[Any]]

    def _set_up(self, configuration: Configuration) -> None:
        self._configuration: Configuration = configuration
        self._databases: WeakKeyDictionary[Any, AppDatabase] = WeakKeyDictionary()
        self._number_of_apps = 0
        self._is_endpoint: WeakKeyDictionary[PolicyAbove, bool] = WeakKeyDictionary()
        self._only_app: Callable[[], Any] = _none
        self._only_database: Callable[[], AppDatabase | None] = _none

    def _register(self, app: Any, configuration: Configuration, settings: AppSettings | None = None) -> AppDatabase:
        """Give ``app`` a database.

        Args:
            app: the app.
            configuration: of its database.
            settings: what the app's own settings say of it, if they may change later.

        Raises:
            ConfigurationError: it has one already, or the configuration cannot work.
        """
        if app in self._databases:
            raise ConfigurationError(f"init_app() was called twice with {app!r}. Call it once.")
        database = AppDatabase(configuration, self._database_class, settings)
        if not is_late(configuration.source):
            database.database  # noqa: B018  a configuration that cannot work raises now
        self._databases[app] = database
        self._number_of_apps += 1
        is_only = self._number_of_apps == 1
        self._only_app, self._only_database = (ref(app), ref(database)) if is_only else (_none, _none)
        return database

    @property
    def metadata(self) -> MetaData:
        """The `MetaData` given at construction, before any app is known too.

        Raises:
            ConfigurationError: none was given.
        """
        given = self._configuration.metadata
        return given if given is not None else super().metadata

    def _endpoints(self, app: Any) -> Iterable[Any]:
        """Return the endpoints of ``app``, as far as its adapter finds the policy of an endpoint."""
        return ()

    def _endpoint_policy(self, endpoint: object) -> Policy | None:
        """Return the policy that ``@db.policy(...)`` set on ``endpoint``, below the decorator of its route or above."""
        policy = endpoint_policy(endpoint, self)
        if policy is None:
            for above in policies_above(endpoint, self):
                if not self._decorates_an_endpoint(above):
                    return above.policy
        return policy

    def _decorates_an_endpoint(self, above: PolicyAbove) -> bool:
        """Return True if a route has registered the decorated function: the one inside has its own routes then."""
        if above not in self._is_endpoint:
            decorated = above.decorated()
            self._is_endpoint[above] = decorated is not None and any(
                each is decorated
                for app in self._databases
                for endpoint in self._endpoints(app)
                for each in wrapped_functions(endpoint)
            )
        return self._is_endpoint[above]

    def database_for(self, app: Any) -> Any:
        """Return the database of ``app``.

        Raises:
            ConfigurationError: ``init_app()`` was not called with it.
        """
        database = self._only_database() if self._only_app() is app else self._databases.get(app)
        if database is None:
            raise ConfigurationError(f"This plugin was not initialised with {app!r}: call db.init_app(app).")
        return database.database

    def _current_database(self) -> Any:
        """Return the database of the only app, or of the app whose unit of work the running code is inside."""
        if (only := self._only_database()) is not None:
            return only.database
        if not self._number_of_apps:
            raise NoScopeError("This plugin has no app yet, and so no database: call db.init_app(app) first.")
        databases = {each.database._core: each.database for each in self._databases.values()}
        for core in entered_databases():
            if core in databases:
                return databases[core]
        raise NoScopeError(
            f"This plugin was initialised with {self._number_of_apps} apps, and which of them is meant is not clear "
            "here. Write db.database_for(app).session_scope(), or in Flask enter app.app_context()."
        )


def _none() -> None:
    """Stands for the reference to the only app, where there is no app or more than one."""


class AppSettings(Protocol):
    """What the settings of an app say of its database."""

    def changed(self) -> Configuration | None:
        """Return the configuration with the settings of now, or None if these are the same as before."""

    def completed(self, source: Any) -> Any:
        """Return the source that a function has returned, completed by the settings."""


class AppDatabase:
    """The database of one app: made at once or, if a function returns its source, when it is needed.

    If what names it changes later, it is configured anew; a shared `Database` is replaced.
    """

    def __init__(
        self,
        configuration: Configuration,
        database_class: type[DatabaseInterface[Any]],
        settings: AppSettings | None = None,
    ) -> None:
        self._database_class = database_class
        self._settings = settings
        self._database: Any = None
        self._follows: bool = False
        self._has_changed: bool = False
        self._making = threading.Lock()
        self._set_configuration(configuration)

    def _set_configuration(self, configuration: Configuration) -> None:
        self._configuration = configuration
        source: Any = configuration.source
        self._late_source = LateSource(source) if is_late(source) else None

    @property
    def is_late(self) -> bool:
        """True as long as the function that returns the source has not been called."""
        return self._database is None and self._late_source is not None

    @property
    def database(self) -> Any:
        """The `Database` or `AsyncDatabase`.

        Raises:
            ConfigurationError: it cannot be configured.
        """
        if self._database is None or self._follows:
            with self._making:
                if self._follows:
                    self._has_changed = self._has_changed or self._find_change(False) is not None
                if self._has_changed:
                    core_of(self._database).check_may_change()
                    self._database, self._has_changed, self._follows = None, False, False
                self._database = self._database or self._make()
        return self._database

    def _source(self) -> Any:
        late = self._late_source
        return self._configuration.source if late is None else self._completed(late.name())

    def _completed(self, source: Any) -> Any:
        return source if self._settings is None else self._settings.completed(source)

    def _find_change(self, may_take_its_time: bool) -> Configuration | None:
        """Return the configuration of now if what names the database has changed, else None."""
        changed = None if self._settings is None else self._settings.changed()
        if changed is not None:
            self._set_configuration(changed)
            return replace(changed, source=self._source())
        source = UNCHANGED if self._late_source is None else self._late_source.named_anew(may_take_its_time)
        return None if source is UNCHANGED else replace(self._configuration, source=self._completed(source))

    def _make(self) -> Any:
        given = self._configuration
        source = self._source()
        may_change = self._settings is not None or self._late_source is not None
        self._follows = False
        if not isinstance(source, DatabaseInterface):
            database_class: Any = self._database_class
            database = database_class(
                source,
                class_=given.class_,
                policy=given.policy,
                metadata=given.metadata,
                binds=given.binds,
                **given.options,
            )
            if may_change:
                core_of(database).watch(self._find_change)
            return database
        if not isinstance(source, self._database_class):
            raise ConfigurationError(
                f"This plugin needs a database of class {self._database_class.__name__}, and was given one of class "
                f"{type(source).__name__}. Give it a database of its own kind, or use the other plugin."
            )
        if given.names_more_than_a_source():
            raise ConfigurationError(
                f"This plugin was given an existing database of class {type(source).__name__} together with further "
                "options, which cannot be applied to it. Give the options where you construct the database."
            )
        self._follows = may_change
        return source
