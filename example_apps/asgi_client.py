"""Runs an ASGI app message by message, as a server does, and returns what a client would receive."""

import asyncio
import json
from contextlib import suppress
from urllib.parse import urlsplit

from .ledger_promises import Client, Reply


class ASGIClient(Client):
    """Starts the app when it is entered, and stops it when it is left."""

    def __init__(self, app, run, session):
        self.app = app
        self.session = session
        self.run = run
        self._to_app = asyncio.Queue()
        self._from_app = asyncio.Queue()

    def __enter__(self):
        self.run(self._lifespan("startup"))
        return self

    def __exit__(self, *exc_info):
        self.run(self._lifespan("shutdown"))

    async def _lifespan(self, phase):
        if phase == "startup":
            scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
            self._life = asyncio.create_task(self.app(scope, self._to_app.get, self._from_app.put))
        await self._to_app.put({"type": f"lifespan.{phase}"})
        message = await self._from_app.get()
        assert message == {"type": f"lifespan.{phase}.complete"}
        if phase == "shutdown":
            await self._life

    def send(self, method, path, body=None, *, leave=False):
        return self.run(self._send(method, path, body, leave))

    async def _send(self, method, path, body, leave):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": urlsplit(path).path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        requests = [{"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}]
        left, started, chunks = asyncio.Event(), [], []

        async def receive():
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                started.append(message["status"])
            elif not left.is_set():
                chunks.append(message)
                if leave:
                    left.set()

        with suppress(Exception):  # a server logs the error and closes the connection; the client sees nothing else
            await self.app(scope, receive, send)
        complete = not chunks[-1].get("more_body", False)
        return Reply(started[0], b"".join(chunk["body"] for chunk in chunks).decode(), complete)
