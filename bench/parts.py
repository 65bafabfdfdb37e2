"""What is measured, in which order and on which databases; a `Size` says how long."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .child import measured
from .contenders import KINDS
from .measure_requests import DELAY

DRIVERS = {"flask": ["psycopg"], "fastapi-async": ["asyncpg", "psycopg"], "fastapi-sync": ["psycopg"]}
SQLITE = {"flask": "sqlite", "fastapi-async": "sqlite+aiosqlite", "fastapi-sync": "sqlite"}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        rounds, batch: of the CPU part; a batch is the requests between two looks at the clock.
        sqlite: CPU on SQLite in memory too.
        requests: over which hops, round trips and holding times are averaged.
        connections, server_rounds, seconds: of the load on a real server.
        far_connections: with a network that delays each way.
        imports: interpreters started per package; packages: which, or all if empty.
        idle: requests in flight at once; growth: requests over which the app must not grow.
    """

    rounds: int
    batch: int
    sqlite: bool
    requests: int
    connections: tuple[int, ...]
    server_rounds: int
    seconds: float
    far_connections: tuple[int, ...]
    imports: int
    idle: int
    growth: int
    packages: tuple[str, ...] = ()


SIZES = {
    "full": Size(40, 25, True, 50, (1, 10, 100, 400), 3, 0.8, (10, 100), 8, 500, 1_000_000),
    "quick": Size(8, 25, False, 10, (10, 100), 1, 0.4, (), 2, 100, 20_000),
    "smoke": Size(2, 2, False, 2, (10,), 1, 0.1, (), 1, 10, 1_000, ("session_plugin",)),
}


@dataclass
class Run:
    """What one call of the command is to measure.

    Attributes:
        url_of: from a driver of PostgreSQL to the URL of the database.
        kinds, drivers, only: kinds, drivers and names of contenders; all if empty.
    """

    url_of: Callable[[str], str]
    size: Size
    kinds: list[str]
    drivers: list[str]
    only: list[str]

    def databases(self, *, sqlite: bool = False, first: bool = False) -> list[dict[str, str]]:
        """Kind, driver and URL, one for each database that a kind is measured on, or the ``first`` of each."""
        found = [
            {"kind": kind, "driver": driver, "url": self.url_of(driver)}
            for kind in self.kinds or KINDS
            for driver in DRIVERS[kind][: 1 if first else None]
        ]
        if sqlite:
            found += [{"kind": kind, "driver": SQLITE[kind], "url": f"{SQLITE[kind]}://"} for kind in self.kinds]
        return [each for each in found if not self.drivers or each["driver"] in self.drivers]

    def on_each(self, databases: list[dict[str, str]], module: str, **job: Any) -> list[dict[str, Any]]:
        """A measurement on each of the databases."""
        return [self.on(each, module, only=self.only, **job) for each in databases]

    def on(self, database: dict[str, str], module: str, function: str = "measure", **job: Any) -> dict[str, Any]:
        """A measurement on one of the databases."""
        result = measured(module, function, kind=database["kind"], url=database["url"], **job)
        return {"kind": database["kind"], "driver": database["driver"], **result}


def cpu(run: Run) -> Any:
    databases = run.databases(sqlite=run.size.sqlite or bool(run.drivers))
    return run.on_each(databases, "measure_cpu", rounds=run.size.rounds, batch=run.size.batch)


def requests(run: Run) -> Any:
    return run.on_each(run.databases(), "measure_requests", requests=run.size.requests)


def server(run: Run) -> Any:
    job = {"rounds": run.size.server_rounds, "seconds": run.size.seconds}
    return run.on_each(run.databases(first=True), "measure_server", connections=run.size.connections, slow=True, **job)


def far(run: Run) -> Any:
    job = {"rounds": 2, "seconds": run.size.seconds, "delay": DELAY}
    databases = run.databases(first=True) if run.size.far_connections else []
    return run.on_each(databases, "measure_server", connections=run.size.far_connections, **job)


def imports(run: Run) -> Any:
    return measured("measure_import", rounds=run.size.imports, only=run.size.packages)


def memory(run: Run) -> Any:
    return run.on_each(run.databases(first=True), "measure_memory", idle=run.size.idle)


def growth(run: Run) -> Any:
    with ThreadPoolExecutor() as pool:  # side by side: nothing of it is timed
        job = {"requests": run.size.growth}
        return list(
            pool.map(lambda each: run.on(each, "measure_memory", "measure_growth", **job), run.databases(first=True))
        )


PARTS: dict[str, Callable[[Run], Any]] = {
    each.__name__: each for each in (cpu, requests, server, far, imports, memory, growth)
}
