"""The plugins for Starlette and for frameworks that are built on it."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import TYPE_CHECKING, Any, Unpack

from starlette.applications import Starlette
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import HTTPConnection

from ..asgi.middleware import find_cycle
from ..asgi.types import ASGIApp, Receive, Scope, Send
from ..database.async_database import AsyncDatabase
from ..database.async_interface import AsyncInterface
from ..database.interface import DatabaseInterface
from ..database.sync_database import Database
from ..database.sync_interface import SyncInterface
from ..exceptions import ConfigurationError, ScopeClosedError
from ..plugin import Plugin
from ..policy import Policy, is_coroutine_function
from ..scope.permits import wait_for_permit, wait_for_place
from ..scope.typevars import AsyncS, S, SyncS
from ..scope.unit_of_work import UnitOfWork
from .background import ResponseScopeMiddleware
from .endpoints import is_taken_by_coroutine
from .settling import endpoints_of, settle_inside

if TYPE_CHECKING:
    from ..database.configuration import Configuration, Source
    from ..database.options import Options


class StarlettePlugin(Plugin[S]):
    """What the sync and the async plugin share."""

    def init_app(self, app: Starlette, source: Source | None = None, **options: Unpack[Options]) -> None:
        """Give every request of ``app`` a unit of work.

        Args:
            app: a Starlette or FastAPI app, before its first request.
            source: as at construction, and replaces what was given there.
            **options: added to those of the construction, and win over them.

        Raises:
            ConfigurationError: the database cannot be configured, or it is too late or too often.
        """
        if not isinstance(app, Starlette):
            raise ConfigurationError(
                f"init_app() takes a Starlette or FastAPI app, and {app!r} is not one. Call it before you wrap the app."
            )
        if app.middleware_stack is not None:
            raise ConfigurationError(
                "init_app() was called after the app had started. Call it where you create the app."
            )
        db = self._register(app, self._configuration.updated(source, options))
        build = app.build_middleware_stack

        def build_with_scope() -> ASGIApp:
            settle_inside(app, db)
            scoped = ResponseScopeMiddleware(build(), db, find_policy=self._find_policy)
            return OutermostMiddleware(scoped)

        app.build_middleware_stack = build_with_scope  # type: ignore[method-assign]

    def _find_policy(self, scope: Scope) -> Policy | None:
        """Return the policy that ``@db.policy`` set on the endpoint which the router chose."""
        return self._endpoint_policy(scope.get("endpoint"))

    def _endpoints(self, app: Starlette) -> Iterable[Any]:
        return endpoints_of(app.routes)

    def _unit_of_request(self, connection: HTTPConnection | None) -> UnitOfWork[S]:
        """Return the unit of work of ``connection``; without it, the one that the running code is inside."""
        cycle = None if connection is None else find_cycle(connection.scope, self)
        return self._unit_of_work() if cycle is None else cycle.unit


class OutermostMiddleware(ServerErrorMiddleware):
    """Does nothing: instrumentation looks for a `ServerErrorMiddleware` outermost; Starlette's own is inside ours."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        """Serve one connection."""
        return self.app(scope, receive, send)


class SessionPlugin(StarlettePlugin[SyncS], SyncInterface[SyncS]):
    """A sync database for ``def`` endpoints.

    ::

        db = SessionPlugin("sqlite:///shop.db")
        app = FastAPI()
        db.init_app(app)
        SessionDep = Annotated[Session, Depends(db.get_session)]
    """

    _database_class: type[DatabaseInterface[Any]] = Database

    if TYPE_CHECKING:

        def database_for(self, app: Starlette) -> Database[SyncS]:
            """Return the database of ``app``."""

    @property
    def database(self) -> Database[SyncS]:
        """The database of the current request's app, or of the only app."""
        database: Database[SyncS] = self._current_database()
        return database

    def _set_up(self, configuration: Configuration) -> None:
        super()._set_up(configuration)
        self._on_event_loop: dict[int, tuple[Any, bool]] = {}

    def _runs_on_event_loop(self, scope: Scope) -> bool:
        """Return True if the endpoint of the request, or a dependency of it, is a coroutine function with the session.

        Without a route of FastAPI's, the endpoint itself has called `get_session`.
        """
        dependant = getattr(scope.get("route"), "dependant", None)
        if dependant is None:
            return is_coroutine_function(scope.get("endpoint"))
        known = self._on_event_loop.get(id(dependant))
        if known is None:  # kept with what has that id, so that nothing else can get it
            known = (dependant, is_taken_by_coroutine(dependant, self.get_session))
            self._on_event_loop[id(dependant)] = known
        return known[1]

    async def get_session(self, connection: HTTPConnection = None) -> SyncS:  # type: ignore[assignment]
        """Return the session of this request; a dependency.

        It waits, without a thread, if more than ``max_pending_sessions`` have been asked for and have no
        connection yet.  For an ``async def`` endpoint that takes the session as a parameter, and for a call by
        hand, it waits until the pool has a connection, since the session itself could only wait on the event loop.

        Args:
            connection: the request or the WebSocket, whose session it is, whatever other units of work are open;
                FastAPI passes it.  Without it, as ``db.session``: that of the unit of work that the code is inside.

        Raises:
            NoScopeError: there is no unit of work here.
            ScopeClosedError: it has ended, and had no session.
            sqlalchemy.exc.TimeoutError: it has waited for the pool's time-out.
        """
        unit = self._unit_of_request(connection)
        if connection is None or self._runs_on_event_loop(connection.scope):
            await wait_for_permit(unit)
        else:
            await wait_for_place(unit)
        return unit.session


class AsyncSessionPlugin(StarlettePlugin[AsyncS], AsyncInterface[AsyncS]):
    """An async database for ``async def`` endpoints.

    ::

        db = AsyncSessionPlugin("postgresql+asyncpg://localhost/shop")
        app = FastAPI()
        db.init_app(app)
        SessionDep = Annotated[AsyncSession, Depends(db.get_session)]
    """

    _database_class: type[DatabaseInterface[Any]] = AsyncDatabase

    if TYPE_CHECKING:

        def database_for(self, app: Starlette) -> AsyncDatabase[AsyncS]:
            """Return the database of ``app``."""

    @property
    def database(self) -> AsyncDatabase[AsyncS]:
        """The database of the current request's app, or of the only app."""
        database: AsyncDatabase[AsyncS] = self._current_database()
        return database

    async def get_session(self, connection: HTTPConnection = None) -> AsyncS:  # type: ignore[assignment]
        """Return the session of this request; a dependency.

        Args:
            connection: the request or the WebSocket, whose session it is, whatever other units of work are open;
                FastAPI passes it.  Without it, as ``db.session``: that of the unit of work that the code is inside.

        Raises:
            NoScopeError: there is no unit of work here.
            ScopeClosedError: it has ended.
        """
        unit = self._unit_of_request(connection)
        if unit.closed:
            raise ScopeClosedError(unit.closed_message)
        return unit.session
