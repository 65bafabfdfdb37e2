"""CPU and wall time of one request without a server, with the contenders of a kind interleaved.

Each round measures every endpoint of every contender, in a random order.  Ratios are taken
within a round, so that a temporary slowdown of the machine affects both values.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Collection
from typing import Any

from .contenders import FLOOR, OURS, of_kind
from .counters import FunctionCounter, instruction_counter
from .drive import Running
from .shop import ENDPOINTS
from .statistics import difference, ratio, summary

AGAIN = f"{FLOOR}, again"
"""The floor is measured twice; the second ratio shows how precise the results are."""


def measure(kind: str, url: str, rounds: int, batch: int, only: Collection[str] = ()) -> dict[str, Any]:
    """The microseconds per request by contender and endpoint, and their ratios to the floor."""
    instructions = instruction_counter()  # before there are threads: it counts only those that start later
    contenders = of_kind(kind, only)
    running = [Running(each, url) for each in contenders]
    running.insert(1, Running(contenders[0], url, AGAIN))
    for each in running:
        each.check()
        for endpoint in each.endpoints:
            each.run(endpoint, batch)
    gc.collect()
    gc.freeze()
    samples = _rounds(running, rounds, batch, instructions)
    functions = {(each.name, endpoint): _functions(each, endpoint) for each in running for endpoint in each.endpoints}
    for each in running:
        each.close()
    return {"rows": [_row(each.name, samples, functions) for each in running]}


def _rounds(
    running: list[Running], rounds: int, batch: int, instructions: Callable[[], Any]
) -> dict[tuple[str, str], dict[str, list[float]]]:
    samples: dict[tuple[str, str], dict[str, list[float]]] = {}
    shuffle = random.Random(1).shuffle
    endpoints = list(ENDPOINTS)
    order = list(running)
    for _ in range(rounds):
        shuffle(endpoints)
        for endpoint in endpoints:
            shuffle(order)
            for each in order:
                if endpoint not in each.endpoints:
                    continue
                taken = samples.setdefault((each.name, endpoint), {"cpu": [], "wall": [], "instructions": []})
                gc.collect()
                executed, wall, cpu = instructions(), time.perf_counter_ns(), time.process_time_ns()
                each.run(endpoint, batch)
                taken["cpu"].append((time.process_time_ns() - cpu) / batch / 1000)
                taken["wall"].append((time.perf_counter_ns() - wall) / batch / 1000)
                if executed is not None:
                    taken["instructions"].append((instructions() - executed) / batch)
    return samples


def _functions(running: Running, endpoint: str, requests: int = 20) -> float | None:
    with FunctionCounter() as counter:
        running.run(endpoint, requests)
    return counter.count and counter.count / requests


def _row(name: str, samples: Any, functions: Any) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        taken = samples.get((name, endpoint))
        if taken is None:
            continue
        floor, bare = samples[FLOOR, endpoint], samples.get((name, "bare"))
        cells[endpoint] = {
            "cpu": summary(taken["cpu"]),
            "wall": summary(taken["wall"]),
            "cpu_ratio": ratio(taken["cpu"], floor["cpu"]),
            "wall_ratio": ratio(taken["wall"], floor["wall"]),
            "ours_of_its": ratio(samples[OURS, endpoint]["cpu"], taken["cpu"]) if (OURS, endpoint) in samples else None,
            "cpu_over_floor": difference(taken["cpu"], floor["cpu"]),
            "cpu_over_own_bare": bare and difference(taken["cpu"], bare["cpu"]),
            "instructions": summary(taken["instructions"]),
            "functions": functions[name, endpoint],
        }
    return {"contender": name, "endpoints": cells}
