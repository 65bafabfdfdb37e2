"""The promises on real servers: over a socket, during a shutdown under load, and across forks."""

from __future__ import annotations

import http.client
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import make_url, text

from .harness import Reply, Store, wait_for
from .server_site import DATABASE, KEY, SITE
from .servers import free_port

ROOT = Path(__file__).parent.parent
CLIENTS = 6
US = "tests"
"""The application_name of the tests' own connections, which distinguishes them from those of the servers."""
OURS = re.compile(r"session_plugin:|while still open|non-checked-in|never awaited|SAWarning|Traceback|asyncpg|psycopg")
"""What a log must not contain while a server shuts down; sockets that a server itself leaves open are ignored."""

CROWD = 200


@dataclass(frozen=True)
class Kind:
    """A server, the site it serves, and how it differs from other servers.

    Attributes:
        command: the name and the arguments of the server; ``{port}`` stands for the port.
        stop: the signal that requests a graceful shutdown.
        code: its exit code after that.
        cuts_streams: False if a failed stream looks complete to its clients.
        runs_exit_functions: False if processes skip Python's exit functions; `multiprocessing` runs them from 3.13 on.
    """

    command: str
    site: str
    driver: str = "psycopg"
    stop: signal.Signals = signal.SIGTERM
    code: int = 0
    cuts_streams: bool = True
    runs_exit_functions: bool = True

    def command_line(self, port: int) -> list[str]:
        """The command for a free port; uWSGI is a program that contains Python, the others are modules."""
        name, *arguments = shlex.split(self.command.format(port=port))
        if name == "uwsgi":
            return [str(Path(sys.executable).with_name(name)), *arguments]
        return [sys.executable, "-m", name, *arguments]


APP = "tests.server_site:app"
UVICORN = f"uvicorn {APP} --port {{port}} --log-level warning"
HYPERCORN = f"hypercorn {APP} --bind 127.0.0.1:{{port}} --graceful-timeout 10"
GRANIAN = f"granian {APP} --port {{port}} --log-level warning --workers-kill-timeout 10"
GUNICORN = f"gunicorn {APP} --bind 127.0.0.1:{{port}} --graceful-timeout 10 --no-control-socket"
GTHREAD = f"{GUNICORN} --worker-class gthread --threads"
GEVENT = f"{GUNICORN} --worker-class gevent"
UWSGI = f"uwsgi --module {APP} --http-socket 127.0.0.1:{{port}} --master --add-header 'Connection: close'"
GRACEFUL = "--hook-master-start 'unix_signal:15 gracefully_kill_them_all' --worker-reload-mercy 10"
WAITRESS = f"waitress --listen 127.0.0.1:{{port}} --threads 8 {APP}"

KINDS = {
    "uvicorn-asyncio": Kind(f"{UVICORN} --loop asyncio", "fastapi", "asyncpg", code=-signal.SIGTERM),
    "uvicorn-uvloop": Kind(f"{UVICORN} --loop uvloop", "fastapi", code=-signal.SIGTERM),
    "uvicorn-threads": Kind(f"{UVICORN} --loop asyncio", "fastapi-def", code=-signal.SIGTERM),
    "hypercorn": Kind(HYPERCORN, "fastapi", "asyncpg"),
    "granian-asgi": Kind(f"{GRANIAN} --interface asgi", "fastapi", "asyncpg"),
    "granian-wsgi": Kind(
        f"{GRANIAN} --interface wsgi --blocking-threads 8",
        "flask",
        cuts_streams=False,
        runs_exit_functions=sys.version_info >= (3, 13),
    ),
    "gunicorn-gthread": Kind(f"{GTHREAD} 8", "flask"),
    "gunicorn-gevent": Kind(GEVENT, "flask"),
    "gunicorn-asgi": Kind(f"{GUNICORN} --worker-class asgi --asgi-disconnect-grace-period 0", "fastapi", "asyncpg"),
    "uwsgi": Kind(f"{UWSGI} --threads 8 {GRACEFUL}", "flask", cuts_streams=False),
    "waitress": Kind(WAITRESS, "flask", stop=signal.SIGINT),
}


