"""Requests per second and latencies on a real server, by number of connections, with and without slow clients."""

from __future__ import annotations

import random
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

from .contenders import of_kind
from .fleet import Fleet, Server
from .load import LoadGenerator
from .proxy import Proxy
from .shop import ENDPOINTS
from .statistics import summary

SLOW_READERS = 50
OTHER_CONNECTIONS = 10
"""The number of connections that are used together with slow clients; it is also measured without them."""


def measure(
    kind: str,
    url: str,
    connections: list[int],
    rounds: int,
    seconds: float,
    delay: float = 0,
    slow: bool = False,
    only: Collection[str] = (),
) -> dict[str, Any]:
    """Measure by contender, endpoint and connections; the contenders take turns in each round."""
    contenders = [each for each in of_kind(kind, only) if each.served]
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    beside: dict[str, dict[str, Any]] = {}
    shuffle = random.Random(1).shuffle
    with (
        Proxy(url, delay) if delay else nullcontext() as proxy,
        Fleet(contenders, proxy.url if proxy else url) as servers,
        LoadGenerator() as generator,
    ):
        order = list(servers)
        for _ in range(rounds):
            for count in connections:
                for endpoint in ("read", "write"):
                    shuffle(order)
                    for server in order:
                        if endpoint in (server.contender.endpoints or ENDPOINTS):
                            run = _run(server, generator, endpoint, count, seconds)
                            runs.setdefault((server.contender.name, endpoint, count), []).append(run)
        for server in servers if slow else ():
            readers = {"slow": SLOW_READERS, "connections": OTHER_CONNECTIONS}
            beside[server.contender.name] = _run(server, generator, "read", seconds=seconds, **readers)
    return {"rows": [_row(each.name, runs) | {"slow": beside.get(each.name)} for each in contenders]}


def _run(
    server: Server, generator: LoadGenerator, endpoint: str, connections: int, seconds: float, slow: int = 0
) -> dict[str, Any]:
    server.recover()
    method, path = ENDPOINTS[endpoint]
    before = server.cpu_seconds()
    job = {"method": method, "path": path, "connections": connections, "seconds": seconds, "slow": slow}
    run = generator.run(port=server.port, **job)
    after = server.cpu_seconds()
    run["cpu"] = (after - before) / run["responses"] if before and after and run["responses"] else None
    return run


def _row(name: str, runs: dict[tuple[str, str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"contender": name, "endpoints": {}}
    for (contender, endpoint, count), taken in runs.items():
        if contender != name:
            continue
        cell: dict[str, Any] = {}
        for figure in ("per_second", "p50", "p99", "cpu", "generator"):
            figures = [run[figure] for run in taken]
            cell[figure] = None if None in figures else summary(figures)
        cell["failed"] = sum(run["failed"] + run["unanswered"] for run in taken)
        cell["requests"] = sum(run["answered"] + run["unanswered"] for run in taken)
        row["endpoints"].setdefault(endpoint, {})[str(count)] = cell
    return row
