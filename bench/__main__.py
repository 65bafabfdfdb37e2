"""``python -m bench``: run the measurements, print the tables, and save them with the raw results and a plot."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from .contenders import KINDS, NAMES
from .machine import description, postgresql
from .parts import PARTS, SIZES, Run
from .plot import save_plot
from .report import page
from .shop import fill_database


def main() -> None:
    options = _options()
    with postgresql() as server:
        database = server.new_database()
        url = server.url("psycopg", database)
        fill_database(url)
        results: dict[str, Any] = {"machine": description(url), "size": options.size}
        run = Run(
            lambda driver: server.url(driver, database),
            SIZES[options.size], options.kind, options.driver, options.contender,
        )  # fmt: skip
        for part in options.part:
            started = time.monotonic()
            results[part] = PARTS[part](run)
            print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        server.drop(database)
    save(results, options.output, options.size)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full", help="quick: two minutes, and wider spreads")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--driver", nargs="+", default=[], help="psycopg, asyncpg, sqlite, sqlite+aiosqlite")
    parser.add_argument("--contender", nargs="+", choices=NAMES, default=[], metavar="NAME", help="; ".join(NAMES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def save(results: dict[str, Any], folder: Path, name: str) -> None:
    """Print the page, and save it together with the results and the plot."""
    text = page(results)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    save_plot(results, folder / f"{name}.png")


if __name__ == "__main__":
    main()
