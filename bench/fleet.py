"""The servers of one kind's contenders, all up at once and used in turn."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.servers import free_port

from .contenders import Contender

POOL_TIMEOUT = 3.0
"""Seconds after which a request that gets no connection fails."""


class Server:
    """One contender's server."""

    def __init__(self, contender: Contender, url: str) -> None:
        self.contender = contender
        self._url = url
        self._start()

    def _start(self) -> None:
        self.port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop()
        command = [
            sys.executable,
            "-m",
            "bench.serve",
            self.contender.key,
            self._url,
            str(self.port),
            str(POOL_TIMEOUT),
        ]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, cwd=root, start_new_session=True)

    def wait(self, seconds: float = 30) -> None:
        """Until a read is answered.

        Raises:
            RuntimeError: it is not in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
            try:
                connection.request("GET", "/items/1")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.05)
        self._log.seek(0)
        raise RuntimeError(f"{self.contender.key} does not serve: {self._log.read().decode()[-4000:]}")

    def recover(self) -> None:
        """Until nothing of an earlier load is in the way of the next one; if that takes long, start anew."""
        try:
            self.wait(POOL_TIMEOUT + 2)
        except RuntimeError:
            self.stop()
            self._start()
            self.wait()

    def cpu_seconds(self) -> float | None:
        """CPU time of the server's processes so far, or None where Linux does not say."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self._process.pid:  # its session
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else None

    def stop(self) -> None:
        """End its processes."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(10)
        self._log.close()


class Fleet:
    """Servers of several contenders; entering waits until all are up."""

    def __init__(self, contenders: list[Contender], url: str) -> None:
        self.servers = [Server(each, url) for each in contenders]

    def __enter__(self) -> list[Server]:
        try:
            for server in self.servers:
                server.wait()
        except BaseException:
            self.__exit__()
            raise
        return self.servers

    def __exit__(self, *exc_info: Any) -> None:
        for server in self.servers:
            server.stop()
