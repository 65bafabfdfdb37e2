"""Plots the results of a run: CPU times relative to the floor, and p99 by the number of connections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator, ScalarFormatter

COLOURS = {"read": "#4477aa", "write": "#ee6677"}


def save_plot(results: dict[str, Any], path: Path) -> None:
    """Save a plot of the results; if there are neither CPU nor server results, save none."""
    cpu = [part for part in results.get("cpu", ()) if not part["driver"].startswith("sqlite")]
    served = {(part["kind"], part["driver"]): part for part in results.get("server", ())}
    places = list(dict.fromkeys([*((part["kind"], part["driver"]) for part in cpu), *served]))
    if not places:
        return
    figure, axes = pyplot.subplots(len(places), 2, figsize=(13, 3.6 * len(places)), squeeze=False, layout="constrained")
    by_place = {(part["kind"], part["driver"]): part for part in cpu}
    for (left, right), place in zip(axes, places, strict=True):
        left.set_title(f"{', '.join(place)}: CPU over that of the floor, in process")
        _draw_cpu(left, by_place.get(place, {"rows": []})["rows"])
        if place in served:
            right.set_title(f"{', '.join(place)}: p99 of a read, on a server")
            _draw_p99(right, served[place]["rows"])
        else:
            right.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_cpu(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.axvline(1, color="black", linewidth=0.8)
    for place, row in enumerate(reversed(rows)):
        for offset, endpoint in ((0.2, "read"), (-0.2, "write")):
            ratio = row["endpoints"].get(endpoint, {}).get("cpu_ratio")
            if ratio:
                middle = ratio["median"]
                spread = [[middle - ratio["low"]], [ratio["high"] - middle]]
                axes.barh(place + offset, middle, 0.36, xerr=spread, color=COLOURS[endpoint])
    axes.set_yticks(range(len(rows)), [row["contender"] for row in reversed(rows)], fontsize=8)
    axes.legend([Patch(color=colour) for colour in COLOURS.values()], COLOURS, fontsize=8)


def _draw_p99(axes: Any, rows: list[dict[str, Any]]) -> None:
    counts = [int(count) for count in rows[0]["endpoints"]["read"]]
    for row in rows:
        cells = row["endpoints"].get("read", {})
        points = [(int(count), cell["p99"]["median"] * 1000) for count, cell in cells.items() if cell["p99"]]
        if points:
            ours = row["contender"].startswith("session_plugin")
            axes.plot(*zip(*points, strict=True), marker="o", label=row["contender"], linewidth=2.5 if ours else 1.2)
    axes.set(xscale="log", yscale="log", xlabel="connections", ylabel="ms")
    axes.set_xticks(counts, counts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(fontsize=8)
