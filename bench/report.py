"""Formats the results of a run as a page of Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .goals import judged, spread
from .shop import ENDPOINTS

Part = dict[str, Any]


def page(results: dict[str, Any]) -> str:
    """The page with all results."""
    blocks = [
        "# What a session costs",
        "How to read this: `bench/README.md`. Figures are medians, with the quartiles in brackets.",
        _table(["", ""], results["machine"].items()),
    ]
    for name, render in PARTS.items():
        if results.get(name):
            blocks += render(results[name])
    goals = judged(results)
    if goals:
        blocks.append("## Goals")
        rows = [("yes" if goal.met else "**no**", goal.text, goal.found) for goal in goals]
        blocks.append(_table(["met", "goal", "found"], rows))
    return "\n\n".join(blocks) + "\n"


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _per_database(parts: list[Part], head: list[str], row: Callable[[Part], list[str]]) -> Iterator[str]:
    """A table for each kind and driver, with a row for each contender."""
    for part in parts:
        yield f"### {part['kind']}, {part['driver']}"
        yield _table(head, map(row, part["rows"]))


def _cells(row: Part, *endpoints: str) -> list[Any]:
    return [row["endpoints"].get(endpoint, {}) for endpoint in endpoints]


def _cpu(parts: list[Part]) -> Iterator[str]:
    yield "## CPU per request, in process"
    yield "Microseconds of CPU time, all threads, one request at a time."
    head = [
        "", "bare", "over the framework", "declared, over own bare", "read", "of the floor's", "write",
        "of the floor's", "wall of the floor's, read / write", "functions entered",
    ]  # fmt: skip
    yield from _per_database(parts, head, _cpu_row)
    counted = [part for part in parts if any(cell["instructions"] for cell in _cells(part["rows"][0], *ENDPOINTS))]
    if counted:
        yield "Instructions per request, in thousands:"
        yield from _per_database(counted, ["", *ENDPOINTS], _instructions_row)


def _cpu_row(row: Part) -> list[str]:
    bare, declared, read, write = cells = _cells(row, *ENDPOINTS)
    return [
        row["contender"],
        _median(bare.get("cpu"), 0),
        spread(bare.get("cpu_over_floor"), 1),
        spread(declared.get("cpu_over_own_bare"), 1),
        _median(read.get("cpu"), 0),
        spread(read.get("cpu_ratio"), 2),
        _median(write.get("cpu"), 0),
        spread(write.get("cpu_ratio"), 2),
        " / ".join(_median(cell.get("wall_ratio"), 2) for cell in (read, write)),
        " / ".join(_number(cell.get("functions"), 0) for cell in cells),
    ]


def _instructions_row(row: Part) -> list[str]:
    return [row["contender"], *(_median(cell.get("instructions"), 0, 1e-3) for cell in _cells(row, *ENDPOINTS))]


def _requests(parts: list[Part]) -> Iterator[str]:
    yield "## What a request takes besides"
    yield (
        "Of requests one at a time. Thread hops and round trips to the database: bare / declared / read / write. "
        "Milliseconds that a connection is out of the pool, and with about 1 ms of network each way also those of the "
        "whole request: read / write."
    )
    head = ["", "thread hops", "round trips", "connection held", "held, far", "request, far"]
    yield from _per_database(parts, head, _requests_row)


def _requests_row(row: Part) -> list[str]:
    cells = _cells(row, *ENDPOINTS)

    def figures(place: str, figure: str, digits: int, scale: float = 1) -> str:
        shown = cells if scale == 1 else cells[2:]
        return " / ".join(_number(cell.get(place, {}).get(figure), digits, scale) for cell in shown)

    return [
        row["contender"],
        figures("direct", "hops", 0),
        figures("near", "trips", 0),
        figures("direct", "held", 2, 1000),
        figures("far", "held", 1, 1000),
        figures("far", "wall", 1, 1000),
    ]


def _server(parts: list[Part]) -> Iterator[str]:
    yield "## Over a real server"
    yield "One worker, a pool of 5. Requests per second; p50 / p99 in milliseconds; in brackets what failed."
    yield from _load(parts)
    if any(row["slow"] for part in parts for row in part["rows"]):
        yield "## Beside 50 clients that read slowly"
        yield "10 connections that read a row, while 50 others read a streamed body of 16 MB at 10 kB/s."
        head = ["", "requests per second", "p50 / p99 ms", "failed"]
        yield from _per_database(parts, head, _slow_row)


def _far(parts: list[Part]) -> Iterator[str]:
    yield "## Over a real server, the database 1 ms away each way"
    yield "As above, through the delaying proxy."
    yield from _load(parts)


def _load(parts: list[Part]) -> Iterator[str]:
    for part in parts:
        counts = list(next(iter(part["rows"][0]["endpoints"].values())))
        for endpoint in ("read", "write"):
            yield f"### {part['kind']}, {part['driver']}: {endpoint}"
            head = ["", *(f"{count} connections" if count != "1" else "1 connection" for count in counts), "CPU ms"]
            rows = [row for row in part["rows"] if endpoint in row["endpoints"]]
            yield _table(head, (_load_row(row, endpoint, counts) for row in rows))
    shares = [
        cell["generator"]["high"]
        for part in parts
        for row in part["rows"]
        for cells in row["endpoints"].values()
        for cell in cells.values()
    ]
    yield f"The load generator used at most {max(shares):.0%} of one core."


def _load_row(row: Part, endpoint: str, counts: list[str]) -> list[str]:
    cells = row["endpoints"][endpoint]
    shown = []
    for count in counts:
        cell = cells[count]
        text = f"{_median(cell['per_second'], 0)}; {_median(cell['p50'], 1, 1000)} / {_median(cell['p99'], 1, 1000)}"
        shown.append(text + (f" (**{cell['failed']} of {cell['requests']} failed**)" if cell["failed"] else ""))
    return [row["contender"], *shown, " / ".join(_median(cells[count]["cpu"], 2, 1000) for count in counts)]


def _slow_row(row: Part) -> list[str]:
    run = row["slow"]
    return [
        row["contender"],
        _number(run["per_second"], 0),
        f"{_number(run['p50'], 1, 1000)} / {_number(run['p99'], 1, 1000)}",
        f"{run['failed'] + run['unanswered']} of {run['answered'] + run['unanswered']}",
    ]


def _imports(part: Part) -> Iterator[str]:
    yield "## Import"
    yield "CPU milliseconds from bytecode, beyond SQLAlchemy with its ORM and asyncio, and beyond the framework."
    yield _table(["package", "ms"], ([row["package"], spread(row["cpu"], 1)] for row in part["rows"]))


def _memory(parts: list[Part]) -> Iterator[str]:
    yield "## Memory of a request in flight"
    yield "Kilobytes allocated per request whose response waits to be sent."
    yield from _per_database(parts, ["", "bare", "declared"], _memory_row)


def _memory_row(row: Part) -> list[str]:
    return [row["contender"], *(_number(row["endpoints"][name], 1, 1e-3) for name in ("bare", "declared"))]


def _growth(parts: list[Part]) -> Iterator[str]:
    yield "## Growth"
    yield "Of this project's app, from the first tenth of the requests to the last one."
    head = ["", "requests", "objects", "memory blocks", "resident kB"]
    rows = [[part[name] for name in ("kind", "requests", "objects", "blocks", "kilobytes")] for part in parts]
    yield _table(head, rows)


def _median(summary: dict[str, float] | None, digits: int, scale: float = 1) -> str:
    return _number(summary and summary["median"], digits, scale)


def _number(value: Any, digits: int, scale: float = 1) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


PARTS: dict[str, Callable[[Any], Iterator[str]]] = {
    "cpu": _cpu,
    "requests": _requests,
    "server": _server,
    "far": _far,
    "imports": _imports,
    "memory": _memory,
    "growth": _growth,
}