class Running:
    """A server in a separate process, and a separate database for it."""

    def __init__(self, kind: Kind, postgresql: Any, log: Path) -> None:
        self.kind = kind
        self._postgresql = postgresql
        self.database = postgresql.new_database()
        own_url = make_url(postgresql.admin_url(self.database)).update_query_dict({"application_name": US})
        location = SimpleNamespace(
            url=postgresql.url,
            admin_url=lambda database: own_url.render_as_string(hide_password=False),
            shared_database=self.database,
        )
        self.store = Store("postgresql+psycopg", location)
        self.environ = {
            **os.environ,
            SITE: kind.site,
            DATABASE: postgresql.url(kind.driver, self.database),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONWARNINGS": "default::ResourceWarning,default::RuntimeWarning",
        }
        self.log = log
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, unless it is running already."""
        if self.alive:
            return
        self.port = free_port()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.kind.command_line(self.port),
                stdout=log, stderr=log, cwd=ROOT, env=self.environ, start_new_session=True,
            )  # fmt: skip
        assert wait_for(self.responds, 20), self.log.read_text()

    def responds(self) -> bool:
        assert self.alive, self.log.read_text()
        try:
            return self.ask("/held", "GET").status == 200
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server's main process."""
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for the end and return the exit code; a server that does not end prints the stacks of its threads."""
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGABRT)
            self.process.wait(20)
            raise AssertionError(self.log.read_text()) from None

    def close(self) -> None:
        """Kill the server and its workers, if it is running, and drop the database."""
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own process group, created in `start`
            self.process.wait()
        self.store.engine.dispose()
        self._postgresql.drop(self.database)

    @contextmanager
    def connect(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            yield connection
        finally:
            connection.close()

    def ask(self, path: str, method: str = "POST") -> Reply:
        with self.connect() as connection:
            return ask(connection, path, method)

    def query(self, statement: str) -> list[Any]:
        with self.store.engine.connect() as connection:
            return list(connection.execute(text(statement)))

    def waiting(self) -> list[Any]:
        """The requests that wait for the lock."""
        return self.query(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    def connections(self) -> list[Any]:
        """The connections of the server's processes: process id, port, name, state and statement."""
        return self.query(
            "SELECT pid, client_port, application_name, state, query FROM pg_stat_activity "
            f"WHERE datname = current_database() AND application_name <> '{US}'"
        )

    def abandoned(self) -> int:
        """How many connections ended without a disconnect message, as PostgreSQL counts them."""
        query = "SELECT sessions_abandoned FROM pg_stat_database WHERE datname = current_database()"
        number: int = self.query(query)[0][0]
        return number

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Make the requests that ask for the lock wait, until the block ends or calls the function that it is given."""
        with self.store.engine.connect() as connection:
            connection.execute(text(f"SELECT pg_advisory_lock({KEY})"))
            connection.commit()

            def release() -> None:
                connection.execute(text("SELECT pg_advisory_unlock_all()"))
                connection.commit()

            try:
                yield release
            finally:
                release()


def ask(connection: http.client.HTTPConnection, path: str, method: str = "POST") -> Reply:
    connection.request(method, path)
    response = connection.getresponse()
    try:
        return Reply(response.status, response.read(), complete=True)
    except (http.client.IncompleteRead, ConnectionError) as error:
        return Reply(response.status, getattr(error, "partial", b""), complete=False)


def rows(*names: str) -> list[str]:
    """The rows that successful requests with these names leave."""
    return sorted(row for name in names for row in (name, f"{name}'s"))


class Client(threading.Thread):
    """Posts on one connection until the server has shut down.

    Attributes:
        statuses: the status of each request's response, or None if the response was incomplete.
        cut: True once a request received no complete response.
    """

    def __init__(self, running: Running, number: int) -> None:
        super().__init__()
        self._running = running
        self._number = number
        self.statuses: dict[str, int | None] = {}
        self.cut = False
        self.over = threading.Event()

    def run(self) -> None:
        works = itertools.cycle(["pair", "orphan", "pair", "refuse"])
        with self._running.connect() as connection:
            for turn, work in enumerate(works):
                if self.over.is_set() or not self.post(connection, f"/{work}/{work}-{self._number}-{turn}"):
                    break

    def post(self, connection: http.client.HTTPConnection, path: str) -> bool:
        """Send one request; return False if the server no longer accepts connections."""
        name = path.rpartition("/")[2]
        self.statuses[name] = None
        try:
            reply = ask(connection, path)
        except (http.client.HTTPException, OSError) as error:
            self.cut = True
            connection.close()
            return not isinstance(error, ConnectionRefusedError)
        self.statuses[name] = reply.status if reply.complete else None
        return True


@pytest.fixture(scope="class")
def running(
    request: pytest.FixtureRequest, postgresql: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    kind = request.param if isinstance(request.param, Kind) else KINDS[request.param]
    running = Running(kind, postgresql, tmp_path_factory.mktemp("server") / "log")
    yield running
    running.close()


@pytest.fixture
def server(running: Running) -> Iterator[Running]:
    """The server of the class, on an empty database; at the end of a test no connection is held."""
    running.start()
    running.store.clear()
    yield running
    if running.alive:
        assert wait_for(lambda: running.ask("/held", "GET").json["held"] == 0)
        assert wait_for(lambda: running.store.open_transactions() == [])


@pytest.mark.parametrize("running", KINDS, indirect=True)
class TestEveryServer:
    def test_responses_on_one_connection_are_true(self, server: Running) -> None:
        """For consecutive requests on one connection, a success is durable and an error response wrote nothing."""
        with server.connect() as connection:
            for turn in range(3):
                assert ask(connection, f"/pair/tea{turn}").status == 201
                assert server.store.names() == rows(*(f"tea{n}" for n in range(turn + 1)))
                reply = ask(connection, f"/orphan/milk{turn}")
                assert (reply.status, reply.json) == (409, {"handled": "IntegrityError"})
                assert ask(connection, f"/refuse/gold{turn}").status == 400
        assert server.store.names() == rows("tea0", "tea1", "tea2")

    def test_stream(self, server: Running) -> None:
        """Work during a stream is committed before the last byte; if that fails, the client gets no last byte."""
        assert server.ask("/stream/saved/tea") == Reply(201, b"chunkchunk", complete=True)
        assert server.store.names() == rows("tea", "late tea")
        reply = server.ask("/stream/lost/milk")
        assert (reply.status, reply.complete) == (201, not server.kind.cuts_streams)
        assert server.store.names() == rows("tea", "late tea", "milk")

    def test_stream_of_known_length(self, server: Running) -> None:
        """With a Content-Length, every server shows its clients that a failed stream is incomplete."""
        assert server.ask("/stream/saved/tea?length=10") == Reply(201, b"chunkchunk", complete=True)
        reply = server.ask("/stream/lost/milk?length=10")
        assert (reply.status, reply.complete) == (201, False)
        assert server.store.names() == rows("tea", "late tea", "milk")

    def test_client_that_leaves(self, server: Running) -> None:
        """If a client disconnects during a stream, its work is rolled back."""
        with server.connect() as connection:
            connection.request("POST", "/endless/tea")
            response = connection.getresponse()
            assert response.read(5) == b"chunk"
            assert server.store.open_transactions()
            response.close()  # it has taken over a connection that the server announced to close
        assert wait_for(lambda: not server.store.open_transactions())
        assert server.store.names() == []

    def test_shutdown_under_load(self, server: Running) -> None:
        """During a shutdown the database agrees with the responses that the clients received.

        A request that is being served is completed, and no connection stays open.
        """
        clients = [Client(server, number) for number in range(CLIENTS)]
        with ThreadPoolExecutor(1) as pool:
            with server.locked() as release:
                held = pool.submit(server.ask, "/hold/held")
                assert wait_for(server.waiting)
                for client in clients:
                    client.start()
                assert wait_for(lambda: all(len(client.statuses) > 8 for client in clients), 20)
                logged = len(server.log.read_text())
                server.signal(server.kind.stop)
                wait_for(lambda: any(client.cut for client in clients), 1)
                release()
            assert server.ended() == server.kind.code
            statuses = {"held": held.result().status}
        for client in clients:
            client.over.set()
            client.join()
            statuses |= client.statuses
        self.check(statuses, server)
        assert statuses["held"] == 201
        assert not OURS.search(server.log.read_text()[logged:])
        assert wait_for(lambda: server.connections() == [])
        assert (server.abandoned() == 0) == server.kind.runs_exit_functions

    def check(self, statuses: dict[str, int | None], server: Running) -> None:
        """Insist that the responses agree with the database, and that each kind of response occurred."""
        names = set(server.store.names())
        saved = {name for name in statuses if name in names}
        assert names == {*rows(*saved)}
        assert {name for name, status in statuses.items() if status == 201} <= saved
        assert {statuses[name] for name in saved} <= {201, None}
        assert {201, 400, 409} <= {*statuses.values()} <= {201, 400, 409, 500, 503, None}


AT_ONCE = {
    "waitress": Kind(WAITRESS, "flask", stop=signal.SIGTERM, code=-signal.SIGTERM),
    "uwsgi": Kind(f"{UWSGI} --threads 8 --die-on-term", "flask"),
}


@pytest.mark.parametrize("running", AT_ONCE.values(), indirect=True, ids=AT_ONCE)
class TestEndAtOnce:
    def test_request_in_progress(self, server: Running) -> None:
        """On a signal that ends the server at once, a request in progress gets no response and writes nothing."""
        with server.locked(), ThreadPoolExecutor(1) as pool:
            held = pool.submit(server.ask, "/hold/held")
            assert wait_for(server.waiting)
            server.signal(server.kind.stop)
            with pytest.raises(http.client.RemoteDisconnected):
                held.result()
        assert server.ended() == server.kind.code
        assert wait_for(lambda: server.connections() == [])
        assert server.store.names() == []


def look_at_once(server: Running, names: list[str], waiting: int) -> list[Any]:
    """What simultaneous requests see, of which ``waiting`` wait for the lock in the database."""
    with ThreadPoolExecutor(len(names)) as pool:
        with server.locked():
            looks = [pool.submit(server.ask, f"/look/{name}") for name in names]
            assert wait_for(lambda: len(server.waiting()) == waiting), server.waiting()
        return [{**look.result().json, "name": name} for name, look in zip(names, looks, strict=True)]


def assert_apart(looks: list[Any]) -> None:
    """Insist that each request had its own connection and transaction throughout."""
    for key in ("backend", "port"):
        assert len({look[key] for look in looks}) == len(looks)
    assert all(look["same"] and look["seen"] == [look["name"]] for look in looks)


PRELOADED = {
    "gunicorn": Kind(f"{GTHREAD} 3 --worker-connections 3 --workers 2 --preload", "flask-used"),
    "uwsgi": Kind(f"{UWSGI} --threads 3 --processes 2", "flask-used"),
}
"""Six simultaneous requests occupy both workers.  uWSGI forks in C, by default without the callbacks of `os`."""


@pytest.mark.parametrize("running", PRELOADED.values(), indirect=True, ids=PRELOADED)
class TestPreload:
    NAMES = ("a", "b", "c", "d", "e", "f")

    def test_workers_share_no_socket(self, server: Running) -> None:
        """Forked workers share no socket with each other, nor with a parent that used the database before the fork."""
        looks = look_at_once(server, [*self.NAMES], waiting=6)
        assert_apart(looks)
        assert len({look["worker"] for look in looks}) == 2
        parent = {tuple(look["preloaded"]) for look in looks}
        assert len(parent) == 1
        assert parent.isdisjoint({(look["backend"], look["port"]) for look in looks})
        assert parent <= {(pid, port) for pid, port, *_ in server.connections()}

    def test_worker_killed_between_statements(self, server: Running) -> None:
        """If a worker is killed between statements, PostgreSQL rolls back at once and a new worker serves requests."""
        with ThreadPoolExecutor(1) as pool:
            stopped = pool.submit(server.ask, "/stop/tea")
            killed = self.kill(server, "idle in transaction")
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                stopped.result()
        assert wait_for(lambda: not server.store.open_transactions())
        self.check_replaced(killed, server)

    def test_worker_killed_in_a_statement(self, server: Running) -> None:
        """If a worker is killed in a statement, PostgreSQL finishes it and rolls back, and a new worker serves."""
        with server.locked() as release, ThreadPoolExecutor(1) as pool:
            held = pool.submit(server.ask, "/hold/tea")
            assert wait_for(server.waiting)
            killed = self.kill(server, "active")
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                held.result()
            assert server.store.open_transactions()
            release()
        assert wait_for(lambda: not server.store.open_transactions())
        self.check_replaced(killed, server)

    def kill(self, server: Running, state: str) -> int:
        """Kill the worker whose connection is in ``state`` and return its process id."""
        signed = wait_for(lambda: [name for _, _, name, is_in, _ in server.connections() if name and is_in == state])
        worker = int(signed[0].removeprefix("worker "))
        os.kill(worker, signal.SIGKILL)
        return worker

    def check_replaced(self, killed: int, server: Running) -> None:
        assert server.store.names() == []
        looks = look_at_once(server, [*self.NAMES], waiting=6)
        assert_apart(looks)
        workers = {look["worker"] for look in looks}
        assert len(workers) == 2
        assert killed not in workers


PROCESSES = f"{UWSGI} --processes 3"
FORKING = {
    "without hooks": Kind(PROCESSES, "flask-used"),
    "an engine of the app's": Kind(PROCESSES, "flask-used-given"),
    "hooks": Kind(f"{PROCESSES} --enable-threads --py-call-uwsgi-fork-hooks", "flask-used"),
    "lazy": Kind(f"{PROCESSES} --lazy-apps", "flask-used"),
}


class TestUwsgi:
    @pytest.mark.parametrize("running", FORKING.values(), indirect=True, ids=FORKING)
    def test_forks(self, server: Running) -> None:
        """Workers without threads have their own connections, however uWSGI forks after the database was used."""
        looks = look_at_once(server, [*"abc"], waiting=3)
        assert_apart(looks)
        assert len({look["worker"] for look in looks}) == 3
        imported = {tuple(look["preloaded"]) for look in looks}
        assert len(imported) == (3 if "--lazy-apps" in server.kind.command else 1)


COOPERATIVE = {
    "psycopg": Kind(GEVENT, "flask"),
    "psycopg2 with a wait callback": Kind(GEVENT, "flask-green", "psycopg2"),
}
BLOCKING = {
    "psycopg2": Kind(GEVENT, "flask", "psycopg2"),
    "psycopg imported before the patch": Kind(f"{GEVENT} --preload", "flask"),
}


class TestGevent:
    @pytest.mark.parametrize("running", COOPERATIVE.values(), indirect=True, ids=COOPERATIVE)
    def test_greenlets_share_nothing(self, server: Running) -> None:
        """As many requests as the pool has connections run at once, each on its own, while the worker serves others."""
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(look_at_once, server, [*"abcde"], waiting=5)
            assert wait_for(lambda: server.ask("/held", "GET").json["held"] == 5)
            assert_apart(looking.result())
        assert server.ask("/siblings/tea").json == {"told": ["ran", "ConcurrentUseError"]}

    @pytest.mark.parametrize("running", BLOCKING.values(), indirect=True, ids=BLOCKING)
    def test_a_blocking_driver_serves_one_request_at_a_time(self, server: Running) -> None:
        """With a driver that blocks gevent's hub, the worker serves one request after another, on one connection."""
        assert server.ask("/pair/tea").status == 201
        looks = look_at_once(server, [*"abc"], waiting=1)
        assert all(look["same"] for look in looks)
        assert len({look["backend"] for look in looks}) == 1
        assert server.store.names() == rows("tea", *"abc")


