"""A load generator in a separate process, whose connections send the next request when a response has arrived.

It reads one job per line of standard input, and writes the results as one line.  Responses need a Content-Length.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 4.0
"""The number of seconds to wait for outstanding responses at the end."""

SLOW_BYTES = 512
SLOW_PAUSE = 0.05
"""The number of seconds between two reads of `SLOW_BYTES` by a slow client."""


class LoadGenerator:
    """The process of the load generator, for as long as the context is entered."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.load"]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def run(self, **job: Any) -> dict[str, Any]:
        """Run `load` with ``job`` in the process, and return its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        return result

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.communicate()


class Record:
    """The results of all connections of one job."""

    def __init__(self, seconds: float, warm_up: float) -> None:
        self.begin = time.perf_counter() + warm_up
        self.end = self.begin + seconds
        self.latencies: list[float] = []
        self.responses = 0
        self.in_time = 0
        self.failed = 0

    def note(self, sent: float, now: float, *, ok: bool) -> None:
        """Record one response, unless it arrived during the warm-up."""
        self.responses += 1
        if now < self.begin:
            return
        self.latencies.append(now - sent)
        if not ok:
            self.failed += 1
        elif now <= self.end:
            self.in_time += 1


class Connection(asyncio.Protocol):
    """One connection, which sends further requests if the server keeps it alive."""

    def __init__(self, request: bytes, record: Record, open_again: Any) -> None:
        self._request = request
        self._record = record
        self._open_again = open_again
        self._received = b""
        self._sent: float | None = None
        self.transport: Any = None
        self.finished = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._send(time.perf_counter())

    def _send(self, now: float) -> None:
        if now >= self._record.end:
            self._finish()
            return
        self._sent = now
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        head = head.lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        now = time.perf_counter()
        assert self._sent is not None
        self._record.note(self._sent, now, ok=head[9:10] == b"2")
        self._received, self._sent = b"", None
        if b"connection: close" not in head:
            self._send(now)

    def connection_lost(self, exc: Exception | None) -> None:
        now = time.perf_counter()
        if self._sent is not None:
            self._record.note(self._sent, now, ok=False)
        if now < self._record.end and not self.finished.done():
            self._open_again(self.finished)
        else:
            self._finish()

    def _finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)
        self.transport.close()


async def load(
    port: int, method: str, path: str, connections: int, seconds: float, warm_up: float = 0.3, slow: int = 0
) -> dict[str, Any]:
    """Measure requests per second, latencies in seconds, and this process's share of a CPU core.

    At the same time, ``slow`` clients read a streamed body slowly.
    """
    loop = asyncio.get_running_loop()
    request = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\n\r\n".encode()
    tasks: set[asyncio.Task[Any]] = set()

    async def connect(finished: asyncio.Future[None] | None = None) -> asyncio.Future[None]:
        _, connection = await loop.create_connection(lambda: Connection(request, record, open_again), "127.0.0.1", port)
        if finished is not None:
            connection.finished = finished
        return connection.finished

    def open_again(finished: asyncio.Future[None]) -> None:
        task = loop.create_task(connect(finished))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async with SlowReaders(port, slow):
        record = Record(seconds, warm_up)
        cpu, wall = time.process_time(), time.perf_counter()
        finished = await asyncio.gather(*(connect() for _ in range(connections)))
        _, unfinished = await asyncio.wait(finished, timeout=warm_up + seconds + GRACE)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    latencies = sorted(record.latencies)
    return {
        "per_second": record.in_time / seconds,
        "responses": record.responses,
        "answered": len(latencies),
        "failed": record.failed,
        "unanswered": len(unfinished),
        "p50": _percentile(latencies, len(unfinished), 0.50),
        "p99": _percentile(latencies, len(unfinished), 0.99),
        "generator": cpu / wall,
    }


def _percentile(ordered: list[float], unanswered: int, share: float) -> float | None:
    """The latency at ``share``, or None if that request got no response."""
    place = int((len(ordered) + unanswered) * share)
    return ordered[place] if place < len(ordered) else None


class SlowReaders:
    """Clients that read the streamed body slowly until the context ends."""

    def __init__(self, port: int, count: int) -> None:
        self._port = port
        self._first_bytes = [asyncio.Event() for _ in range(count)]

    async def __aenter__(self) -> None:
        """Start the clients, and wait for the first byte of each, or for one second."""
        self._tasks = [asyncio.create_task(self._read(event)) for event in self._first_bytes]
        waiting = [asyncio.create_task(event.wait()) for event in self._first_bytes]
        if waiting:
            _, unanswered = await asyncio.wait(waiting, timeout=1)
            for task in unanswered:
                task.cancel()

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, answered: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as sock, suppress(ConnectionError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", self._port))
            await loop.sock_sendall(sock, f"GET /stream/1 HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n\r\n".encode())
            while True:
                if not await loop.sock_recv(sock, SLOW_BYTES):
                    return
                answered.set()
                await asyncio.sleep(SLOW_PAUSE)


def main() -> None:
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        for line in sys.stdin:
            print(json.dumps(runner.run(load(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
