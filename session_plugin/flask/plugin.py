"""`SessionPlugin`, the Flask extension."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Unpack
from weakref import WeakKeyDictionary

from flask import (
    Blueprint,
    Flask,
    abort,
    appcontext_tearing_down,
    current_app,
    has_app_context,
    has_request_context,
    request,
)
from flask.globals import app_ctx
from sqlalchemy import Executable
from sqlalchemy.exc import MultipleResultsFound, NoResultFound

from ..database.configuration import Configuration
from ..database.interface import DatabaseInterface, core_of
from ..database.sync_database import Database
from ..database.sync_interface import SyncInterface
from ..exceptions import ConfigurationError
from ..plugin import Plugin
from ..policy import Outcome, Policy, PolicyLike, any_endpoint_policy, as_policy, manual, set_endpoint_policy
from ..scope.current import find
from ..scope.ending import close, settle
from ..scope.opening import open_unit_of_work
from ..scope.session import read_anew
from ..scope.typevars import SyncS
from ..scope.unit_of_work import UnitOfWork
from ..wsgi.middleware import SessionScopeMiddleware
from .configuration import FlaskSettings
from .settling import SettlingMiddleware

if TYPE_CHECKING:
    from contextlib import _GeneratorContextManager

    from ..database.configuration import Source
    from ..database.options import Options

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

EXTENSION = "session_plugin"
SQLALCHEMY = "sqlalchemy"
"""The key of Flask-SQLAlchemy's own extension, which refuses an app that has it."""
APP_CONTEXT_METHOD = "GET"
"""An app context counts as a request that reads: an idle shell must not lock out SQLite's writers."""

logger: logging.Logger = logging.getLogger("session_plugin")


