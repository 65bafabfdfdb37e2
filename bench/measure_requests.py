"""The thread hops, connection holding times and database round trips of one request."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import nullcontext
from statistics import median
from typing import Any

from sqlalchemy import event

from .contenders import of_kind
from .counters import HopCounter
from .drive import Running
from .proxy import Proxy

DELAY = 0.001
"""The delay of the simulated network in each direction, in seconds."""


def measure(kind: str, url: str, requests: int, only: Collection[str] = ()) -> dict[str, Any]:
    """The counts per request, and the median times, by contender and endpoint."""
    with Proxy(url) as near, Proxy(url, DELAY) as far:
        rows = []
        for contender in of_kind(kind, only):
            row: dict[str, Any] = {}
            for place, proxy in (("direct", None), ("near", near), ("far", far)):
                running = Running(contender, url if proxy is None else proxy.url)
                running.check()
                for endpoint in running.endpoints:
                    row.setdefault(endpoint, {})[place] = _figures(running, endpoint, requests, proxy)
                running.close()
            rows.append({"contender": contender.name, "endpoints": row})
    return {"rows": rows}


def _figures(running: Running, endpoint: str, requests: int, proxy: Proxy | None) -> dict[str, Any]:
    running.run(endpoint, requests)
    held = Held(running.engine)
    walls = []
    if proxy is not None:
        proxy.count()
    loop = getattr(running.driver, "loop", None)
    with HopCounter(loop) if loop else nullcontext() as hops:
        for _ in range(requests):
            started = time.perf_counter()
            running.run(endpoint, 1)
            walls.append(time.perf_counter() - started)
    held.stop()
    return {
        "wall": median(walls),
        "held": median(held.seconds) if held.seconds else 0.0,
        "checkouts": len(held.seconds) / requests,
        "hops": hops.count / requests if hops else 0,
        "trips": None if proxy is None else proxy.count() / requests,
    }


class Held:
    """Records how long each connection was checked out of a pool."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._since: dict[Any, float] = {}
        self.seconds: list[float] = []
        event.listen(engine, "checkout", self._checkout)
        event.listen(engine, "checkin", self._checkin)

    def _checkout(self, connection: Any, record: Any, proxied: Any) -> None:
        self._since[record] = time.perf_counter()

    def _checkin(self, connection: Any, record: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since.pop(record))

    def stop(self) -> None:
        """Stop recording."""
        event.remove(self._engine, "checkout", self._checkout)
        event.remove(self._engine, "checkin", self._checkin)
