"""Memory of a request whose response waits to be sent, by contender, and memory growth over many requests."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .contenders import OURS, by_key, of_kind
from .drive import Running

PATTERN = {"declared": 970, "read": 20, "write": 10}
"""The number of requests to each endpoint in every thousand."""


def measure(kind: str, url: str, idle: int, only: Collection[str] = ()) -> dict[str, Any]:
    """The bytes of one request in flight, by contender and endpoint."""
    rows = []
    for contender in of_kind(kind, only):
        if contender.endpoints:
            continue
        running = Running(contender, url)
        running.check()
        row = {endpoint: _idle_bytes(running, endpoint, idle) for endpoint in ("bare", "declared")}
        running.close()
        rows.append({"contender": contender.name, "endpoints": row})
    return {"rows": rows}


def _idle_bytes(running: Running, endpoint: str, idle: int) -> float:
    running.run(endpoint, idle)
    gc.collect()
    tracemalloc.start()
    try:
        with running.driver.idle(endpoint, idle):
            gc.collect()
            return tracemalloc.get_traced_memory()[0] / idle
    finally:
        tracemalloc.stop()


def measure_growth(kind: str, url: str, requests: int) -> dict[str, Any]:
    """The growth of session_plugin's app between the first tenth of the requests and their end."""
    running = Running(by_key(f"{kind}/{OURS}"), url)
    running.check()
    _make(running, requests // 10)
    before = _size()
    _make(running, requests - requests // 10)
    after = _size()
    running.close()
    return {"kind": kind, "requests": requests, **{name: after[name] - before[name] for name in after}}


def _make(running: Running, requests: int) -> None:
    for _ in range(max(1, requests // sum(PATTERN.values()))):
        for endpoint, times in PATTERN.items():
            running.run(endpoint, times)


def _size() -> dict[str, int]:
    gc.collect()
    return {"objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks(), "kilobytes": _resident_kilobytes()}


def _resident_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
