"""`SettlingMiddleware`: the inner layer, inside an app's exception handling."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from inspect import iscoroutinefunction
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Router

from ..asgi.middleware import find_cycle
from ..asgi.types import ASGIApp, Receive, Scope, Send
from ..database.core import HasDatabase
from ..policy import Outcome, response_status
from .background import ResponseLayer


@response_status.register
def _(error: HTTPException) -> int:
    return error.status_code


def settle_inside(app: Starlette, db: HasDatabase) -> None:
    """Put a `SettlingMiddleware` inside the exception handling of ``app``, and of the apps mounted in it."""
    stack = app.router.middleware_stack
    if db not in SettlingMiddleware.databases_of(stack):
        app.router.middleware_stack = SettlingMiddleware(stack, db)
    for mounted in mounted_apps(app.routes):
        settle_inside(mounted, db)


def mounted_apps(routes: Iterable[Any]) -> Iterator[Starlette]:
    """Yield the apps mounted in ``routes``, in the routers among them, and behind a mount's own middleware."""
    for route in routes:
        app = _app_of(route)
        if isinstance(app, Starlette):
            yield app
        elif app is not None:
            yield from mounted_apps(app.routes)


def endpoints_of(routes: Iterable[Any]) -> Iterator[Any]:
    """Yield the endpoints of ``routes``, and of the routers and apps among them."""
    for route in routes:
        app = _app_of(route)
        if app is None:
            yield getattr(route, "endpoint", None)
        else:
            yield from endpoints_of(app.routes)


def _app_of(route: Any) -> Starlette | Router | None:
    """Return the app or the router that ``route`` passes requests on to, behind its middleware, or None."""
    app = getattr(route, "original_router", None) or getattr(route, "app", None)
    while app is not None and not isinstance(app, Starlette | Router):
        app = getattr(app, "app", None)
    return app


class SettlingMiddleware:
    """Settles inside the app's exception handling, and sees the exceptions for which the app has handlers.

    It acts only for the database of the app that the request came through: an app may be mounted in many.
    """

    _wrapped_from: Any = None
    _wrapped: tuple[Any, ...]

    def __init__(self, app: ASGIApp, db: HasDatabase) -> None:
        """Wrap the router of an app."""
        self.app = app
        self._db = db

    @staticmethod
    def databases_of(stack: ASGIApp) -> Iterator[HasDatabase]:
        """Yield those for which ``stack`` begins with such a middleware."""
        while isinstance(stack, SettlingMiddleware):
            yield stack._db
            stack = stack.app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        cycle = None if scope["type"] == "lifespan" else find_cycle(scope, self._db)
        if cycle is None:
            await self.app(scope, receive, send)
            return
        handlers = scope.get("starlette.exception_handlers")
        if handlers is not None:
            scope["starlette.exception_handlers"] = self._wrap_handlers(handlers)
        await ResponseLayer(cycle, send).run(self.app, scope, receive)

    def _wrap_handlers(self, handlers: tuple[Any, ...]) -> tuple[Any, ...]:
        by_exception, _by_status = handlers  # both tables belong to one app
        if by_exception is not self._wrapped_from:
            self._wrapped = tuple({key: self._wrap(call) for key, call in table.items()} for table in handlers)
            self._wrapped_from = by_exception
        return self._wrapped

    def _wrap(self, handler: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        """Return ``handler``, but the unit of work has rolled back by the time it runs, so that it can query."""

        async def settle_and_handle(connection: Any, error: Exception) -> Any:
            cycle = find_cycle(connection.scope, self._db)
            if cycle is not None and Outcome.raised(error).error is not None:
                await cycle.handler_called(error)
            if iscoroutinefunction(handler) or iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004
                return await handler(connection, error)
            return await run_in_threadpool(handler, connection, error)

        return settle_and_handle
