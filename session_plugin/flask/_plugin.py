"""The Flask extension object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from flask import Flask, abort, current_app, has_app_context, has_request_context, request
from flask.globals import app_ctx
from sqlalchemy import Executable, make_url
from sqlalchemy.exc import ArgumentError, MultipleResultsFound, NoResultFound
from sqlalchemy.orm import Session

from .._sync import SyncAccess
from ..access import DEFAULT, Configuration, endpoint_policy
from ..database import Database
from ..exceptions import NoScopeError
from ..plugin import Plugin
from ..policy import Outcome, Policy, manual
from ..scope import SessionScope, find_scope
from ..wsgi import SessionScopeMiddleware
from ._settle import SettlingMiddleware

if TYPE_CHECKING:
    from ..access import Source

SyncS = TypeVar("SyncS", bound=Session)
T = TypeVar("T")

EXTENSION = "session_plugin"


class SessionPlugin(Plugin[SyncS], SyncAccess[SyncS]):
    """One session per request, committed before the response leaves.

    ::

        db = SessionPlugin("sqlite:///shop.db")
        app = Flask(__name__)
        db.init_app(app)

    In the app's configuration, which wins over the constructor: ``SQLALCHEMY_DATABASE_URI``,
    ``SQLALCHEMY_ENGINES`` and ``SQLALCHEMY_BINDS`` (engines by name), and
    ``SQLALCHEMY_ENGINE_OPTIONS``.  A relative SQLite path lies in ``app.instance_path``.
    """

    database_class: type[Database[Any]] = Database

    def _set_up(self, configuration: Configuration) -> None:
        super()._set_up(configuration)
        self._app_context_scopes: WeakKeyDictionary[Any, SessionScope[SyncS]] = WeakKeyDictionary()

    def init_app(self, app: Flask, source: Source | None = None, **options: Any) -> None:
        """Give every request of ``app`` a unit of work.

        Args:
            app: a Flask app, before its first request; one plugin serves any number of them.
            source: as at construction, and wins over what was said there; the app's
                configuration wins over both.
            **options: added to those of the construction, and win over them.

        Raises:
            ConfigurationError: the database cannot be configured, or this is the second call.
        """
        configuration = _configured(app, self.configuration.updated(source, options))
        access = self.register(app, configuration)
        app.extensions.setdefault(EXTENSION, []).append(self)
        app.wsgi_app = SessionScopeMiddleware(  # type: ignore[method-assign]
            SettlingMiddleware(app, access), access, find_policy=_find_policy
        )
        app.teardown_appcontext(self._close_app_context_scope)

    @property
    def database(self) -> Database[SyncS]:
        """The database of the current app, or of the only one."""
        if has_app_context():
            database: Database[SyncS] = self.database_for(current_app._get_current_object())  # type: ignore[attr-defined]
            return database
        the_only: Database[SyncS] = self._the_database()
        return the_only

    @property
    def scope(self) -> SessionScope[SyncS]:
        """The unit of work of the request or ``session_scope()``, else what the app context has.

        An app context without a request is no unit of work: its session commits nothing by
        itself, and a ``session_scope()`` in it does not join it.

        Raises:
            NoScopeError: there is neither.
        """
        scope = find_scope(self.database)
        if scope is None and not has_app_context():
            raise NoScopeError(self._no_scope_message)
        return scope or self._app_context_scope()

    def _app_context_scope(self) -> SessionScope[SyncS]:
        context = app_ctx._get_current_object()  # type: ignore[attr-defined]
        scope = self._app_context_scopes.get(context)
        if scope is None:
            scope = SessionScope(self.database, origin="app context", find_policy=lambda: manual)
            self._app_context_scopes[context] = scope
        return scope

    def _close_app_context_scope(self, error: BaseException | None) -> None:
        scope = self._app_context_scopes.pop(app_ctx._get_current_object(), None)  # type: ignore[attr-defined]
        if scope is not None:
            try:
                scope.settle(Outcome(error=error))
            finally:
                scope.close()

    def get_or_404(self, entity: type[T], ident: Any, *, description: str | None = None, **options: Any) -> T:
        """``session.get(entity, ident, **options)``, or ``abort(404, description)`` if there is none."""
        found = self.session.get(entity, ident, **options)
        if found is None:
            abort(404, description=description)
        return found

    def one_or_404(self, statement: Executable, *, description: str | None = None) -> Any:
        """The one result of ``statement``, or ``abort(404, description)`` if there is none or more than one."""
        try:
            return self.session.execute(statement).scalar_one()
        except (NoResultFound, MultipleResultsFound):
            abort(404, description=description)


def _find_policy() -> Policy | None:
    if not has_request_context() or request.endpoint is None:
        return None
    return endpoint_policy(current_app.view_functions.get(request.endpoint))


def _configured(app: Flask, configuration: Configuration) -> Configuration:
    """``configuration`` with what the app's own says, which wins: tests must never reach production."""
    engines: dict[str, Any] = {}
    for key in ("SQLALCHEMY_BINDS", "SQLALCHEMY_ENGINES"):
        engines.update({name or DEFAULT: given for name, given in app.config.get(key, {}).items()})
    if (uri := app.config.get("SQLALCHEMY_DATABASE_URI")) is not None:
        engines[DEFAULT] = uri
    if engines and isinstance(configuration.source, dict):
        engines = {**configuration.source, **engines}
    source = engines or configuration.source
    if not isinstance(source, dict):
        source = _in_instance_path(app, source)
    else:
        source = {name: _in_instance_path(app, given) for name, given in source.items()}
    return configuration.updated(source, app.config.get("SQLALCHEMY_ENGINE_OPTIONS", {}))


def _in_instance_path(app: Flask, given: Any) -> Any:
    """``given``, but a relative SQLite path lies in the app's instance folder."""
    if isinstance(given, dict):
        return {**given, "url": _in_instance_path(app, given.get("url"))}
    if not isinstance(given, str):
        return given
    try:
        url = make_url(given)
    except ArgumentError:
        return given
    path = url.database
    if url.get_backend_name() != "sqlite" or path in (None, "", ":memory:") or path.startswith("file:"):
        return given
    Path(app.instance_path).mkdir(parents=True, exist_ok=True)
    return url.set(database=str(Path(app.instance_path) / path))
