"""Throwaway database servers, started from the machine's own programs on free loopback ports."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import cached_property
from pathlib import Path
from uuid import uuid4

from sqlalchemy import create_engine, make_url, text

POSTGRESQL_URL = "SESSION_PLUGIN_TEST_POSTGRESQL"
"""Names the environment variable with the URL of a server to use instead of a throwaway one."""


class NotInstalled(Exception):
    """The programs of a server are not on this machine."""


class PostgreSQL:
    """A PostgreSQL server; each `new_database` is empty."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        given = os.environ.get(POSTGRESQL_URL)
        self._base = make_url(given) if given else self._start()
        self._admin = create_engine(self._base.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")

    @cached_property
    def shared_database(self) -> str:
        """A database that the tests use one after the other."""
        return self.new_database()

    def new_database(self) -> str:
        """Create an empty database; answers its name."""
        name = f"t{uuid4().hex[:16]}"
        with self._admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        return name

    def url(self, driver: str, database: str | None = None) -> str:
        """The URL of ``database``, or of an empty one, for a driver such as ``"psycopg"``."""
        url = self._base.set(drivername=f"postgresql+{driver}", database=database or self.new_database())
        return url.render_as_string(hide_password=False)

    def drop(self, database: str) -> None:
        """Drop a database and whoever is connected to it."""
        with self._admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {database} WITH (FORCE)"))

    def stop(self) -> None:
        """End the server, if it was started here."""
        self._admin.dispose()
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self):  # type: ignore[no-untyped-def]
        programs = _postgresql_programs()
        self._folder = Path(tempfile.mkdtemp(prefix="session_plugin-pg-"))
        data = self._folder / "data"
        user = _unprivileged_user()
        if user is not None:
            os.chown(self._folder, user.pw_uid, user.pw_gid)
        run = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        log = open(self._folder / "log", "wb")
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"],
            check=True, stdout=log, stderr=log, cwd=self._folder, **run,
        )  # fmt: skip
        port = free_port()
        settings = {
            "port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
            "max_prepared_transactions": 20, "max_connections": 200, "fsync": "off",
        }  # fmt: skip
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = subprocess.Popen(
            [programs / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=self._folder, **run
        )
        log.close()
        url = make_url(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres")
        _wait_for(url, self._process, self._folder / "log")
        return url


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _postgresql_programs() -> Path:
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).parent
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise NotInstalled("PostgreSQL (initdb)")
    return found[-1].parent


def _unprivileged_user() -> pwd.struct_passwd | None:
    """The user that the server runs as when the tests run as root, which it refuses."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _wait_for(url, process, log: Path) -> None:  # type: ignore[no-untyped-def]
    engine = create_engine(url)
    try:
        for _ in range(300):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()}")
            try:
                engine.connect().close()
            except Exception:
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"the server did not come up: {log.read_text()}")
    finally:
        engine.dispose()
