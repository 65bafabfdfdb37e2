"""The parts of a benchmark: their order and databases, and `Size` for their duration."""

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
    """The amount of measurements.

    Attributes:
        rounds, batch: for CPU times; a batch is the number of requests that are timed together.
        sqlite: whether CPU times are also measured on SQLite in memory.
        requests: the requests over which hops, round trips and holding times are averaged.
        connections, server_rounds, seconds: for the load on a real server.
        far_connections: for the load with a simulated network delay.
        imports: the interpreters started per package; packages: the packages, or all if empty.
        idle: the requests in flight at once; growth: the requests over which the app must not grow.
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
    "smoke": Size(1, 1, False, 1, (5,), 1, 0.1, (), 1, 5, 200, ("session_plugin",)),
}


@dataclass
class Run:
    """The measurements that one call of the command makes.

    Attributes:
        url_of: a function that returns the URL of the database for a PostgreSQL driver.
        kinds, drivers, only: the kinds, drivers and names of contenders; all if empty.
    """

    url_of: Callable[[str], str]
    size: Size
    kinds: list[str]
    drivers: list[str]
    only: list[str]

    def databases(self, *, sqlite: bool = False, first: bool = False) -> list[dict[str, str]]:
        """The kind, driver and URL of each database that a kind is measured on, or of the ``first`` for each kind."""
        found = [
            {"kind": kind, "driver": driver, "url": self.url_of(driver)}
            for kind in self.kinds or KINDS
            for driver in DRIVERS[kind][: 1 if first else None]
        ]
        if sqlite:
            found += [{"kind": kind, "driver": SQLITE[kind], "url": f"{SQLITE[kind]}://"} for kind in self.kinds]
        return [each for each in found if not self.drivers or each["driver"] in self.drivers]

    def on_each(self, databases: list[dict[str, str]], module: str, **job: Any) -> list[dict[str, Any]]:
        """Run a measurement on each of the databases."""
        return [self.on(each, module, only=self.only, **job) for each in databases]

    def on(self, database: dict[str, str], module: str, function: str = "measure", **job: Any) -> dict[str, Any]:
        """Run a measurement on one of the databases."""
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
    with ThreadPoolExecutor() as pool:  # in parallel, because no times are measured
        job = {"requests": run.size.growth}
        return list(
            pool.map(lambda each: run.on(each, "measure_memory", "measure_growth", **job), run.databases(first=True))
        )


PARTS: dict[str, Callable[[Run], Any]] = {
    each.__name__: each for each in (cpu, requests, server, far, imports, memory, growth)
}
