"""The limits that the results of a run are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from .contenders import AUTOCOMMIT, FLOOR, OURS, of_kind

RATIO_LIMITS = {"flask": 1.05, "fastapi-async": 1.05, "fastapi-sync": 1.10}
"""The maximal ratio of the CPU time of a read or write to the floor's.

A sync commit under FastAPI needs a thread hop of its own.
"""

DECLARED_LIMITS = {"flask": 5.0, "fastapi-async": 40.0, "fastapi-sync": 40.0}
"""The maximal cost of a session that is declared but not used, in microseconds, over an endpoint without one."""

BARE_LIMIT = 5.0
"""The maximal cost for an endpoint that does not use the database, in microseconds."""

HOP_LIMITS = {"flask": (0, 0), "fastapi-async": (0, 0), "fastapi-sync": (1, 2)}
"""The maximal number of thread hops of a request without and with database access."""

IMPORT_LIMIT = 15.0
"""The maximal import time, in milliseconds."""

GROWTH_LIMIT = 500
"""The maximal growth in memory blocks for any number of requests; a leak in each would be tens of thousands."""


@dataclass
class Goal:
    """A goal and the measured value."""

    text: str
    found: str
    met: bool


def judged(results: dict[str, Any]) -> list[Goal]:
    """All goals for which the run has results."""
    goals: list[Goal] = []
    for name, judge in JUDGES.items():
        for part in results.get(name, ()):
            if OURS in (rows := _rows(part)) and not part["driver"].startswith("sqlite"):
                goals += judge(part["kind"], f"{part['kind']}, {part['driver']}", rows)
    goals += (
        Goal(
            f"{row['package']}: import in less than {IMPORT_LIMIT:.0f} ms",
            spread(row["cpu"], 1),
            row["cpu"]["median"] < IMPORT_LIMIT,
        )
        for row in results.get("imports", {}).get("rows", ())
        if row["package"].startswith(OURS)
    )
    goals += (
        Goal(
            f"{part['kind']}: no growth over {part['requests']:,} requests",
            f"{part['blocks']} blocks, {part['kilobytes']} kB",
            part["blocks"] <= GROWTH_LIMIT,
        )
        for part in results.get("growth", ())
    )
    return goals


def _rows(part: dict[str, Any]) -> dict[str, Any]:
    return {row["contender"]: row for row in part["rows"]}


def _committing(kind: str, rows: dict[str, Any]) -> list[str]:
    """The other contenders that commit by themselves."""
    return [
        each.name for each in of_kind(kind) if each.commits and each.name in rows and not each.name.startswith(OURS)
    ]


def _cpu(kind: str, place: str, rows: dict[str, Any]) -> Iterator[Goal]:
    ours = rows[OURS]["endpoints"]
    for endpoint in ("read", "write"):
        limit = RATIO_LIMITS[kind]
        yield _at_most(f"{place}: CPU of a {endpoint} over the floor's", ours[endpoint]["cpu_ratio"], limit, 2)
    declared = ours["declared"]["cpu_over_own_bare"]
    yield _at_most(f"{place}: µs of a session declared and not used", declared, DECLARED_LIMITS[kind], 1)
    bare = ours["bare"]["cpu_over_floor"]
    yield _at_most(f"{place}: µs added to an endpoint that knows nothing of it", bare, BARE_LIMIT, 1)
    for name in _committing(kind, rows):
        ratios = {each: rows[name]["endpoints"][each]["ours_of_its"] for each in ("read", "write")}
        found = ", ".join(f"{each} {spread(ratio, 2)} of its" for each, ratio in ratios.items())
        yield Goal(f"{place}: less CPU than {name}", found, all(ratio["median"] < 1 for ratio in ratios.values()))


def _at_most(text: str, found: dict[str, float], limit: float, digits: int) -> Goal:
    return Goal(f"{text}, at most {limit:g}", spread(found, digits), found["median"] <= limit)


def _requests(kind: str, place: str, rows: dict[str, Any]) -> Iterator[Goal]:
    ours, floor = rows[OURS]["endpoints"], rows[FLOOR]["endpoints"]
    hops = {endpoint: cell["direct"]["hops"] for endpoint, cell in ours.items()}
    idle, used = HOP_LIMITS[kind]
    yield Goal(
        f"{place}: thread hops, at most {idle} if the database is not touched, else {used}",
        ", ".join(f"{endpoint} {count:.0f}" for endpoint, count in hops.items()),
        all(count <= (used if endpoint in ("read", "write") else idle) for endpoint, count in hops.items()),
    )
    trips = {each: (ours[each]["near"]["trips"], floor[each]["near"]["trips"]) for each in ("read", "write")}
    yield Goal(
        f"{place}: no more round trips than the floor",
        ", ".join(f"{endpoint} {found:.0f} to {of_floor:.0f}" for endpoint, (found, of_floor) in trips.items()),
        all(found <= of_floor for found, of_floor in trips.values()),
    )
    if AUTOCOMMIT in rows:
        read = rows[AUTOCOMMIT]["endpoints"]["read"]
        yield Goal(
            f"{place}: one round trip for a read without a transaction",
            f"{read['near']['trips']:.0f}",
            read["near"]["trips"] == 1,
        )
        wall, of_floor = read["far"]["wall"], floor["read"]["far"]["wall"]
        yield Goal(
            f"{place}: a read without a transaction takes less wall time than the floor's, 1 ms away",
            f"{wall * 1000:.1f} to {of_floor * 1000:.1f} ms",
            wall < of_floor,
        )


def _server(kind: str, place: str, rows: dict[str, Any]) -> Iterator[Goal]:
    ours = rows[OURS]["endpoints"]
    for name in _committing(kind, rows):
        theirs = rows[name]["endpoints"]
        for endpoint in ("read", "write"):
            pairs = {count: (_p99(cell), _p99(theirs[endpoint][count])) for count, cell in ours[endpoint].items()}
            yield Goal(
                f"{place}: p99 of a {endpoint} below that of {name}",
                ", ".join(
                    f"at {count}: {_milliseconds(own)} to {_milliseconds(other)}"
                    for count, (own, other) in pairs.items()
                ),
                all(own < other for own, other in pairs.values()),
            )
    slow = rows[OURS]["slow"]
    if slow:
        failed = slow["failed"] + slow["unanswered"]
        yield Goal(f"{place}: no request fails beside slow readers", f"{failed} failed", not failed)


def _p99(cell: dict[str, Any]) -> float:
    """The 99th percentile in seconds; infinite if that request got no response."""
    p99: float = cell["p99"]["median"] if cell["p99"] else inf
    return p99


def _milliseconds(seconds: float) -> str:
    return "no answer" if seconds == inf else f"{seconds * 1000:.0f} ms"


JUDGES = {"cpu": _cpu, "requests": _requests, "server": _server}


def spread(summary: dict[str, float] | None, digits: int) -> str:
    """Format the median and the quartiles as ``median (low to high)``."""
    if summary is None:
        return "-"
    low, high = summary["low"], summary["high"]
    return f"{summary['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
