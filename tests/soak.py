"""A soak test: mixed load and random faults on real servers, and at the end a ledger that must balance.

Run ``make soak``, or ``make soak SECONDS=60``.  Each client keeps a journal of its requests and the responses, which
must agree with the database.  Two kinds of requests may have been committed or not, but never in part: those whose
COMMIT was not acknowledged (the site responds with a 503), and those whose response was cut off.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, make_url, select, text
from sqlalchemy.orm import Session

from .harness import wait_for
from .servers import PostgreSQL, free_port
from .soak_site import ACCOUNTS, DATABASE, KINDS, SITE, Account, Base, Entry

ROOT = Path(__file__).parent.parent
CLIENTS = 18
BALANCE = 1_000_000
LEAVE = 0.05
"""The share of requests whose client disconnects before it has received the response."""
US = "tests"
"""The application name of the soak test's own connections, which tells them apart from those of the servers."""
OURS = re.compile(
    r"never closed|non-checked-in|never awaited|SAWarning|ConcurrentUseError|ScopeClosedError|deallocated"
)
"""Messages that must not occur in a log."""
SERVERS = {
    "fastapi": "uvicorn tests.soak_site:app --port {port} --log-level error --timeout-graceful-shutdown 10",
    "flask": "gunicorn tests.soak_site:app --bind 127.0.0.1:{port} --worker-class gthread --threads 8 --workers 2 "
    "--graceful-timeout 10 --no-control-socket --log-level error",
}
WAYS = {"async": "fastapi", "sync": "fastapi", "flask": "flask"}
"""The ways to write an endpoint, and the server that serves each."""


class Server:
    """A server that runs in processes of its own."""

    def __init__(self, name: str, database: str, folder: Path) -> None:
        self.name = name
        self.port = free_port()
        self.log = folder / f"{name}.log"
        environ = {**os.environ, SITE: name, DATABASE: database, "PYTHONWARNINGS": "default::ResourceWarning"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *SERVERS[name].format(port=self.port).split()],
                stdout=log, stderr=log, cwd=ROOT, env=environ, start_new_session=True,
            )  # fmt: skip
        assert wait_for(self.held, 30), self.log.read_text()

    def held(self) -> Any:
        """The number of connections that one process has checked out of each pool; None if no process responds."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            connection.request("GET", "/held")
            return json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """The process ids of the workers."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children] or [pid]

    def memory(self) -> float:
        """The resident memory of the largest worker, in MB."""
        sizes = [0]
        for pid in self.workers():
            try:
                sizes.append(int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]))
            except (OSError, IndexError):
                pass  # the worker was just killed
        return max(sizes) / 1024

    def stop(self) -> int:
        """Stop the server as an operator does, and return its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def kill(self) -> None:
        """Kill the server and its workers if it is running."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # the server has a process group of its own
            self._process.wait()


@dataclass
class Call:
    """One request of a client and the response to it.

    Attributes:
        status: None if the connection was closed, by either side, before the response began.
        complete: False if the response was cut off.
    """

    way: str
    kind: str
    token: str
    status: int | None = None
    complete: bool = False
    body: bytes = b""

    @property
    def saved(self) -> bool:
        return self.status == 201

    @property
    def unknown(self) -> bool:
        return self.status in (None, 503)


class Client(threading.Thread):
    """Sends one request after the other, and keeps the journal."""

    def __init__(self, number: int, servers: dict[str, Server], over: threading.Event) -> None:
        super().__init__()
        self._number = number
        self._servers = servers
        self._over = over
        self._random = random.Random(number)
        self.journal: list[Call] = []

    def run(self) -> None:
        ways, kinds, weights = list(WAYS), list(KINDS), list(KINDS.values())
        while not self._over.is_set():
            token = f"{self._number}-{len(self.journal)}"
            call = Call(self._random.choice(ways), self._random.choices(kinds, weights)[0], token)
            self.journal.append(call)
            self._ask(call)

    def _ask(self, call: Call) -> None:
        source, target = self._random.sample(range(ACCOUNTS), 2)
        path = f"/{call.way}/{call.kind}/{call.token}?source={source}&target={target}"
        path += f"&amount={self._random.randint(1, 100)}"
        connection = http.client.HTTPConnection("127.0.0.1", self._servers[WAYS[call.way]].port, timeout=60)
        try:
            connection.request("POST", path)
            if self._random.random() < LEAVE:
                time.sleep(self._random.random() / 30)
                return
            response = connection.getresponse()
            call.status = response.status
            call.body = response.read()
            call.complete = True
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()


