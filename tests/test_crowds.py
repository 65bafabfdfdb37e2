"""Many concurrent requests on a pool of five: all are served, each with its own session, and none waits forever.

Each request uses its own session, rows and late work.  If it sees those of another request, it fails with a 500.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, Request
from fastapi.responses import JSONResponse, StreamingResponse
from flask import Flask, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from session_plugin.database.interface import core_of
from session_plugin.flask import SessionPlugin

from . import wsgi_site
from .asgi_site import Gate, Site, stores
from .harness import POOL, Parent, Store, count, wait_for

CROWD = 200

store = stores(["postgresql+psycopg"])


class ParentOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    name: str


def look(session: Session, name: str) -> None:
    """Check that the session contains nothing of another request."""
    assert session.info.setdefault("name", name) == name
    assert {row.name.partition(" ")[0] for row in [*session.new, *session.identity_map.values()]} <= {name}
    asks = text("SELECT pg_backend_pid(), txid_current()")
    assert session.execute(asks).one() == session.execute(asks).one()


def write(session: Session, name: str, what: str = "") -> Parent:
    look(session, name)
    row = Parent(name=f"{name} {what}".strip())
    session.add(row)
    session.flush()
    look(session, name)
    return row


def add_sync_endpoints(site: Site) -> None:
    app, db = site.app, site.db
    SessionDep = Annotated[Session, Depends(db.get_session)]

    @app.get("/add/{name}")
    def add(name: str, session: SessionDep) -> None:
        session.add(Parent(name=name))

    @app.get("/model/{name}", response_model=ParentOut)
    def model(name: str, session: SessionDep) -> Any:
        return write(session, name)

    def found(name: str, session: SessionDep) -> None:
        write(session, name)

    @app.get("/dependency/{name}")
    def dependency(name: str, session: SessionDep, found: Annotated[None, Depends(found)]) -> None:
        look(session, name)

    def found_by_accessor(name: str) -> None:
        write(db.session, name)

    @app.get("/accessor/{name}", response_model=ParentOut)
    def accessor(name: str, found: Annotated[None, Depends(found_by_accessor)]) -> Any:
        look(db.session, name)
        return db.session.get(Parent, name)

    @app.get("/accessor-add/{name}")
    def accessor_add(name: str) -> None:
        db.session.add(Parent(name=name))

    @app.get("/hook/{name}")
    def hook(name: str, session: SessionDep) -> None:
        session.add(Parent(name=name))
        db.on_commit(lambda: write(db.session, name, "hook"))

    @app.get("/own/{name}")
    def own(name: str) -> None:
        with db.session_scope(new=True) as session:
            write(session, name)

    @app.get("/stream/{name}")
    def stream(name: str, session: SessionDep) -> Any:
        write(session, name)

        def body() -> Iterator[str]:
            for number in range(3):
                write(session, name, f"chunk {number}")
                yield "chunk"

        return StreamingResponse(body())

    @app.get("/background/{name}")
    def background(name: str, session: SessionDep, tasks: BackgroundTasks) -> None:
        write(session, name)
        tasks.add_task(lambda: write(session, name, "background"))

    @app.get("/refused/{name}")
    def refused(name: str, session: SessionDep) -> Any:
        write(session, name)
        return JSONResponse({}, 409)

    @app.get("/nothing")
    def nothing() -> None:
        """Needs a thread, but no database."""


def add_async_endpoints(site: Site) -> None:
    app, db = site.app, site.db
    SessionDep = Annotated[AsyncSession, Depends(db.get_session)]

    @app.get("/add/{name}")
    async def add(name: str, session: SessionDep) -> None:
        session.add(Parent(name=name))

    @app.get("/model/{name}", response_model=ParentOut)
    async def model(name: str, session: SessionDep) -> Any:
        return await session.run_sync(write, name)

    async def found(name: str, session: SessionDep) -> None:
        await session.run_sync(write, name)

    @app.get("/dependency/{name}")
    async def dependency(name: str, session: SessionDep, found: Annotated[None, Depends(found)]) -> None:
        await session.run_sync(look, name)

    @app.get("/accessor/{name}")
    async def accessor(name: str) -> None:
        await db.session.run_sync(write, name)

    @app.get("/hook/{name}")
    async def hook(name: str, session: SessionDep) -> None:
        session.add(Parent(name=name))

        async def hooked() -> None:
            await db.session.run_sync(write, name, "hook")

        db.on_commit(hooked)

    @app.get("/own/{name}")
    async def own(name: str) -> None:
        async with db.session_scope(new=True) as session:
            await session.run_sync(write, name)

    @app.get("/stream/{name}")
    async def stream(name: str, session: SessionDep) -> Any:
        await session.run_sync(write, name)

        async def body() -> AsyncIterator[str]:
            for number in range(3):
                await session.run_sync(write, name, f"chunk {number}")
                yield "chunk"

        return StreamingResponse(body())

    @app.get("/background/{name}")
    async def background(name: str, session: SessionDep, tasks: BackgroundTasks) -> None:
        await session.run_sync(write, name)
        tasks.add_task(session.run_sync, write, name, "background")

    @app.get("/refused/{name}")
    async def refused(name: str, session: SessionDep) -> Any:
        await session.run_sync(write, name)
        return JSONResponse({}, 409)


EXTRA = {"hook": ["hook"], "stream": ["chunk 0", "chunk 1", "chunk 2"], "background": ["background"]}
ASYNC_KINDS = ["add", "model", "dependency", "accessor", "hook", "own", "stream", "background", "refused"]
SYNC_KINDS = [*ASYNC_KINDS, "accessor-add"]


def crowd(site: Any, kinds: list[str], ask: Any) -> None:
    """Send all requests at once, and check that the responses agree with the database."""
    names = {f"{number:03}": kinds[number % len(kinds)] for number in range(CROWD)}
    with ThreadPoolExecutor(CROWD) as clients:
        replies = list(clients.map(lambda name: ask(f"/{names[name]}/{name}"), names))
    results = {(kind, reply.status, reply.complete) for kind, reply in zip(names.values(), replies, strict=True)}
    assert results == {(kind, 409 if kind == "refused" else 200, True) for kind in kinds}
    saved = {name for name, kind in names.items() if kind != "refused"}
    expected = sorted(saved | {f"{name} {what}" for name in saved for what in EXTRA.get(names[name], [])})
    wait_for(lambda: site.store.names() == expected)
    assert site.store.names() == expected


@pytest.mark.parametrize(
    "kinds", [SYNC_KINDS, ["accessor", "own", "own"], ["stream"]], ids=["mixed", "accessor", "stream"]
)
def test_sync_endpoints(store: Store, kinds: list[str]) -> None:
    """Sync endpoints are served although each needs several threads in turn, and a connection during that time."""
    site = Site(store, sync=True)
    add_sync_endpoints(site)
    with site.running():
        crowd(site, kinds, site.get)


def test_async_endpoints(store: Store) -> None:
    """Async endpoints are served when there are many more tasks than connections."""
    site = Site(store)
    add_async_endpoints(site)
    with site.running():
        crowd(site, ASYNC_KINDS, site.get)


def test_flask(store: Store) -> None:
    """Flask endpoints are served on a server with one thread for each request."""
    store.clear()
    db = SessionPlugin(store.url, **POOL)
    app = Flask(__name__)
    db.init_app(app)

    @app.get("/<kind>/<name>")
    def act(kind: str, name: str) -> Any:
        if kind == "own":
            with db.session_scope(new=True) as session:
                write(session, name)
            return {}
        if kind == "add":
            db.session.add(Parent(name=name))
            return {}
        session = db.session
        write(session, name)
        if kind == "hook":
            db.on_commit(lambda: write(db.session, name, "hook"))
        if kind == "stream":
            return Response(chunks(name))
        response = Response(status=409 if kind == "refused" else 200)
        if kind == "background":
            response.call_on_close(lambda: write(db.session, name, "background"))
        return response

    def chunks(name: str) -> Iterator[str]:
        for number in range(3):
            write(db.session, name, f"chunk {number}")
            yield "chunk"

    with wsgi_site.Site(store, app, db).checked() as site:
        site.start()
        crowd(site, ["add", "own", "hook", "stream", "background", "refused"], lambda path: site.ask(path, "GET"))


# -- more requests than can be served --------------------------------------------------------------


def held_site(store: Store, *, sync: bool = True, **options: Any) -> tuple[Site, Gate]:
    """A site with a pool of one connection, and an endpoint that holds the connection until the gate opens."""
    site = Site(store, sync=sync, **{"pool_size": 1, "max_overflow": 0, "pool_timeout": 30, **options})
    gate = Gate()

    @site.app.exception_handler(PoolTimeoutError)
    async def busy(request: Request, error: PoolTimeoutError) -> Any:
        return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})

    if sync:

        @site.app.get("/hold")
        def hold(session: Annotated[Session, Depends(site.db.get_session)]) -> None:
            count(session)
            gate.pass_through()

        @site.app.get("/dependency")
        def dependency(session: Annotated[Session, Depends(site.db.get_session)]) -> int:
            return count(session)

        @site.app.get("/accessor")
        def accessor() -> int:
            return count(site.db.session)

        @site.app.get("/nothing")
        def nothing() -> None:
            """Needs a thread, but no database."""
    else:

        @site.app.get("/hold")
        async def ahold(session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> None:
            await session.run_sync(count)
            await asyncio.to_thread(gate.pass_through)

        @site.app.get("/dependency")
        async def adependency(session: Annotated[AsyncSession, Depends(site.db.get_session)]) -> int:
            return await session.run_sync(count)

        @site.app.get("/nothing")
        async def anothing() -> None:
            """Needs no database."""

    return site, gate


@pytest.mark.parametrize(
    ("sync", "path"),
    [(True, "/dependency"), (True, "/accessor"), (False, "/dependency")],
    ids=["def", "accessor", "async"],
)
def test_requests_past_the_pool_timeout(store: Store, sync: bool, path: str) -> None:
    """A request that waits longer than `pool_timeout` receives the app's 503; others without a database are served."""
    site, gate = held_site(store, sync=sync, pool_timeout=0.5)
    with site.running(), ThreadPoolExecutor(61) as clients:
        holding = clients.submit(site.get, "/hold")
        assert gate.reached.wait(10)
        waiting = [clients.submit(site.get, path) for _ in range(60)]
        while not all(reply.done() for reply in waiting):
            assert site.get("/nothing").status == 200
        gate.opened.set()
        assert holding.result().status == 200
        assert {reply.result().status for reply in waiting} == {503}
        assert "imeout" in waiting[0].result().json["error"]
        assert [site.get(path).status for _ in range(3)] == [200] * 3


