"""`Client`, which decides what is sent to an ASGI server, and when."""

from __future__ import annotations

from typing import Any

import pytest

from session_plugin.asgi.client import Client

PUSH = {"type": "http.response.push", "path": "/style.css", "headers": []}


def start(*headers: tuple[bytes, bytes]) -> Any:
    return {"type": "http.response.start", "status": 200, "headers": headers}


def body(chunk: bytes, **more: bool) -> Any:
    return {"type": "http.response.body", "body": chunk, **more}


def length(value: bytes) -> tuple[bytes, bytes]:
    return b"Content-Length", value


A, B, C = (body(chunk, more_body=True) for chunk in (b"a", b"b", b"c"))
NOTHING, END = body(b"", more_body=True), body(b"")


@pytest.mark.parametrize(
    ("messages", "sent"),
    [
        ([start(length(b"2")), A, B, END], [start(length(b"2")), A, body(b"b")]),
        ([start(length(b"2")), A, body(b"b")], [start(length(b"2")), A, body(b"b")]),
        ([start((b"x", b"1"), length(b"2")), A, B], [start((b"x", b"1"), length(b"2")), A]),
        ([start(length(b"1")), A, B, NOTHING, C, END], [start(length(b"1")), body(b"abc")]),
        ([start(length(b"1")), A, PUSH, END], [start(length(b"1")), PUSH, body(b"a")]),
    ],
    ids=["the last", "the last with content", "another header", "more than declared", "a push"],
)
def test_the_chunk_that_completes_a_body_is_held_back(messages: list[Any], sent: list[Any]) -> None:
    """The chunk that completes a body, according to Content-Length, is held back until the app ends the body."""
    assert sent_of(messages) == sent


@pytest.mark.parametrize(
    "messages",
    [
        [start(), A, B, END],
        [start(length(b"two")), A, B, END],
        [start(length(b"0")), NOTHING, END],
        [start(length(b"1")), body(b"a")],
        [A],
    ],
    ids=["no length", "an invalid length", "a length of 0", "at once", "no start"],
)
def test_other_messages_are_passed_on_at_once(messages: list[Any]) -> None:
    """All other messages are passed on at once."""
    assert sent_of(messages) == messages


def sent_of(messages: list[Any]) -> list[Any]:
    """The messages that the server receives when the app sends ``messages``."""

    async def receive() -> Any:
        raise AssertionError

    client = Client(receive)
    return [due for message in messages if (due := client.hold_back(message)) is not None]
