"""A loopback proxy between an app and its database, which counts round trips and can delay each direction.

A round trip begins when the client sends data after the server has: all messages that the client sends
before a response arrives belong to one round trip.
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
    """The proxy, in a separate process in front of a URL's database."""

    def __init__(self, url: str, delay: float = 0.0) -> None:
        from sqlalchemy import make_url  # the proxy's process does not need SQLAlchemy

        target = make_url(url)
        command = [sys.executable, "-m", "bench.proxy", str(target.host), str(target.port), str(delay)]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        self.url = target.set(port=self._read_number()).render_as_string(hide_password=False)

    def count(self) -> int:
        """Return the number of round trips since the last call."""
        assert self._process.stdin is not None
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        return self._read_number()

    def _read_number(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.communicate()


class Exchange:
    """One connection through the proxy, and the side that sent data last."""

    trips = 0
    """The number of round trips of all connections."""

    def __init__(self) -> None:
        self.client_speaks = False

    def spoken(self, *, by_client: bool) -> None:
        """Record which side has sent data."""
        if by_client and not self.client_speaks:
            Exchange.trips += 1
        self.client_speaks = by_client


class Side(asyncio.Protocol):
    """One of the two sockets of a connection; it forwards what it receives to the other one, after the delay."""

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
        """Forward the oldest data if both sides are connected."""
        if self.other is None:
            return
        if self._on_its_way:
            self.other.transport.write(self._on_its_way.popleft())

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


async def serve(host: str, port: int, delay: float) -> None:
    """Run the proxy; for each line of standard input, print the round trips since the last one."""
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
    requests = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    reported = 0
    while await requests.readline():
        print(Exchange.trips - reported, flush=True)
        reported = Exchange.trips


if __name__ == "__main__":
    # the default selector rounds a delay up to whole milliseconds; select(2) does not
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