def test_waiting_requests_are_served_in_order(store: Store) -> None:
    """Waiting requests are served in order, whether they use the dependency or the accessor."""
    site, gate = held_site(store)
    served: list[str] = []

    @site.app.get("/accessor/{name}")
    def accessor(name: str) -> None:
        write(site.db.session, name)
        served.append(name)

    @site.app.get("/dependency/{name}")
    def dependency(name: str, session: Annotated[Session, Depends(site.db.get_session)]) -> None:
        write(session, name)
        served.append(name)

    with site.running(), ThreadPoolExecutor(20) as clients:
        clients.submit(site.get, "/hold")
        assert gate.reached.wait(10)
        waiting = core_of(site.db.database).semaphore._queue
        for number in range(10):
            kind = "accessor" if number % 2 else "dependency"
            clients.submit(site.get, f"/{kind}/{number}")
            assert wait_for(lambda expected=number + 1: len(waiting) == expected)
        gate.opened.set()
    assert served == [str(number) for number in range(10)]


@pytest.mark.parametrize("sync", [True, False], ids=["def", "async"])
def test_requests_that_need_a_second_connection_do_not_hang(store: Store, sync: bool) -> None:
    """Requests that hold a connection and need a second one fail after `pool_timeout` instead of hanging."""
    site = Site(store, sync=sync, pool_size=2, max_overflow=0, pool_timeout=0.5)
    together = threading.Barrier(2)

    if sync:

        @site.app.get("/{name}")
        def endpoint(name: str) -> None:
            write(site.db.session, name)
            together.wait(10)
            with site.db.session_scope(new=True) as session:
                write(session, f"{name}-audit")
    else:

        @site.app.get("/{name}")
        async def aendpoint(name: str) -> None:
            await site.db.session.run_sync(write, name)
            await asyncio.to_thread(together.wait, 10)
            async with site.db.session_scope(new=True) as session:
                await session.run_sync(write, f"{name}-audit")

    with site.running(), ThreadPoolExecutor(2) as clients:
        replies = dict(zip("ab", clients.map(site.get, ["/a", "/b"]), strict=True))
        assert 500 in {reply.status for reply in replies.values()}
        saved = [name for name, reply in replies.items() if reply.status == 200]
        assert store.names() == sorted(row for name in saved for row in (name, f"{name}-audit"))