class Faults(threading.Thread):
    """Terminates connections of all servers, and kills workers of the server that replaces them."""

    def __init__(self, engine: Engine, server: Server, over: threading.Event) -> None:
        super().__init__()
        self._engine = engine
        self._server = server
        self._over = over
        self.done: Counter[str] = Counter()

    def run(self) -> None:
        turn = 0
        while not self._over.wait(0.25 + random.random() / 2):
            turn += 1
            if turn % 16 == 8:
                os.kill(random.choice(self._server.workers()), signal.SIGKILL)
                self.done["worker killed"] += 1
            else:
                self.done["connection terminated"] += self._terminate()

    def _terminate(self) -> int:
        with self._engine.connect() as connection:
            asks = text(
                "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity WHERE datname = "
                f"current_database() AND application_name <> '{US}' ORDER BY state = 'idle', random() LIMIT 1) AS one"
            )
            number: int = connection.execute(asks).scalar_one()
            return number


class Soak:
    """One run; `figures` are its measurements, and `problems` the promises that were broken."""

    def __init__(self, postgresql: PostgreSQL, seconds: float, say: Callable[[str], None] = lambda line: None) -> None:
        self._seconds = seconds
        self._say = say
        self._name = postgresql.new_database()
        self._database = postgresql.url("psycopg", self._name)
        own_url = make_url(postgresql.admin_url(self._name)).update_query_dict({"application_name": US})
        self._engine = create_engine(own_url, isolation_level="AUTOCOMMIT")
        self._drop = lambda: postgresql.drop(self._name)
        self.journal: list[Call] = []
        self.figures: list[tuple[str, object]] = []
        self.problems: list[str] = []
        self._memory: dict[str, list[float]] = {}

    def run(self) -> None:
        """Start the servers, run the load with faults, and check the results."""
        self._open_bank()
        with tempfile.TemporaryDirectory(prefix="session_plugin-soak-") as folder:
            servers: dict[str, Server] = {}
            try:
                for name in SERVERS:
                    servers[name] = Server(name, self._database, Path(folder))
                self._load(servers)
                self._look_at_rest(servers)
                self._judge()
                for server in servers.values():
                    self._stop(server)
            finally:
                for server in servers.values():
                    server.kill()
                self._engine.dispose()
                self._drop()

    def _open_bank(self) -> None:
        with self._engine.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {self._name} SET deadlock_timeout = '30ms'"))
        Base.metadata.create_all(self._engine)
        with self._engine.connect() as connection:
            rows = [{"id": number, "balance": BALANCE} for number in range(ACCOUNTS)]
            connection.execute(Account.__table__.insert(), rows)

    def _load(self, servers: dict[str, Server]) -> None:
        over = threading.Event()
        clients = [Client(number, servers, over) for number in range(CLIENTS)]
        faults = Faults(self._engine, servers["flask"], over)
        began = time.monotonic()
        for thread in (*clients, faults):
            thread.start()
        try:
            while (passed := time.monotonic() - began) < self._seconds:
                time.sleep(min(self._seconds / 20, self._seconds - passed))
                for name, server in servers.items():
                    self._memory.setdefault(name, []).append(server.memory())
                sizes = ", ".join(f"{name} {sizes[-1]:.0f} MB" for name, sizes in self._memory.items())
                number = sum(len(client.journal) for client in clients)
                self._say(f"{time.monotonic() - began:5.0f} s  {number:7} requests  {dict(faults.done)}  {sizes}")
        finally:
            over.set()
            for thread in (*clients, faults):
                thread.join(90)
        self.journal = [call for client in clients for call in client.journal]
        self.figures.append(("requests", f"{len(self.journal)} in {self._seconds:.0f} s, by {CLIENTS} clients"))
        self.figures.extend((f"fault: {what}", number) for what, number in faults.done.items())

    def _look_at_rest(self, servers: dict[str, Server]) -> None:
        """Check that without load no connection is checked out, no transaction is open and every pool is usable."""
        for server in servers.values():
            held = {}
            for _ in range(20 * len(server.workers())):  # until each worker has responded
                response = wait_for(lambda server=server: self._nothing_held(server), 15)
                held[response["worker"] if response else None] = response
            self._insist(None not in held, f"{server.name} still holds connections: {server.held()}")
        open_now = (
            "SELECT state, query FROM pg_stat_activity WHERE datname = current_database() "
            f"AND application_name <> '{US}' AND state <> 'idle'"
        )
        with self._engine.connect() as connection:
            idle = wait_for(lambda: not connection.execute(text(open_now)).all(), 15)
            self._insist(idle, f"transactions are open: {connection.execute(text(open_now)).all()}")
        for way in WAYS:
            last = [Call(way, "look", "last") for _ in range(20)]
            client = Client(0, servers, threading.Event())
            client._random.random = lambda: 1.0  # type: ignore[method-assign]  # no client disconnects
            with ThreadPoolExecutor(len(last)) as threads:
                list(threads.map(client._ask, last))
            statuses = Counter(call.status for call in last)
            self._insist(statuses == {201: len(last)}, f"{way}: after the load a crowd was answered {dict(statuses)}")

    @staticmethod
    def _nothing_held(server: Server) -> Any:
        reply = server.held()
        return reply if reply and not any(reply[way] for way in WAYS if way in reply) else None

    def _judge(self) -> None:
        with Session(self._engine) as session:
            entries = {entry.token: entry for entry in session.scalars(select(Entry))}
            balances = {account.id: account.balance for account in session.scalars(select(Account))}
        self._judge_ledger(entries, balances)
        for call in self.journal:
            self._judge_one(call, entries)
        for way in WAYS:
            mine = [call for call in self.journal if call.way == way]
            self.figures += [
                (f"{way}: told that it is saved", sum(call.saved for call in mine)),
                (f"{way}: told an error", sum(not call.saved and not call.unknown for call in mine)),
                (f"{way}: cut before the answer", sum(call.status is None for call in mine)),
                (f"{way}:   of these saved", sum(call.status is None and call.token in entries for call in mine)),
                (f"{way}: told a 503", sum(call.status == 503 for call in mine)),
                (f"{way}:   of these saved", sum(call.status == 503 and call.token in entries for call in mine)),
                (f"{way}: streams cut short", sum(call.saved and not call.complete for call in mine)),
            ]
        named = Counter(found[1] for call in self.journal if (found := re.search(rb"'?\"?(\w+)\(", call.body)))
        self.figures.append(("errors told", {name.decode(): number for name, number in named.most_common()}))
        self.figures.append(("500s", Counter(call.kind for call in self.journal if call.status == 500)))
        self._judge_memory()

    def _judge_ledger(self, entries: dict[str, Entry], balances: dict[int, int]) -> None:
        expected = dict.fromkeys(range(ACCOUNTS), BALANCE)
        for entry in entries.values():
            expected[entry.source] -= entry.amount
            expected[entry.target] += entry.amount
        self._insist(balances == expected, "the balances are not what the entries make of them: something was halved")
        self._insist(sum(balances.values()) == ACCOUNTS * BALANCE, "money was made or lost")
        self.figures.append(("ledger", f"{len(entries)} entries, balances add up to {sum(balances.values())}"))

    def _judge_one(self, call: Call, entries: dict[str, Entry]) -> None:
        """Check that the response agrees with the database."""
        parts = {part for part in ("late", "hook", "orphan", "audit") if f"{call.token} {part}" in entries}
        saved = call.token in entries
        if call.saved:
            self._insist(saved or call.kind == "look", f"told that it is saved, and it is not: {call}")
            self._insist(
                call.kind != "stream" or not call.complete or "late" in parts, f"the stream's end is not saved: {call}"
            )
            self._insist(call.kind != "new" or "audit" in parts, f"the audit is not saved: {call}")
        elif not call.unknown:
            self._insist(not saved, f"told an error, and it is saved: {call}")
        self._insist(saved or not parts & {"late", "hook"}, f"late work of what was never saved: {call}")
        expected_failure = call.kind in ("refused", "raised", "handled", "orphan", "slow", "swallowed")
        self._insist(not (expected_failure and (saved or call.saved)), f"it cannot be saved, and is: {call}")
        self._insist(call.status != 500 or call.kind == "raised", f"an error that nobody expected: {call}")

    def _judge_memory(self) -> None:
        """Check that memory does not grow; the caches are full after a fifth of the run."""
        for name, sizes in self._memory.items():
            settled, last = sizes[len(sizes) // 5], sizes[-1]
            self.figures.append((f"memory of {name}", " ".join(f"{size:.0f}" for size in sizes) + " MB"))
            self._insist(last < settled * 1.25 + 10, f"the memory of {name} grew from {settled:.0f} to {last:.0f} MB")

    def _stop(self, server: Server) -> None:
        code = server.stop()
        self._insist(code in (0, -signal.SIGTERM), f"{server.name} ended with {code}")
        said = [line for line in server.log.read_text(errors="replace").splitlines() if OURS.search(line)]
        self._insist(not said, f"{server.name} said: {said[:3]}")

    def _insist(self, holds: object, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    soak_for = parser.parse_args().seconds
    postgresql = PostgreSQL()
    try:
        soak = Soak(postgresql, soak_for, lambda line: print(line, flush=True))
        soak.run()
    finally:
        postgresql.stop()
    print(*(f"{what:32} {figure}" for what, figure in soak.figures), sep="\n")
    print(f"{'problems':32} {len(soak.problems)}", *soak.problems[:20], sep="\n")
    sys.exit(bool(soak.problems))


if __name__ == "__main__":
    main()
