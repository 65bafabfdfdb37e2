"""The app that the servers of `test_servers.py` serve; environment variables choose the framework and the database.

Every request writes both of its rows or none.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any

from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from session_plugin.exceptions import SessionPluginError

from .harness import POOL, Child, Parent

SITE = "SESSION_PLUGIN_TEST_SITE"
DATABASE = "SESSION_PLUGIN_TEST_DATABASE"
"""The names of the environment variables that choose the site and its database."""

KEY = 7
"""The key of the advisory lock with which a test holds requests."""

CHUNKS = 1000
"""The number of chunks in a body that no test reads to its end; all of it would take ten seconds."""


def pair(session: Session, name: str) -> None:
    """Write the two rows of a request."""
    session.add(Parent(name=name))
    session.flush()
    session.add(Child(name=f"{name}'s", parent=name))
    session.flush()


def orphan(session: Session, name: str) -> None:
    """Cause the COMMIT to fail."""
    pair(session, name)
    session.add(Child(name=f"{name}'s orphan", parent="nobody"))
    session.flush()


def sign(session: Session) -> None:
    """Show the process id of this worker in `pg_stat_activity` for the duration of the transaction."""
    session.execute(text(f"SET LOCAL application_name = 'worker {os.getpid()}'"))


def hold(session: Session, name: str) -> None:
    """Write a row, then wait in a statement while a test holds the lock."""
    sign(session)
    session.add(Parent(name=name))
    session.flush()
    session.execute(text(f"SELECT pg_advisory_xact_lock_shared({KEY})"))
    session.add(Child(name=f"{name}'s", parent=name))


def look(session: Session, name: str) -> dict[str, Any]:
    """Write both rows, wait for the lock, and report the worker, the connection and the rows that are visible."""
    asks = text("SELECT pg_backend_pid(), inet_client_port(), txid_current()")
    pair(session, name)
    before = session.execute(asks).one()
    seen = sorted(session.scalars(select(Parent.name)))
    session.execute(text(f"SELECT pg_advisory_xact_lock_shared({KEY})"))
    return {
        "worker": os.getpid(),
        "backend": before[0],
        "port": before[1],
        "same": session.execute(asks).one() == before,
        "seen": seen,
        "preloaded": preloaded,
    }


def length(query: Mapping[str, str]) -> dict[str, str]:
    """The headers of a stream, which has a Content-Length if its client asks for it."""
    return {"Content-Length": query["length"]} if "length" in query else {}


WORKS = {"pair": pair, "orphan": orphan, "hold": hold, "look": look, "refuse": pair}
LATE = {"saved": pair, "lost": orphan}
preloaded: list[int] = []


def use_while_importing(db: Any) -> None:
    """Leave a connection in the pool of the process that imports the site."""
    with db.session_scope() as session:
        preloaded.extend(session.execute(text("SELECT pg_backend_pid(), inet_client_port()")).one())


def wait_in_gevent(connection: Any) -> None:
    """Make psycopg2 wait for a connection without blocking other greenlets."""
    from gevent.socket import wait_read, wait_write
    from psycopg2 import extensions

    waits = {extensions.POLL_READ: wait_read, extensions.POLL_WRITE: wait_write}
    while (state := connection.poll()) != extensions.POLL_OK:
        waits[state](connection.fileno())


def make_flask(site: str) -> Any:
    from flask import Flask, Response, request

    from session_plugin.flask import SessionPlugin

    url = os.environ[DATABASE]
    db = SessionPlugin(create_engine(url, **POOL)) if "given" in site else SessionPlugin(url, **POOL)
    app = Flask(__name__)
    db.init_app(app)
    if "used" in site:
        use_while_importing(db)
    if site == "flask-green":
        from psycopg2 import extensions

        extensions.set_wait_callback(wait_in_gevent)

    @app.post("/<work>/<name>")
    def act(work: str, name: str) -> Any:
        session = db.session
        done = WORKS[work](session, name)
        assert db.session is session  # other requests were served in the meantime
        return done or {}, 400 if work == "refuse" else 201

    @app.post("/stream/<fate>/<name>")
    def stream(fate: str, name: str) -> Any:
        pair(db.session, name)

        def body() -> Iterator[bytes]:
            LATE[fate](db.session, f"late {name}")
            yield b"chunk"
            yield b"chunk"

        return Response(body(), 201, length(request.args))

    @app.post("/endless/<name>")
    def endless(name: str) -> Any:
        def body() -> Iterator[bytes]:
            pair(db.session, f"late {name}")
            for _ in range(CHUNKS):
                yield b"chunk" * 2000
                time.sleep(0.01)

        return Response(body(), 201)

    @app.post("/stop/<name>")
    def stop(name: str) -> Any:
        sign(db.session)
        pair(db.session, name)
        time.sleep(60)  # until the process is killed
        return {}, 201

    @app.post("/siblings/<name>")
    def siblings(name: str) -> Any:
        import gevent

        def work(session: Any) -> str:
            try:
                session.execute(text("SELECT pg_sleep(0.1)"))
            except SessionPluginError as error:
                return type(error).__name__
            return "ran"

        greenlets = [gevent.spawn(work, db.session) for _ in range(2)]
        return {"told": [greenlet.get() for greenlet in greenlets]}

    @app.get("/held")
    def held() -> Any:
        return {"held": db.engine.pool.checkedout(), "worker": os.getpid()}

    @app.errorhandler(IntegrityError)
    def conflict(error: IntegrityError) -> Any:
        return {"handled": type(error).__name__}, 409

    return app


def make_fastapi(*, is_async: bool) -> Any:
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse

    from session_plugin.fastapi import AsyncSessionPlugin, SessionPlugin

    db: Any = (AsyncSessionPlugin if is_async else SessionPlugin)(os.environ[DATABASE], **POOL)
    app = FastAPI()
    db.init_app(app)

    async def late(work: Any, name: str) -> None:
        if is_async:
            await db.session.run_sync(work, name)
        else:
            work(db.session, name)

    @app.post("/stream/{fate}/{name}")
    async def stream(fate: str, name: str, request: Request) -> Any:
        await late(pair, name)

        async def body() -> AsyncIterator[bytes]:
            await late(LATE[fate], f"late {name}")
            yield b"chunk"
            yield b"chunk"

        return StreamingResponse(body(), 201, length(request.query_params))

    @app.post("/endless/{name}", status_code=201)
    async def endless(name: str) -> Any:
        async def body() -> AsyncIterator[bytes]:
            await late(pair, f"late {name}")
            for _ in range(CHUNKS):
                yield b"chunk" * 2000
                await asyncio.sleep(0.01)

        return StreamingResponse(body(), 201)

    @app.get("/held")
    async def held() -> Any:
        return {"held": db.engine.pool.checkedout(), "worker": os.getpid()}

    if is_async:

        @app.post("/{work}/{name}")
        async def act(work: str, name: str, session: Annotated[AsyncSession, Depends(db.get_session)]) -> Any:
            done = await session.run_sync(WORKS[work], name)
            assert db.session is session
            return JSONResponse(done or {}, 400 if work == "refuse" else 201)

    else:

        @app.post("/{work}/{name}")
        def act_in_thread(work: str, name: str, session: Annotated[Session, Depends(db.get_session)]) -> Any:
            done = WORKS[work](session, name)
            assert db.session is session
            return JSONResponse(done or {}, 400 if work == "refuse" else 201)

    @app.exception_handler(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> Any:
        return JSONResponse({"handled": type(error).__name__}, 409)

    return app


def make(site: str) -> Any:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    return make_flask(site) if site.startswith("flask") else make_fastapi(is_async=site == "fastapi")


if SITE in os.environ:
    app = make(os.environ[SITE])
