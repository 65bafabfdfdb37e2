"""`leave_midstream`: clients that disconnect in the middle of a response."""

from __future__ import annotations

import asyncio
import io
import json as json_module
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit
from wsgiref.util import setup_testing_defaults


@dataclass(frozen=True)
class Left:
    """What a client had received when it disconnected.

    Attributes:
        status: of the response.
        body: as far as it was read.
    """

    status: int
    body: bytes


def leave_midstream(
    app: Any, method: str, path: str, *, json: Any = None, headers: Mapping[str, str] | None = None, chunks: int = 1
) -> Left:
    """Make a request of a WSGI app, read ``chunks`` chunks of its body, and disconnect.

    Args:
        app: the app, such as a Flask app.
        method: the HTTP method.
        path: with its query.
        json: the body of the request, or None for an empty one.
        headers: of the request.
        chunks: how many to read.
    """
    url, body = urlsplit(path), _body(json)
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(url.path),
        "QUERY_STRING": url.query,
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (headers or {}).items()},
    }
    setup_testing_defaults(environ)
    started: list[str] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        started.append(status)

    response: Iterable[bytes] = app(environ, start_response)
    read = b""
    try:
        for _, chunk in zip(range(chunks), response, strict=False):  # in this order, no chunk too many is read
            read += chunk
    finally:
        getattr(response, "close", lambda: None)()
    return Left(int(started[-1].split()[0]), read)


async def aleave_midstream(
    app: Any, method: str, path: str, *, json: Any = None, headers: Mapping[str, str] | None = None, chunks: int = 1
) -> Left:
    """As `leave_midstream`, for an ASGI app; its lifespan is not run."""
    url, gone, status, read = urlsplit(path), asyncio.Event(), 0, b""
    left_to_read = chunks
    sent = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(url.path),
        "raw_path": url.path.encode(),
        "query_string": url.query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }
    requests = [{"type": "http.request", "body": _body(json), "more_body": False}]

    async def receive() -> Any:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, read, left_to_read
        if message["type"] == "http.response.start":
            status = message["status"]
        elif left_to_read:
            left_to_read -= 1
            read += message.get("body", b"")
            if not left_to_read:
                gone.set()

    await app(scope, receive, send)
    return Left(status, read)


def _body(json: Any) -> bytes:
    return b"" if json is None else json_module.dumps(json).encode()
