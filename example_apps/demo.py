"""Compare what the client receives with what the database holds, for every way in which a request can end::

    python -m example_apps.demo            # takes a few seconds; exit status 1 if a response was untrue
    python -m example_apps.demo --serve    # then keeps the ledger running, to try it in a browser

The Flask ledger runs on a real server, the client is a real client, and the database is read through
a separate connection that the app does not know.
"""

import argparse
import http.client
import json
import logging
import os
import socket
import sqlite3
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from werkzeug.serving import make_server

DEADLINE = 10.0
"""How long to wait, in seconds, for work that happens after the client has received its response."""


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        name: what happens in this case.
        path: the path that its body is posted to.
        body: sent as JSON.
        received: what the client must receive, in the format of `Reply.received`.
        asked: the changes that it requests; after a success the database must hold all of them, otherwise none.
        leaves: True if the client closes its socket after the first chunk of the response.
        follows: True if the work is done after the response, so the demo has to wait for it.
        logged: a text that must be in the log.
    """

    name: str
    path: str
    body: dict[str, Any]
    received: str
    asked: dict[str, int]
    leaves: bool = False
    follows: bool = False
    logged: str = ""


def transfer(amount: int = 30, target: str = "bob", **more: str) -> dict[str, Any]:
    return {"source": "alice", "target": target, "amount": amount, **more}


ACCOUNTS = [{"name": "alice", "deposit": 1000}, {"name": "bob", "deposit": 1}]
MOVED = {"alice": -30, "bob": 30}
RECEIPT = {"receipt_to": "alice@example.com"}
TEN = [["alice", 1]] * 10
MANY = [["alice", 1]] * 5000  # takes far longer to write than a client takes to leave

CASES = [
    Case("success", "/transfers", transfer(), "201", MOVED),
    Case("insufficient funds, returned as 400", "/transfers", transfer(1500), "400", {"alice": -1500, "bob": 1500}),
    Case("exception in the endpoint", "/transfers/crash", transfer(), "500", MOVED),
    Case("COMMIT fails", "/transfers", transfer(target="nobody"), "409", {"alice": -30, "nobody": 30}),
    Case("stream that writes", "/deposits", {"deposits": TEN}, "200", {"equity": -10, "alice": 10}),
    Case(
        "stream, and the client leaves",
        "/deposits",
        {"deposits": MANY},
        "200, broken off",
        {"equity": -5000, "alice": 5000},
        leaves=True,
    ),
    Case(
        "stream, and its COMMIT fails",
        "/deposits",
        {"deposits": [*TEN, ["nobody", 1]]},
        "200, broken off",
        {"equity": -11, "alice": 10, "nobody": 1},
    ),
    Case("hook after the commit", "/transfers", transfer(5, **RECEIPT), "201", {"alice": -5, "bob": 5, "notices": 1}),
    Case(
        "hook that fails",
        "/transfers",
        transfer(5, receipt_to="no address"),
        "201",
        {"alice": -5, "bob": 5},
        logged="send_receipt failed",
    ),
    Case("background work", "/statements", {"account": "alice"}, "202", {"notices": 1}, follows=True),
]


@dataclass(frozen=True)
class Reply:
    """What the client received of a response."""

    status: int
    complete: bool

    @property
    def received(self) -> str:
        return f"{self.status}" if self.complete else f"{self.status}, broken off"

    @property
    def success(self) -> bool:
        return self.complete and self.status < 400


class Log(logging.Handler):
    """Keeps the app's log messages, so that they are not printed between the rows of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def post(port: int, path: str, body: dict[str, Any], *, leaves: bool = False) -> Reply:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
        connection.connect()
        # Closing sends a reset, as when a client process dies.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", leaves, 0))
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            try:
                response.readline() if leaves else response.read()
            except http.client.IncompleteRead:
                return Reply(response.status, complete=False)
            return Reply(response.status, complete=not leaves)


def held(path: Path) -> dict[str, int]:
    """What the database holds: each account's balance, and the number of notices."""
    with closing(sqlite3.connect(path)) as connection:
        balances = connection.execute("SELECT account_name, SUM(amount) FROM entry GROUP BY account_name").fetchall()
        (notices,) = connection.execute("SELECT COUNT(*) FROM notice").fetchone()
    return {**dict(balances), "notices": notices}


def gained(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    changes = {name: after.get(name, 0) - before.get(name, 0) for name in before | after}
    return {name: change for name, change in changes.items() if change}


def is_true(case: Case, reply: Reply, gain: dict[str, int], logged: str) -> bool:
    """Whether the client received what it must receive, and the database agrees."""
    return reply.received == case.received and gain == (case.asked if reply.success else {}) and case.logged in logged


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def run_case(case: Case, port: int, path: Path, log: Log, idle: Callable[[], bool]) -> tuple[str, ...]:
    log.messages.clear()
    before = held(path)
    reply = post(port, case.path, case.body, leaves=case.leaves)
    # An ordinary response needs no waiting: it must be true as soon as it is read.
    if case.leaves:
        wait_until(idle)
    elif case.follows:
        wait_until(lambda: gained(before, held(path)) == case.asked)
    gain = gained(before, held(path))
    logged = "; ".join(log.messages)
    shown = ", ".join(f"{name} {change:+}" for name, change in gain.items()) or "nothing new"
    return case.name, reply.received, shown, "true" if is_true(case, reply, gain, logged) else "FALSE"


def run_cases(port: int, path: Path, log: Log, idle: Callable[[], bool]) -> list[tuple[str, ...]]:
    """A row for each case, and two rows for what must hold after all of them."""
    for account in ACCOUNTS:
        post(port, "/accounts", account)
    rows = [run_case(case, port, path, log, idle) for case in CASES]
    wait_until(idle)
    total = sum(change for name, change in held(path).items() if name != "notices")
    rows.append(("all of it together", "", f"balances sum to {total}", "true" if total == 0 else "FALSE"))
    rows.append(("connections in use", "", "none" if idle() else "some", "true" if idle() else "FALSE"))
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    rows = [("what happens", "the client received", "the database holds", "verdict"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m example_apps.demo", description=__doc__.partition("::")[0])
    parser.add_argument("--serve", action="store_true", help="leave the ledger running afterwards")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; a free one if none is given")
    options = parser.parse_args(arguments)
    log = Log()
    logging.basicConfig(handlers=[log])
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        os.environ["LEDGER_DATABASE"] = f"sqlite:///{path}"
        from .ledger_flask import app, db  # imported here, because the module reads the name of its database on import

        server = make_server("127.0.0.1", options.port, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            rows = run_cases(server.port, path, log, lambda: db.engine.pool.checkedout() == 0)
            print_table(rows)
            if options.serve:
                print(f"\nThe ledger is at http://127.0.0.1:{server.port}/ until you press Ctrl-C.", flush=True)
                wait_for_ctrl_c()
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            db.dispose()
    return 1 if any(row[-1] == "FALSE" for row in rows) else 0


def wait_for_ctrl_c() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    sys.exit(main())
