"""The contract app, implemented in each framework."""

import asyncio
import json
import threading
from typing import Annotated, Any

import uvicorn
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi import HTTPException as FastAPIHTTPException
from flask import Flask, abort, redirect, stream_with_context
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send
from werkzeug.serving import WSGIRequestHandler, make_server

import session_plugin
import session_plugin.asgi
import session_plugin.fastapi
import session_plugin.flask
import session_plugin.starlette
import session_plugin.wsgi

from .drivers import ASYNC, SYNC
from .harness import POOL, Act, ConflictError, HandledError, Harness, count

DONE = {"done": True}
JSON = [("Content-Type", "application/json")]


def before_of(act: Act, run: Any) -> Any:
    return lambda: run(act.before)


def background_of(act: Act, run: Any) -> Any:
    def background() -> None:
        try:
            run(act.background)
        finally:
            act.done.set()

    return background


# -- WSGI --------------------------------------------------------------------------------------


class ReplacingWSGI:
    """A middleware that discards the app's response, as `Act.replaced` says."""

    def __init__(self, app: Any, harness: Harness) -> None:
        self._app = app
        self._harness = harness

    def __call__(self, environ: Any, start_response: Any) -> Any:
        replaced = self._harness.act.replaced
        if replaced is None:
            return self._app(environ, start_response)
        body = self._app(environ, lambda *started: None)
        if hasattr(body, "close"):
            body.close()
        if not isinstance(replaced, int):
            raise replaced
        start_response(f"{replaced} Replaced", JSON)
        return [json.dumps(DONE).encode()]


class Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *args: Any) -> None:
        pass

    def run_wsgi(self) -> None:
        with self.server.harness.serving():
            super().run_wsgi()


class WSGIHarness(Harness):
    app: Any

    def start(self) -> None:
        self._server = make_server("127.0.0.1", 0, self.app, threaded=True, request_handler=Handler)
        self._server.daemon_threads = True
        self._server.harness = self
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()
        self.db.dispose()


class FlaskHarness(WSGIHarness):
    drivers = SYNC

    def make_app(self) -> None:
        self.app = app = Flask(__name__)
        app.wsgi_app = ReplacingWSGI(app.wsgi_app, self)  # type: ignore[method-assign]
        self.plugin = session_plugin.flask.SessionPlugin(self.store.url, **POOL)
        self.plugin.init_app(app)
        with app.app_context():
            self.db = self.plugin.database
        app.logger.disabled = True
        plugin = self.plugin

        @app.route("/act", methods=["GET", "POST"])
        def act() -> Any:
            act = self.act
            if act.use_session:
                act.work(plugin.session)
            if act.error is not None:
                raise act.error
            if act.redirect:
                abort(redirect("/elsewhere"))
            if act.stream:
                response = app.response_class(stream_with_context(chunks(act)), act.status)
            else:
                response = app.response_class(json.dumps(DONE), act.status)
            if act.before is not None:
                response.call_on_close(before_of(act, lambda work: work(plugin.session)))
            if act.background is not None:
                response.call_on_close(background_of(act, lambda work: work(plugin.session)))
            return response

        def chunks(act: Act) -> Any:
            for work in act.stream:
                yield b"chunk"
                work(plugin.session)

        @app.errorhandler(HandledError)
        def handled(error: HandledError) -> Any:
            return {"rows": count(plugin.session)}, 200

        @app.errorhandler(ConflictError)
        @app.errorhandler(IntegrityError)
        @app.errorhandler(OperationalError)
        def conflict(error: Exception) -> Any:
            return {"handled": type(error).__name__, "rows": count(plugin.session)}, 409


class PlainWSGIHarness(WSGIHarness):
    drivers = ("sqlite+pysqlite", "postgresql+psycopg")
    answers_failed_commits = False
    settles_inside_middleware = False
    shows_background_callables = False

    def make_app(self) -> None:
        self.db = db = session_plugin.Database(self.store.url, **POOL)

        def app(environ: Any, start_response: Any) -> Any:
            act = self.act
            try:
                if act.use_session:
                    act.work(db.session)
                if act.error is not None:
                    raise act.error
            except ConflictError as error:
                db.session.rollback()
                body = {"handled": type(error).__name__, "rows": count(db.session)}
                start_response("409 Conflict", JSON)
                return [json.dumps(body).encode()]
            status = 302 if act.redirect else act.status
            start_response(f"{status} Status", [*JSON, *([("Location", "/elsewhere")] if act.redirect else [])])
            return Body(act)

        class Body:
            def __init__(self, act: Act) -> None:
                self.act = act

            def __iter__(self) -> Any:
                if not self.act.stream:
                    yield json.dumps(DONE).encode()
                for work in self.act.stream:
                    yield b"chunk"
                    work(db.session)

            def close(self) -> None:
                if self.act.background is not None:
                    background_of(self.act, lambda work: work(db.session))()

        inner = session_plugin.wsgi.SessionScopeMiddleware(app, db)
        self.app = session_plugin.wsgi.SessionScopeMiddleware(ReplacingWSGI(inner, self), db)


