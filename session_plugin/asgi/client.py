"""`Client`: has the client left, and could it take a response for complete before its last byte?"""

from __future__ import annotations

import asyncio

from .types import Message, Receive


class Client:
    """The client of one ASGI connection, as far as its messages and the server's show it.

    Attributes:
        start: the message that has started the response to an HTTP request; empty before.
    """

    _receiving: int = 0
    _left: bool = False
    _missing: int | None = None
    _held: Message | None = None

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._asked_ahead: asyncio.Future[Message] | None = None
        self.start: Message = {}
        self._streams: bool = False

    def close(self) -> None:
        """Stop listening."""
        if self._asked_ahead is not None:
            self._asked_ahead.cancel()

    def hold_back(self, message: Message) -> Message | None:
        """Return what may be sent now: what would complete a body of declared length is held back until the end.

        A client that has counted its bytes takes the response for complete, whatever happens after that.
        """
        if message["type"] == "http.response.start":
            self.start = message
        elif message["type"] == "http.response.body" and (self._streams or message.get("more_body", False)):
            return self._hold_back_stream(message)
        return message

    def _hold_back_stream(self, message: Message) -> Message | None:
        if not self._streams:
            self._streams = True
            self._missing = _content_length(self.start)
        if self._missing is None:
            return message
        body = message.get("body", b"")
        self._missing -= len(body)
        if self._held is not None:
            message = {**message, "body": self._held["body"] + body}
        if self._missing <= 0 and message.get("body") and message.get("more_body", False):
            self._held = message
            return None
        return message

    async def receive(self) -> Message:
        """Pass a message of the client on to the app, and note whether the client has left."""
        self._receiving += 1
        try:
            if self._asked_ahead is not None:
                asked_ahead, self._asked_ahead = self._asked_ahead, None
                message = await asked_ahead
            else:
                message = await self._receive()
        finally:
            self._receiving -= 1
        self._left = self._left or message["type"] == "http.disconnect"
        return message

    async def has_left(self) -> bool:
        """Return True if the server knows by now that the client has disconnected.

        No server reports that when a chunk is sent, so one message is asked for ahead, unless the app
        itself is listening; the app's next ``receive()`` gets it.
        """
        if not self._left and not self._receiving and self._asked_ahead is None:
            self._asked_ahead = asyncio.ensure_future(self._receive())
        await asyncio.sleep(0)
        ahead = self._asked_ahead
        if ahead is not None and ahead.done() and ahead.exception() is None:
            self._left = ahead.result()["type"] == "http.disconnect"
        return self._left


def _content_length(start: Message) -> int | None:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-length" and value.isdigit():
            return int(value)
    return None
