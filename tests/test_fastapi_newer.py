"""Tests for features that the lowest supported FastAPI does not have; see `pytest --core` in conftest.py."""

from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from .asgi_site import ASYNC_DRIVERS, Site, stores
from .harness import Parent, Store, add_orphan, insert, wait_for
from .test_fastapi import MIDDLEWARES, check_handled_errors, handling_app

async_store = stores(ASYNC_DRIVERS)
file_store = stores(["sqlite+aiosqlite"])


def test_a_function_scoped_dependency_has_the_requests_session(file_store: Store) -> None:
    """A dependency with scope="function" ends before the response, but receives the same session as the request."""
    site = Site(file_store)
    get_session = site.db.get_session

    @site.app.get("/")
    async def endpoint(
        session: Annotated[AsyncSession, Depends(get_session)],
        by_scope: Annotated[AsyncSession, Depends(get_session, scope="function")],
    ) -> bool:
        return session is by_scope

    with site.running():
        assert site.get().json is True


def test_an_app_mounted_in_a_router(file_store: Store) -> None:
    """An exception in an app that is mounted in a router rolls back, whatever its error handlers return."""
    site = Site(file_store)
    router = APIRouter()
    router.mount("/in", handling_app(site, FastAPI()))
    site.app.include_router(router)
    check_handled_errors(site, "/in")


@pytest.mark.parametrize("middlewares", MIDDLEWARES)
def test_failed_commit_of_server_sent_events_is_an_error_response(async_store: Store, middlewares: str) -> None:
    """If the commit before server-sent events fails, the client receives the error handler's response.

    The generator has already started, and any middleware may be in between.
    """
    site = Site(async_store)
    for middleware, options in MIDDLEWARES[middlewares]:
        site.app.add_middleware(middleware, **options)

    async def dependency() -> AsyncSession:
        session: AsyncSession = await site.db.get_session()
        await session.run_sync(add_orphan)
        return session

    @site.app.get("/handled", response_class=EventSourceResponse)
    async def events(session: Annotated[AsyncSession, Depends(dependency)]) -> Any:
        yield {"padding": "x" * 2000}

    @site.app.exception_handler(IntegrityError)
    async def conflict(request: Any, error: Exception) -> Any:
        return JSONResponse({}, 409)

    with site.running():
        assert site.get("/handled").status == 409
        assert async_store.names() == []


def test_the_documented_dependency_sends_success_after_a_failed_commit(file_store: Store) -> None:
    """The dependency of FastAPI's documentation returns a 200 response for a failed commit, so these tests can fail."""
    make = sessionmaker(file_store.engine)
    app = FastAPI()

    def get_db() -> Any:
        with make.begin() as session:
            yield session

    @app.get("/")
    def endpoint(session: Annotated[Session, Depends(get_db)]) -> Any:
        add_orphan(session)

    with Site(file_store, app).running() as site:
        assert site.get().status == 200
        assert file_store.names() == []


@pytest.mark.parametrize("middlewares", ["none", "BaseHTTPMiddleware"])
def test_yield_dependencies_of_the_users_own(async_store: Store, middlewares: str) -> None:
    """Code after `yield` in a user's dependency joins the endpoint's transaction or is late work, as its scope says."""
    site = Site(async_store)
    for middleware, options in MIDDLEWARES[middlewares]:
        site.app.add_middleware(middleware, **options)
    SessionDep = Annotated[AsyncSession, Depends(site.db.get_session)]

    async def audited(session: SessionDep) -> Any:
        yield
        await session.run_sync(insert("audit"))

    async def failing(session: SessionDep) -> Any:
        yield
        await session.run_sync(add_orphan)

    @site.app.get("/before", dependencies=[Depends(audited, scope="function")])
    @site.app.get("/after", dependencies=[Depends(audited)])
    @site.app.get("/refused", dependencies=[Depends(failing, scope="function")])
    @site.app.get("/late", dependencies=[Depends(failing)])
    async def endpoint(session: SessionDep) -> None:
        await session.run_sync(insert("work"))

    with site.running():
        for path, status, names in (
            ("/before", 200, ["audit", "work"]),
            ("/after", 200, ["audit", "work"]),
            ("/refused", 500, []),
            ("/late", 200, ["work"]),
        ):
            async_store.clear()
            assert (path, site.get(path).status) == (path, status)
            assert wait_for(lambda expected=names: async_store.names() == expected), path


def test_server_sent_events(async_store: Store) -> None:
    """FastAPI starts the generator before the response; a new scope in it commits before its event is sent."""
    site = Site(async_store)
    seen: list[list[str]] = []

    async def early(session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> AsyncSession:
        await session.run_sync(lambda sync_session: sync_session.add(Parent(name="early")))
        return session

    @site.app.get("/", response_class=EventSourceResponse)
    async def events(session: Annotated[AsyncSession, Depends(early)]) -> Any:
        for name in ("one", "two"):
            async with site.db.session_scope(new=True) as own:
                await own.run_sync(insert(name))
            yield {"saved": async_store.names()}

    with site.running():
        for _ in range(20):
            async_store.clear()
            reply = site.get()
            assert (reply.status, reply.complete) == (200, True)
            seen.append(async_store.names())
    assert seen == [["early", "one", "two"]] * 20
