"""A proxy on loopback between an app and its database: counts round trips, and can delay each way.

A round trip begins when the client speaks after the server has: what it sends before an answer
comes is one trip, however many messages it is.
"""

from __future__ import annotations

import asyncio
import selectors
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any


class Proxy:
    """The proxy in a process of its own, in front of the database of a URL."""

    def __init__(self, url: str, delay: float = 0.0) -> None:
        from sqlalchemy import make_url  # the proxy's own process does without

        target = make_url(url)
        command = [sys.executable, "-m", "bench.proxy", str(target.host), str(target.port), str(delay)]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        self.url = target.set(port=self._answer()).render_as_string(hide_password=False)

    def count(self) -> int:
        """The round trips since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.communicate()


class Exchange:
    """One connection through the proxy, and whose turn it is."""

    trips = 0
    """Of all connections."""

    def __init__(self) -> None:
        self.client_speaks = False

    def spoken(self, *, by_client: bool) -> None:
        """Note who has sent something."""
        if by_client and not self.client_speaks:
            Exchange.trips += 1
        self.client_speaks = by_client


class Side(asyncio.Protocol):
    """One of the two sockets of a connection: what it receives goes out of the other, later."""

    def __init__(self, exchange: Exchange, delay: float, *, is_client: bool) -> None:
        self._exchange = exchange
        self._delay = delay
        self._is_client = is_client
        self._on_its_way: deque[bytes] = deque()
        self.transport: Any = None
        self.other: Side | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._exchange.spoken(by_client=self._is_client)
        self._on_its_way.append(data)
        if self._delay:
            asyncio.get_running_loop().call_later(self._delay, self.pass_on)
        else:
            self.pass_on()

    def pass_on(self) -> None:
        """Send what came first, once both sides are connected."""
        if self.other is None:
            return
        if self._on_its_way:
            self.other.transport.write(self._on_its_way.popleft())

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


async def serve(host: str, port: int, delay: float) -> None:
    """Serve, answering each line of standard input with the round trips since the last one."""
    loop = asyncio.get_running_loop()
    connecting: set[asyncio.Task[None]] = set()

    async def connect(client: Side, exchange: Exchange) -> None:
        _, server = await loop.create_connection(lambda: Side(exchange, delay, is_client=False), host, port)
        client.other, server.other = server, client
        while client._on_its_way:
            client.pass_on()

    def accept() -> Side:
        exchange = Exchange()
        client = Side(exchange, delay, is_client=True)
        task = loop.create_task(connect(client, exchange))
        connecting.add(task)
        task.add_done_callback(connecting.discard)
        return client

    listener = await loop.create_server(accept, "127.0.0.1", 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    questions = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    answered = 0
    while await questions.readline():
        print(Exchange.trips - answered, flush=True)
        answered = Exchange.trips


if __name__ == "__main__":
    # The default selector rounds a delay up to whole milliseconds; select(2) does not.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
