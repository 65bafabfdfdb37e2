"""The servers of all contenders of one kind, which run at the same time and are used in turn."""

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
"""The number of seconds after which a request without a connection fails."""


class Server:
    """The server of one contender."""

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
        """Wait until a read succeeds.

        Raises:
            RuntimeError: no read succeeds in time.
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
        """Wait until the requests of an earlier load have ended; if that takes too long, restart the server."""
        try:
            self.wait(POOL_TIMEOUT + 2)
        except RuntimeError:
            self.stop()
            self._start()
            self.wait()

    def cpu_seconds(self) -> float | None:
        """The CPU time that the server's processes have used, or None if the system does not report it."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self._process.pid:  # the process belongs to the server's session
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else None

    def stop(self) -> None:
        """Kill the server's processes."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(10)
        self._log.close()


class Fleet:
    """The servers of several contenders; entering the context waits until all of them respond."""

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
