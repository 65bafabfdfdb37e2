"""`SessionScopeMiddleware` for WSGI, which may be applied more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import ref

from ..database.async_interface import AsyncInterface
from ..database.core import DatabaseCore, HasDatabase
from ..database.interface import core_of
from ..database.middleware import check_middleware
from ..exceptions import ConfigurationError
from ..policy import Policy
from ..scope.current import find, innermost
from ..scope.opening import open_unit_of_work
from ..scope.unit_of_work import UnitOfWork
from .response import MountedResponse, Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

KEY = "session_plugin.scopes"


class SessionScopeMiddleware:
    """Gives every request a unit of work on ``database``; of several middlewares the outermost does.

    If the app is mounted in an ASGI app with the same database, the request has one already.
    """

    def __init__(
        self,
        app: WSGIApplication,
        database: HasDatabase,
        *,
        find_policy: Callable[[], Policy | None] | None = None,
    ) -> None:
        """Wrap ``app``.

        Args:
            app: any WSGI app.
            database: a `Database`, or a plugin for sync sessions.
            find_policy: returns the policy of the endpoint, or None; see
                `session_plugin.policy.endpoint_policy`.

        Raises:
            ConfigurationError: an argument has a wrong type.
        """
        check_middleware(app, database, find_policy)
        if isinstance(database, AsyncInterface):
            raise ConfigurationError(
                "WSGI cannot await an async database. Use Database, or session_plugin.asgi.SessionScopeMiddleware."
            )
        self.app = app
        self._db = database
        self._find_policy = find_policy

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request."""
        units: dict[Any, ref[UnitOfWork[Any]]] = environ.setdefault(KEY, {})
        core = core_of(self._db)
        outer = units[core]() if core in units else None
        if outer is not None and not outer.closed:
            outer.find_policy = self._find_policy or outer.find_policy
            return self.app(environ, start_response)
        if (mounted := _mounted_in(core, environ)) is not None:
            mounted.find_policy = self._find_policy or mounted.find_policy
            units[core] = ref(mounted)
            return MountedResponse(mounted, start_response).run(self.app, environ)
        method = environ["REQUEST_METHOD"]
        origin = f"{method} {environ.get('PATH_INFO', '')}"
        unit = open_unit_of_work(core, origin=origin, method=method, find_policy=self._find_policy)
        units[core] = ref(unit)
        return Response(unit, start_response).run(self.app, environ)


def _mounted_in(core: DatabaseCore, environ: WSGIEnvironment) -> UnitOfWork[Any] | None:
    """Return the unit of work of the ASGI request in whose app this one is mounted, or None."""
    unit = None if innermost.get() is None else find(core)
    if unit is None or unit.serves is None or unit.lent or not unit.can_be_joined or not unit.serves(environ):
        return None
    return unit


def open_units(environ: WSGIEnvironment) -> list[UnitOfWork[Any]]:
    """Return the open units of work of a request, that of the innermost middleware first.

    An environ may outlive its request, with a stream that was never closed, so it refers to them weakly.
    """
    units: dict[Any, ref[UnitOfWork[Any]]] = environ.get(KEY, {})
    return [unit for found in reversed(units.values()) if (unit := found()) is not None and not unit.closed]
