"""Throwaway database servers, started from installed programs on free loopback ports."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool


class NotInstalled(Exception):
    """The programs of a server are not installed on this machine."""


class Server:
    """A database server; each database from `new_database` is empty.

    A subclass defines the commands that create a data folder and serve it.
    """

    name: str
    owner: str
    """The user that runs the server if the tests run as root, because the server refuses to run as root."""
    end_at_once: signal.Signals
    """The signal that ends the server without saving anything; its folder is removed anyway."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        given = os.environ.get(f"SESSION_PLUGIN_TEST_{self.name.upper()}")  # the URL of a running server
        self._base = make_url(given) if given else self._start()
        self.admin = create_engine(self._base, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    @cached_property
    def shared_database(self) -> str:
        """A database that tests use one after the other."""
        return self.new_database()

    def new_database(self) -> str:
        """Create an empty database and return its name."""
        name = f"t{uuid4().hex[:16]}"
        with self.admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        return name

    @property
    def base_url(self) -> str:
        """The value of ``SESSION_PLUGIN_TEST_...`` for processes that share this server."""
        return self._base.render_as_string(hide_password=False)

    def url(self, driver: str, database: str | None = None) -> str:
        """The URL of ``database``, or of a new one, for a driver such as ``"psycopg"``."""
        url = self._base.set(drivername=f"{self.name}+{driver}", database=database or self.new_database())
        return url.render_as_string(hide_password=False)

    def admin_url(self, database: str) -> str:
        """The URL with which the tests themselves inspect ``database``."""
        return self._base.set(database=database).render_as_string(hide_password=False)

    def stop(self) -> None:
        """Stop the server if it was started here."""
        if self._process is not None:
            self._process.send_signal(self.end_at_once)
            self._process.wait(30)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> URL:
        self._folder = folder = _new_folder(self.name)
        run = _as_unprivileged(folder, self.owner)
        port = free_port()
        make, serve = self._commands(folder / "data", port)
        url = self._url(port)
        try:
            with open(folder / "log", "wb") as log:
                subprocess.run(make, check=True, stdout=log, stderr=log, cwd=folder, **run)
                serve = [*_ending_with_us(self.end_at_once), *serve]
                self._process = subprocess.Popen(serve, stdout=log, stderr=log, cwd=folder, **run)
            _wait_for(url, self._process, folder / "log")
        except BaseException:  # such as a Ctrl-C
            self.stop()
            raise
        return url

    def _commands(self, data: Path, port: int) -> tuple[list[Any], list[Any]]:
        raise NotImplementedError

    def _url(self, port: int) -> URL:
        raise NotImplementedError


class PostgreSQL(Server):
    name = "postgresql"
    owner = "postgres"
    end_at_once = signal.SIGQUIT

    def drop(self, database: str) -> None:
        """Drop a database, and terminate the connections to it."""
        with self.admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {database} WITH (FORCE)"))

    def _commands(self, data: Path, port: int) -> tuple[list[Any], list[Any]]:
        programs = _postgresql_programs()
        settings = {
            "port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "",
            "max_prepared_transactions": 20, "max_connections": 200, "fsync": "off",
        }  # fmt: skip
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        make = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8"]
        return make, [programs / "postgres", "-D", data, *options]

    def _url(self, port: int) -> URL:
        return make_url(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres")


class MariaDB(Server):
    """A MariaDB server.  The tests inspect it as an administrator; `url` contains a user without these privileges."""

    name = "mariadb"
    owner = "mysql"
    end_at_once = signal.SIGKILL

    @cached_property
    def _granted(self) -> set[str]:
        return set()

    def url(self, driver: str, database: str | None = None) -> str:
        database = database or self.new_database()
        if database not in self._granted:
            with self.admin.connect() as connection:
                connection.execute(text(f"GRANT ALL ON {database}.* TO app@'%' IDENTIFIED BY 'app'"))
            self._granted.add(database)
        url = self._base.set(drivername=f"mariadb+{driver}", database=database, username="app", password="app")
        if driver != "pymysql":
            url = url.difference_update_query(["ssl_disabled"])
        return url.render_as_string(hide_password=False)

    def _commands(self, data: Path, port: int) -> tuple[list[Any], list[Any]]:
        make, serve = shutil.which("mariadb-install-db"), _program("mariadbd")
        if not make or not serve:
            raise NotInstalled("MariaDB (mariadbd)")
        # when it starts, it removes old temporary tables from tmpdir; in /tmp, these belong to another run's server
        common = ["--no-defaults", f"--datadir={data}", f"--tmpdir={data.parent}"]
        options = [
            f"--port={port}", "--bind-address=127.0.0.1", f"--socket={data.parent / 'socket'}", "--max-connections=200",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=1", "--innodb-rollback-on-timeout=ON",
            "--skip-name-resolve",
        ]  # fmt: skip
        return [make, *common, "--auth-root-authentication-method=normal", "--skip-test-db"], [serve, *common, *options]

    def _url(self, port: int) -> URL:
        # else each connection reads all of the certificates of the machine, fifty times the work of the rest of it
        return make_url(f"mariadb+pymysql://root@127.0.0.1:{port}/mysql?ssl_disabled=true")


class PgBouncer:
    """A PgBouncer in transaction mode in front of ``postgresql``.

    It has two server connections for each database, and does not ask clients for a password.
    """

    SERVER_CONNECTIONS = 2

    def __init__(self, postgresql: PostgreSQL) -> None:
        program = _required_program("pgbouncer")
        self._folder = _new_folder("pgbouncer")
        run = _as_unprivileged(self._folder, "postgres")
        port = free_port()
        target = make_url(postgresql.url("psycopg", "postgres"))
        server = {"host": target.host, "port": target.port, "user": target.username, "password": target.password}
        settings = {
            "listen_addr": "127.0.0.1", "listen_port": port, "unix_socket_dir": "", "auth_type": "any",
            "pool_mode": "transaction", "default_pool_size": self.SERVER_CONNECTIONS, "max_client_conn": 200,
        }  # fmt: skip
        (self._folder / "pgbouncer.ini").write_text(
            f"[databases]\n* = {_settings(server, ' ')}\n[pgbouncer]\n{_settings(settings, chr(10))}\n"
        )
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [*_ending_with_us(signal.SIGKILL), program, "pgbouncer.ini"],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **run,
            )
        self._base = target.set(host="127.0.0.1", port=port, password=None)
        _wait_for(self._base, self._process, self._folder / "log")

    def url(self, driver: str, database: str) -> str:
        """The URL of ``database`` through PgBouncer."""
        return self._base.set(drivername=f"postgresql+{driver}", database=database).render_as_string()

    def stop(self) -> None:
        """Stop PgBouncer."""
        self._process.kill()  # it stores nothing, and must not wait for clients
        self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)


