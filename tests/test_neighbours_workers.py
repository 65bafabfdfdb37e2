"""Celery and RQ with real worker processes, and the web app that sends tasks to them."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from .servers import PostgreSQL, Redis

PACKAGE = "example_apps.neighbours"
FOLDER = Path(__file__).parent.parent


class Shop:
    """The example app; its modules are imported again for each test, with a separate database."""

    def __init__(self, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
            monkeypatch.delitem(sys.modules, name)
        self.database = self.module("shop_database")
        self.db = self.database.db
        self.db.create_all()

    def module(self, name: str) -> Any:
        return importlib.import_module(f"{PACKAGE}.{name}")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=FOLDER, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def client(self, enqueue: Callable[[int], object]) -> Any:
        """A test client of the web app."""
        return self.module("shop_web").create_app(enqueue).test_client()

    def orders(self) -> dict[str, Any]:
        """The server process that packed each order, or None."""
        with self.db.session_scope(new=True) as session:
            orders = session.scalars(select(self.database.Order)).all()
            assert {order.packed for order in orders} <= {0, 1}
            return {order.item: order.packed_by for order in orders}

    def attempts(self) -> list[int]:
        with self.db.session_scope(new=True) as session:
            return sorted(session.scalars(select(self.database.Attempt.order_id)))

    def wait_until_packed(self, worker: subprocess.Popen[str]) -> dict[str, int]:
        deadline = time.monotonic() + 30
        while None in self.orders().values():
            assert worker.poll() is None and time.monotonic() < deadline, self.orders()
            time.sleep(0.02)
        return self.orders()


@pytest.fixture
def shop(postgresql: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    name = postgresql.new_database()
    environ = {"SHOP_DATABASE": postgresql.url("psycopg", name), "SHOP_BROKER_FOLDER": str(tmp_path)}
    shop = Shop({**environ, "SHOP_BROKER": "filesystem://"}, monkeypatch)
    yield shop
    shop.db.dispose()
    postgresql.drop(name)


def stop(worker: subprocess.Popen[str]) -> str:
    """Terminate the worker and return what it printed."""
    worker.terminate()
    try:
        output, _ = worker.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        worker.kill()
        raise
    return output


def parent_of(output: str) -> int:
    """The server process of the connection that the worker used before it forked."""
    found = re.search(r"^parent (\d+)$", output, re.MULTILINE)
    assert found, output
    return int(found[1])


def test_celery(shop: Shop) -> None:
    """Forked Celery workers open their own connections, and a failed attempt is rolled back before the retry."""
    tasks = shop.module("shop_celery")
    client = shop.client(tasks.pack.delay)
    assert [client.post(f"/orders/{item}").status_code for item in ("tea", "fragile", "tea")] == [201, 201, 500]
    worker = shop.start("celery", "-A", f"{PACKAGE}.shop_celery", "worker", "--pool=prefork", "--concurrency=2",
                        "--without-gossip", "--without-mingle", "--without-heartbeat")  # fmt: skip
    try:
        packed = shop.wait_until_packed(worker)
    finally:
        output = stop(worker)
    assert {*packed} == {"tea", "fragile"}
    assert parent_of(output) not in packed.values()
    assert shop.attempts() == [1, 2, 2, 2]


def test_rq(shop: Shop, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """RQ forks for each job; each job opens its own connection, and a failed attempt is rolled back."""
    monkeypatch.setenv("SHOP_REDIS", redis.url)
    rq = shop.module("shop_rq")
    from rq import Retry

    client = shop.client(lambda ident: rq.queue.enqueue(shop.database.pack, ident, retry=Retry(max=3)))
    assert [client.post(f"/orders/{item}").status_code for item in ("tea", "fragile", "tea")] == [201, 201, 500]
    worker = shop.start(f"{PACKAGE}.shop_rq")
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0, output
    packed = shop.orders()
    assert {*packed} == {"tea", "fragile"}
    assert len({parent_of(output), *packed.values()}) == 3, output
    assert shop.attempts() == [1, 2, 2, 2]
    rq.connection.close()


def test_a_failed_commit_sends_no_task(shop: Shop) -> None:
    """A task is sent only after its order was committed; a request whose commit fails sends none."""
    found: list[Any] = []
    client = shop.client(lambda ident: found.append((ident, shop.orders())))
    client.post("/orders/tea")
    client.post("/orders/tea")
    assert found == [(1, {"tea": None})]


def test_workers_import_no_web_framework(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers share only the database module with the web app, and import no web framework."""
    monkeypatch.setenv("SHOP_REDIS", "redis://127.0.0.1:1/0")
    script = f"import sys; from {PACKAGE} import shop_celery, shop_rq; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=FOLDER, capture_output=True, text=True, check=True)
    assert "session_plugin" in done.stdout
    assert not {"flask", "werkzeug", "starlette", "fastapi"} & {*done.stdout.split()}