# -- ASGI --------------------------------------------------------------------------------------


class ReplacingASGI:
    """A middleware that discards the app's response, as `Act.replaced` says."""

    def __init__(self, app: Any, harness: Harness) -> None:
        self._app = app
        self._harness = harness

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = self._harness.act.replaced
        if scope["type"] != "http" or replaced is None:
            await self._app(scope, receive, send)
            return

        async def discard(message: Any) -> None:
            pass

        await self._app(scope, receive, discard)
        if not isinstance(replaced, int):
            raise replaced
        await JSONResponse(DONE, replaced)(scope, receive, send)


class UvicornServer(uvicorn.Server):
    """A `uvicorn.Server` that checks every 0.01 instead of every 0.1 seconds whether it should exit."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.01)


class ASGIHarness(Harness):
    app: Any

    def start(self) -> None:
        config = uvicorn.Config(
            self.serve, "127.0.0.1", 0, interface="asgi3", loop="asyncio", log_config=None, lifespan="on",
            ws="websockets-sansio",
        )  # fmt: skip
        self._server = UvicornServer(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        with self.serving():
            await self.app(scope, receive, send)

    def has_seen_the_client_leave(self) -> bool:
        return not self._server.server_state.connections

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


class AsyncFastAPIHarness(ASGIHarness):
    drivers = ASYNC

    def make_app(self) -> None:
        self.app = app = FastAPI()
        self.plugin = plugin = session_plugin.fastapi.AsyncSessionPlugin(self.store.url, **POOL)
        plugin.init_app(app)
        app.add_middleware(ReplacingASGI, harness=self)
        self.db = plugin.database
        SessionDep = Annotated[AsyncSession, Depends(plugin.get_session)]

        async def perform(session: AsyncSession, background: BackgroundTasks) -> Any:
            act = self.act
            if act.use_session:
                await session.run_sync(act.work)
            if act.before is not None:
                background.add_task(session.run_sync, act.before)
            if act.background is not None:
                background.add_task(run_background, act, session)
            if act.error is not None:
                raise act.error
            if act.redirect:
                raise FastAPIHTTPException(302, headers={"Location": "/elsewhere"})
            if act.stream:
                return StreamingResponse(chunks(act, session), act.status, background=background)
            return JSONResponse(DONE, act.status)

        async def chunks(act: Act, session: AsyncSession) -> Any:
            for work in act.stream:
                yield b"chunk"
                await session.run_sync(work)

        async def run_background(act: Act, session: AsyncSession) -> None:
            try:
                await session.run_sync(act.background)
            finally:
                act.done.set()

        @app.api_route("/act", methods=["GET", "POST"])
        async def act(session: SessionDep, background: BackgroundTasks) -> Any:
            return await perform(session, background)

        @app.exception_handler(HandledError)
        async def handled(request: Any, error: Exception) -> Any:
            return JSONResponse({"rows": await plugin.session.run_sync(count)})

        @app.exception_handler(ConflictError)
        @app.exception_handler(IntegrityError)
        @app.exception_handler(OperationalError)
        async def conflict(request: Any, error: Exception) -> Any:
            rows = await plugin.session.run_sync(count)
            return JSONResponse({"handled": type(error).__name__, "rows": rows}, 409)


class SyncFastAPIHarness(ASGIHarness):
    drivers = ("sqlite+pysqlite", "postgresql+psycopg", "mariadb+pymysql")

    def make_app(self) -> None:
        self.app = app = FastAPI()
        self.plugin = plugin = session_plugin.fastapi.SessionPlugin(self.store.url, **POOL)
        plugin.init_app(app)
        app.add_middleware(ReplacingASGI, harness=self)
        self.db = plugin.database
        SessionDep = Annotated[Session, Depends(plugin.get_session)]

        @app.api_route("/act", methods=["GET", "POST"])
        def act(session: SessionDep, background: BackgroundTasks) -> Any:
            act = self.act
            if act.use_session:
                act.work(session)
            if act.before is not None:
                background.add_task(before_of(act, lambda work: work(session)))
            if act.background is not None:
                background.add_task(background_of(act, lambda work: work(session)))
            if act.error is not None:
                raise act.error
            if act.redirect:
                raise FastAPIHTTPException(302, headers={"Location": "/elsewhere"})
            if act.stream:
                return StreamingResponse(chunks(act, session), act.status, background=background)
            return JSONResponse(DONE, act.status)

        def chunks(act: Act, session: Session) -> Any:
            for work in act.stream:
                yield b"chunk"
                work(session)

        @app.exception_handler(HandledError)
        def handled(request: Any, error: Exception) -> Any:
            return JSONResponse({"rows": count(plugin.session)})

        @app.exception_handler(ConflictError)
        @app.exception_handler(IntegrityError)
        @app.exception_handler(OperationalError)
        def conflict(request: Any, error: Exception) -> Any:
            return JSONResponse({"handled": type(error).__name__, "rows": count(plugin.session)}, 409)


class StarletteHarness(ASGIHarness):
    """The endpoint is in a mounted app and uses the plugin's `session` attribute."""

    drivers = ("sqlite+aiosqlite", "postgresql+asyncpg")

    def make_app(self) -> None:
        plugin = session_plugin.starlette.AsyncSessionPlugin(self.store.url, **POOL)

        async def act(request: Any) -> Any:
            act = self.act
            if act.use_session:
                await plugin.session.run_sync(act.work)
            if act.error is not None:
                raise act.error
            if act.redirect:
                raise StarletteHTTPException(302, headers={"Location": "/elsewhere"})
            background = None if act.background is None else BackgroundTask(run_background, act)
            if act.before is not None:
                background = BackgroundTasks([BackgroundTask(run_before, act), background])
            if act.stream:
                return StreamingResponse(chunks(act), act.status, background=background)
            return JSONResponse(DONE, act.status, background=background)

        async def chunks(act: Act) -> Any:
            for work in act.stream:
                yield b"chunk"
                await plugin.session.run_sync(work)

        async def run_before(act: Act) -> None:
            await plugin.session.run_sync(act.before)

        async def run_background(act: Act) -> None:
            try:
                await plugin.session.run_sync(act.background)
            finally:
                act.done.set()

        async def handled(request: Any, error: Exception) -> Any:
            return JSONResponse({"rows": await plugin.session.run_sync(count)})

        async def conflict(request: Any, error: Exception) -> Any:
            rows = await plugin.session.run_sync(count)
            return JSONResponse({"handled": type(error).__name__, "rows": rows}, 409)

        handlers: Any = {HandledError: handled}
        handlers |= dict.fromkeys((ConflictError, IntegrityError, OperationalError), conflict)
        inner = Starlette(routes=[Route("/act", act, methods=["GET", "POST"])], exception_handlers=handlers)
        self.app = Starlette(routes=[Mount("/", inner)], exception_handlers=handlers)
        plugin.init_app(self.app, pool_size=5)
        self.app.add_middleware(ReplacingASGI, harness=self)
        self.plugin = plugin
        self.db = plugin.database