class Redis:
    """A Redis server that stores nothing on disk."""

    def __init__(self) -> None:
        program = _required_program("redis-server")
        self._folder = _new_folder("redis")
        run = _as_unprivileged(self._folder, "redis")
        port = free_port()
        settings = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no"}
        options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        with open(self._folder / "log", "wb") as log:
            serve = [*_ending_with_us(signal.SIGKILL), program, *options]
            self._process = subprocess.Popen(serve, stdout=log, stderr=log, cwd=self._folder, **run)
        self.url = f"redis://127.0.0.1:{port}/0"
        _wait_until(lambda: socket.create_connection(("127.0.0.1", port)).close(), self._process, self._folder / "log")

    def stop(self) -> None:
        """Stop Redis."""
        self._process.kill()  # it stores nothing, and must not wait for clients
        self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)


def free_port() -> int:
    """A loopback port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _new_folder(server: str) -> Path:
    """An empty folder with our process in its name; those of processes that were killed are removed."""
    for folder in Path(tempfile.gettempdir()).glob("session_plugin-*-*-*"):
        pid = folder.name.split("-")[2]
        if Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"session_plugin-{server}-{os.getpid()}-"))


def _postgresql_programs() -> Path:
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).parent
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise NotInstalled("PostgreSQL (initdb)")
    return found[-1].parent


def _program(name: str) -> str | None:
    """The path of a program; servers are often installed in a folder that is only on root's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin")


def _required_program(name: str) -> str:
    program = _program(name)
    if program is None:
        raise NotInstalled(name)
    return program


def _ending_with_us(number: signal.Signals) -> list[str]:
    """What a command begins with that gets this signal when our process is gone, even if it was killed."""
    program = shutil.which("setpriv")  # Linux has it
    return [program, "--pdeathsig", number.name.removeprefix("SIG")] if program else []


def _settings(values: dict[str, object], separator: str) -> str:
    return separator.join(f"{name}={value}" for name, value in values.items() if value is not None)


def _as_unprivileged(folder: Path, owner: str) -> dict[str, Any]:
    """The `subprocess` options for a server that may refuse to run as root and that keeps its files in ``folder``."""
    user = _unprivileged_user(owner)
    if user is None:
        return {}
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _unprivileged_user(name: str) -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return pwd.getpwnam("nobody")


def _wait_for(url, process, log: Path) -> None:  # type: ignore[no-untyped-def]
    engine = create_engine(url)
    try:
        _wait_until(lambda: engine.connect().close(), process, log)
    finally:
        engine.dispose()


def _wait_until(connect: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()}")
        try:
            connect()
        except Exception:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the server did not come up: {log.read_text()}")
