"""The Flask extension object."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
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

from ..configuration import Configuration
from ..current import find_scope
from ..database import Database
from ..exceptions import ConfigurationError
from ..plugin import Plugin
from ..policy import Outcome, Policy, as_policy, manual
from ..scope import SessionScope
from ..sync_access import SyncAccess
from ..typevars import SyncS
from ..wsgi import SessionScopeMiddleware
from ._configuration import configured
from ._settle import SettlingMiddleware

if TYPE_CHECKING:
    from contextlib import _GeneratorContextManager

    from ..configuration import PolicyLike, Source

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

EXTENSION = "session_plugin"
READING = "GET"
"""The method that an app context counts as: a shell that waits at its prompt must not lock SQLite's writers out."""

logger = logging.getLogger("session_plugin")


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
            ConfigurationError: the database cannot be configured, or it is too late or too often.
        """
        if not isinstance(app, Flask):
            raise ConfigurationError(
                f"init_app() takes the Flask app itself, and {app!r} is none. Give what Flask() made."
            )
        if app._got_first_request:
            raise ConfigurationError("init_app() came after the first request. Call it where the app is made.")
        access = self.register(app, configured(app, self.configuration.updated(source, options)))
        plugins: list[SessionPlugin[Any]] = app.extensions.setdefault(EXTENSION, [])
        if not plugins:
            app.wsgi_app = SettlingMiddleware(app, plugins)  # type: ignore[method-assign]
        plugins.append(self)
        app.wsgi_app = SessionScopeMiddleware(app.wsgi_app, access, find_policy=self._find_policy)  # type: ignore[method-assign]

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
            raise self._no_scope()
        return scope or self._app_context_scope()

    def policy(self, policy: PolicyLike) -> Callable[[F], F]:
        """As `Access.policy`; also for a whole blueprint.

        ::

            reports = db.policy(read_only)(Blueprint("reports", __name__))
        """
        decorate: Callable[[F], F] = super().policy(policy)

        def mark_or_decorate(endpoint: F) -> F:
            place: Any = endpoint
            if not isinstance(place, Blueprint):
                return decorate(endpoint)
            self.mark(place, as_policy(policy))
            return endpoint

        return mark_or_decorate

    def _find_policy(self) -> Policy | None:
        """What `policy` says of the view, its method, its class or its blueprint, the nearest first."""
        if not self.has_marks or not has_request_context():
            return None
        app, served = current_app._get_current_object(), request._get_current_object()  # type: ignore[attr-defined]
        view = app.view_functions.get(served.endpoint or "")
        view_class = getattr(view, "view_class", None)
        blueprints = (app.blueprints.get(name) for name in served.blueprints)
        places = (getattr(view_class, served.method.lower(), None), view, view_class, *blueprints)
        return next((policy for place in places if (policy := self.marked_policy(place)) is not None), None)

    def request_begins(self) -> None:
        """Let go of what the app context around a request holds, which would lock the request out on SQLite.

        What that context has loaded is read anew after the request.
        """
        scope = self._used_in_app_context()
        if scope is None:
            return
        if scope.wrote:
            logger.warning(
                "The app context around this request has unsaved work, which the request does not see and may have to "
                "wait for. Call db.session.commit() first."
            )
        elif not scope.hooks.waiting:
            scope.settle(Outcome())
            scope.session.expire_all()

    def session_scope(self, *, new: bool = False) -> _GeneratorContextManager[SyncS, None, None]:
        """As `SyncAccess.session_scope`; on SQLite, what the app context has only read does not lock it out."""
        scope = self._used_in_app_context()
        if scope is not None and not (scope.wrote or scope.hooks.waiting or scope.work.streams):
            scope.settle(Outcome())
        return super().session_scope(new=new)

    def _used_in_app_context(self) -> SessionScope[SyncS] | None:
        if not self._app_context_scopes or not has_app_context():
            return None
        scope = self._app_context_scopes.get(app_ctx._get_current_object())  # type: ignore[attr-defined]
        return scope if scope is not None and scope.active else None

    def _app_context_scope(self) -> SessionScope[SyncS]:
        context = app_ctx._get_current_object()  # type: ignore[attr-defined]
        scope = self._app_context_scopes.get(context)
        if scope is None:
            scope = SessionScope(self.database, origin="app context", method=READING, find_policy=lambda: manual)
            self._app_context_scopes[context] = scope
            app = current_app._get_current_object()  # type: ignore[attr-defined]
            appcontext_tearing_down.connect(self._app_context_ends, app)  # it comes after every teardown function
        return scope

    def _app_context_ends(self, app: Flask, exc: BaseException | None = None) -> None:
        scope = self._app_context_scopes.pop(app_ctx._get_current_object(), None)  # type: ignore[attr-defined]
        if scope is not None:
            try:
                scope.settle(Outcome(error=exc))
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
