"""The adapter for Starlette, and for what is built on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.routing import Router

from ._asgi import Layer
from ._client import ASGIApp, Receive, Scope, Send
from ._permits import wait_for_permit
from .access import HasDatabase
from .asgi import SessionScopeMiddleware, find_exchange
from .async_access import AsyncAccess
from .database import AsyncDatabase, Database
from .exceptions import ConfigurationError
from .plugin import Plugin
from .policy import Outcome, Policy, response_status
from .sync_access import SyncAccess
from .typevars import AsyncS, S, SyncS

if TYPE_CHECKING:
    from .configuration import Source

__all__ = ["AsyncSessionPlugin", "SessionPlugin"]


@response_status.register
def _(error: HTTPException) -> int:
    return error.status_code


class StarlettePlugin(Plugin[S]):
    """What the sync and the async plugin share."""

    def init_app(self, app: Starlette, source: Source | None = None, **options: Any) -> None:
        """Give every request of ``app`` a unit of work.

        Args:
            app: a Starlette or FastAPI app, before its first request.
            source: as at construction, and wins over what was said there.
            **options: added to those of the construction, and win over them.

        Raises:
            ConfigurationError: the database cannot be configured, or it is too late or too often.
        """
        if not isinstance(app, Starlette):
            raise ConfigurationError(
                f"init_app() takes the Starlette or FastAPI app itself, and {app!r} is none. Give "
                "it before it is wrapped."
            )
        if app.middleware_stack is not None:
            raise ConfigurationError("init_app() came after the app had started. Call it where the app is made.")
        access = self.register(app, self.configuration.updated(source, options))
        build = app.build_middleware_stack

        def build_with_scope() -> ASGIApp:
            settle_inside(app, access)
            scoped = SessionScopeMiddleware(build(), access, find_policy=self._find_policy)
            return OutermostMiddleware(scoped)

        app.build_middleware_stack = build_with_scope  # type: ignore[method-assign]

    def _find_policy(self, scope: Scope) -> Policy | None:
        """The policy that ``@db.policy`` put on the endpoint which the router chose."""
        return self.marked_policy(scope.get("endpoint"))


class OutermostMiddleware(ServerErrorMiddleware):
    """What instrumentation insists on finding: Starlette's own stands inside ours, and this one does nothing."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:  # type: ignore[override]
        """Serve one connection."""
        return self.app(scope, receive, send)


class SessionPlugin(StarlettePlugin[SyncS], SyncAccess[SyncS]):
    """A sync database for ``def`` endpoints.

    ::

        db = SessionPlugin("sqlite:///shop.db")
        app = FastAPI()
        db.init_app(app)
        SessionDep = Annotated[Session, Depends(db.get_session)]
    """

    database_class: type[Database[Any]] = Database

    @property
    def database(self) -> Database[SyncS]:
        """The database of the app whose request this is, or of the only app."""
        database: Database[SyncS] = self._the_database()
        return database

    async def get_session(self) -> SyncS:
        """A dependency: the session of this request, as soon as the pool has a connection for it."""
        scope = self.scope
        await wait_for_permit(scope)
        return scope.session


class AsyncSessionPlugin(StarlettePlugin[AsyncS], AsyncAccess[AsyncS]):
    """An async database for ``async def`` endpoints.

    ::

        db = AsyncSessionPlugin("postgresql+asyncpg://localhost/shop")
        app = FastAPI()
        db.init_app(app)
        SessionDep = Annotated[AsyncSession, Depends(db.get_session)]
    """

    database_class: type[AsyncDatabase[Any]] = AsyncDatabase

    @property
    def database(self) -> AsyncDatabase[AsyncS]:
        """The database of the app whose request this is, or of the only app."""
        database: AsyncDatabase[AsyncS] = self._the_database()
        return database

    async def get_session(self) -> AsyncS:
        """A dependency: the session of this request."""
        return self.session


def settle_inside(app: Starlette, access: HasDatabase) -> None:
    """Put the inner layer inside the exception handling of ``app``, and of the apps mounted in it."""
    stack = app.router.middleware_stack
    if access not in SettlingMiddleware.accesses(stack):
        app.router.middleware_stack = SettlingMiddleware(stack, access)
    for mounted in mounted_apps(app.routes):
        settle_inside(mounted, access)


def mounted_apps(routes: Iterable[Any]) -> Iterator[Starlette]:
    """The apps mounted in ``routes``, in the routers among them, and behind a mount's own middleware."""
    for route in routes:
        app = getattr(route, "original_router", None) or getattr(route, "app", None)
        while app is not None and not isinstance(app, Starlette | Router):
            app = getattr(app, "app", None)
        if isinstance(app, Starlette):
            yield app
        elif app is not None:
            yield from mounted_apps(app.routes)


class SettlingMiddleware:
    """The inner layer, inside the app's exception handling: it also sees what the handlers catch.

    It acts only for the database of the app that the request came through: an app may be mounted in many.
    """

    _seen: Any = None
    _seeing: tuple[Any, ...]

    def __init__(self, app: ASGIApp, access: HasDatabase) -> None:
        """Wrap the router of an app."""
        self.app = app
        self._access = access

    @staticmethod
    def accesses(stack: ASGIApp) -> Iterator[HasDatabase]:
        """Those for which ``stack`` begins with such a middleware."""
        while isinstance(stack, SettlingMiddleware):
            yield stack._access
            stack = stack.app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        exchange = None if scope["type"] == "lifespan" else find_exchange(scope, self._access)
        if exchange is None:
            await self.app(scope, receive, send)
            return
        handlers = scope.get("starlette.exception_handlers")
        if handlers is not None:
            scope["starlette.exception_handlers"] = self._seeing_handlers(handlers)
        await Layer(exchange, send).run(self.app, scope, receive)

    def _seeing_handlers(self, handlers: tuple[Any, ...]) -> tuple[Any, ...]:
        by_exception, _by_status = handlers  # an app has both tables to itself
        if by_exception is not self._seen:
            self._seeing = tuple({key: self._see(call) for key, call in table.items()} for table in handlers)
            self._seen = by_exception
        return self._seeing

    def _see(self, handler: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """``handler``, but the scope has rolled back by the time it runs, so that it can query."""

        async def seeing(connection: Any, error: Exception) -> Any:
            exchange = find_exchange(connection.scope, self._access)
            if exchange is not None and Outcome.raised(error).error is not None:
                await exchange.raised(error)
            if iscoroutinefunction(handler) or iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004
                return await handler(connection, error)
            return await run_in_threadpool(handler, connection, error)

        return seeing