def test_trio(postgresql: Any, tmp_path: Path) -> None:
    """A server on an event loop other than asyncio fails at startup with a clear error."""
    running = Running(Kind(f"{HYPERCORN} --worker-class trio", "fastapi"), postgresql, tmp_path / "log")
    try:
        with pytest.raises(AssertionError, match="session_plugin needs asyncio"):
            running.start()
    finally:
        running.close()


def test_many_greenlets(postgresql: Any, tmp_path: Path) -> None:
    """With 200 concurrent greenlets each request has its own session."""
    site = Running(Kind(GEVENT, "flask-green", "psycopg2"), postgresql, tmp_path / "log")
    try:
        site.start()
        kinds = ["pair", "refuse", "stream/saved"]
        with ThreadPoolExecutor(CROWD) as clients:
            asked = [f"/{kinds[number % 3]}/{number:03}" for number in range(CROWD)]
            replies = list(clients.map(site.ask, asked))
        statuses = {(path.rpartition("/")[0][1:], reply.status) for path, reply in zip(asked, replies, strict=True)}
        assert statuses == {("pair", 201), ("refuse", 400), ("stream/saved", 201)}
        saved = [name for number in range(0, CROWD, 3) for name in (f"{number:03}", f"{number + 2:03}")]
        late = [f"late {number:03}" for number in range(2, CROWD, 3)]
        expected = {whose for name in [*saved, *late] if name != "200" for whose in (name, f"{name}'s")}
        assert set(site.store.names()) == expected
        assert site.ask("/held", "GET").json["held"] == 0
    finally:
        site.close()