class SessionPlugin(Plugin[SyncS], SyncInterface[SyncS]):
    """One session per request, committed before the response leaves.

    ::

        db = SessionPlugin("sqlite:///shop.db")
        app = Flask(__name__)
        db.init_app(app)

    In the app's configuration, which wins over the constructor: ``SQLALCHEMY_DATABASE_URI``,
    ``SQLALCHEMY_ENGINES`` and ``SQLALCHEMY_BINDS`` (engines by name), and
    ``SQLALCHEMY_ENGINE_OPTIONS``.  A relative SQLite path lies in ``app.instance_path``.
    """

    _database_class: type[DatabaseInterface[Any]] = Database

    if TYPE_CHECKING:

        def database_for(self, app: Flask) -> Database[SyncS]:
            """Return the database of ``app``."""

    def _set_up(self, configuration: Configuration) -> None:
        super()._set_up(configuration)
        self._app_context_units: WeakKeyDictionary[Any, UnitOfWork[SyncS]] = WeakKeyDictionary()

    def init_app(
        self,
        app: Flask,
        source: Source | None = None,
        *,
        register_as_sqlalchemy: bool = False,
        **options: Unpack[Options],
    ) -> None:
        """Give every request of ``app`` a unit of work.

        Args:
            app: a Flask app, before its first request; one plugin serves any number of them.
            source: as at construction, and replaces what was given there; the app's
                configuration wins over both.
            register_as_sqlalchemy: True to be ``app.extensions["sqlalchemy"]`` too, where extensions made for
                Flask-SQLAlchemy look for it.
            **options: added to those of the construction, and win over them.

        Raises:
            ConfigurationError: the database cannot be configured, or it is too late or too often.
        """
        if not isinstance(app, Flask):
            raise ConfigurationError(
                f"init_app() takes a Flask app, and {app!r} is not one. Give it what Flask(__name__) returned."
            )
        if app._got_first_request:
            raise ConfigurationError("init_app() was called after the first request. Call it where you create the app.")
        if register_as_sqlalchemy and (other := app.extensions.get(SQLALCHEMY)) is not None:
            raise ConfigurationError(
                f'app.extensions["sqlalchemy"] is set already, by an object of type {type(other).__name__}. Leave out '
                "register_as_sqlalchemy, or initialise the app without the other one."
            )
        settings = FlaskSettings(app, self._configuration.updated(source, options))
        db = self._register(app, settings.configured(), settings)
        if register_as_sqlalchemy:
            app.extensions[SQLALCHEMY] = self
        plugins: list[SessionPlugin[Any]] = app.extensions.setdefault(EXTENSION, [])
        if not plugins:
            app.wsgi_app = SettlingMiddleware(app, partial(_release_app_contexts, plugins))  # type: ignore[method-assign]
        plugins.append(self)
        app.wsgi_app = SessionScopeMiddleware(app.wsgi_app, db, find_policy=self._find_policy)  # type: ignore[method-assign]

    @property
    def database(self) -> Database[SyncS]:
        """The database of the current app, or of the only one."""
        if has_app_context():
            database: Database[SyncS] = self.database_for(current_app._get_current_object())  # type: ignore[attr-defined]
            return database
        the_only: Database[SyncS] = self._current_database()
        return the_only

    def _unit_of_work(self) -> UnitOfWork[SyncS]:
        """Return the unit of work of the request or ``session_scope()``, else that of the app context.

        An app context without a request does not commit by itself, and a ``session_scope()`` in it does not
        join it.

        Raises:
            NoScopeError: there is neither.
        """
        unit = find(core_of(self))
        if unit is None and not has_app_context():
            raise self._no_scope()
        return unit or self._app_context_unit()

    def _find_unit_of_work(self) -> UnitOfWork[SyncS] | None:
        """Return the unit of work of the request, ``session_scope()`` or app context, or None; none is opened."""
        unit = find(core_of(self))
        if unit is None and has_app_context():
            unit = self._app_context_units.get(app_ctx._get_current_object())  # type: ignore[attr-defined]
        return unit

    def policy(self, policy: PolicyLike) -> Callable[[F], F]:
        """As `Database.policy`; also for a whole blueprint.

        ::

            reports = db.policy(read_only)(Blueprint("reports", __name__))
        """
        decorate: Callable[[F], F] = super().policy(policy)

        def decorate_or_mark(endpoint: F) -> F:
            if not isinstance(endpoint, Blueprint):
                return decorate(endpoint)
            set_endpoint_policy(endpoint, self, as_policy(policy))
            return endpoint

        return decorate_or_mark

    def _find_policy(self) -> Policy | None:
        """Return what `policy` has set on the view, its method, its class or its blueprint, the nearest first."""
        if not any_endpoint_policy() or not has_request_context():
            return None
        app, served = current_app._get_current_object(), request._get_current_object()  # type: ignore[attr-defined]
        view = app.view_functions.get(served.endpoint or "")
        view_class = getattr(view, "view_class", None)
        blueprints = (app.blueprints.get(name) for name in served.blueprints)
        places = (getattr(view_class, served.method.lower(), None), view, view_class, *blueprints)
        return next((policy for place in places if (policy := self._endpoint_policy(place)) is not None), None)

    def _endpoints(self, app: Flask) -> Iterable[Any]:
        return app.view_functions.values()

    def _release_app_context(self) -> None:
        """End what the app context around a request has read, which would lock the request out on SQLite.

        What that context has loaded is read anew after the request, except primary keys.
        """
        unit = self._used_in_app_context()
        if unit is None:
            return
        if unit.wrote:
            logger.warning(
                "The app context around this request has unsaved work, which the request does not see and may have to "
                "wait for. Call db.session.commit() first."
            )
        elif not unit.hooks.waiting:
            settle(unit, Outcome())
            read_anew(unit.session)

    def session_scope(
        self, *, new: bool = False, name: str | None = None, policy: PolicyLike | None = None
    ) -> _GeneratorContextManager[SyncS, None, None]:
        """As `Database.session_scope`; on SQLite, an app context that has only read does not lock it out."""
        self._end_reading()
        return super().session_scope(new=new, name=name, policy=policy)

    def create_all(self) -> None:
        """As `Database.create_all`; an app context that has only read does not lock it out."""
        self._end_reading()
        super().create_all()

    def drop_all(self) -> None:
        """As `Database.drop_all`; an app context that has only read does not lock it out."""
        self._end_reading()
        super().drop_all()

    def _end_reading(self) -> None:
        unit = self._used_in_app_context()
        if unit is not None and not (unit.wrote or unit.hooks.waiting or unit.transaction.open_results):
            settle(unit, Outcome())

    def _used_in_app_context(self) -> UnitOfWork[SyncS] | None:
        if not self._app_context_units or not has_app_context():
            return None
        unit = self._app_context_units.get(app_ctx._get_current_object())  # type: ignore[attr-defined]
        return unit if unit is not None and unit.active else None

    def _app_context_unit(self) -> UnitOfWork[SyncS]:
        context = app_ctx._get_current_object()  # type: ignore[attr-defined]
        unit = self._app_context_units.get(context)
        if unit is None:
            core = core_of(self)
            unit = open_unit_of_work(core, origin="app context", method=APP_CONTEXT_METHOD, find_policy=lambda: manual)
            self._app_context_units[context] = unit
            app = current_app._get_current_object()  # type: ignore[attr-defined]
            appcontext_tearing_down.connect(self._app_context_ends, app)  # it comes after every teardown function
        return unit

    def _app_context_ends(self, app: Flask, exc: BaseException | None = None) -> None:
        unit = self._app_context_units.pop(app_ctx._get_current_object(), None)  # type: ignore[attr-defined]
        if unit is not None:
            try:
                settle(unit, Outcome(error=exc))
            finally:
                close(unit)

    def get_or_404(self, entity: type[T], ident: Any, *, description: str | None = None, **options: Any) -> T:
        """Return ``session.get(entity, ident, **options)``, or ``abort(404, description)`` if no row has that key."""
        found = self.session.get(entity, ident, **options)
        if found is None:
            abort(404, description=description)
        return found

    def one_or_404(self, statement: Executable, *, description: str | None = None) -> Any:
        """Return the one result of ``statement``, or ``abort(404, description)`` if it has not exactly one."""
        try:
            return self.session.execute(statement).scalar_one()
        except (NoResultFound, MultipleResultsFound):
            abort(404, description=description)


def _release_app_contexts(plugins: Iterable[SessionPlugin[Any]]) -> None:
    for plugin in plugins:
        plugin._release_app_context()