class PlainASGIHarness(ASGIHarness):
    drivers = ("sqlite+aiosqlite", "postgresql+psycopg", "postgresql+asyncpg")
    answers_failed_commits = False
    shows_background_callables = False

    def make_app(self) -> None:
        self.db = db = session_plugin.AsyncDatabase(self.store.url, **POOL)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                await lifespan(receive, send)
                return
            act = self.act
            status, headers, body = act.status, [], json.dumps(DONE).encode()
            try:
                if act.use_session:
                    await db.session.run_sync(act.work)
                if act.error is not None:
                    raise act.error
            except ConflictError as error:
                await db.session.rollback()
                rows = await db.session.run_sync(count)
                status, body = 409, json.dumps({"handled": type(error).__name__, "rows": rows}).encode()
            if act.redirect:
                status, headers = 302, [(b"location", b"/elsewhere")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            if act.stream:
                for work in act.stream:
                    await send({"type": "http.response.body", "body": b"chunk", "more_body": True})
                    await db.session.run_sync(work)
                body = b""
            await send({"type": "http.response.body", "body": body})
            if act.background is not None:
                try:
                    await db.session.run_sync(act.background)
                finally:
                    act.done.set()

        inner = session_plugin.asgi.SessionScopeMiddleware(app, db)
        self.app = session_plugin.asgi.SessionScopeMiddleware(ReplacingASGI(inner, self), db)


async def lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
