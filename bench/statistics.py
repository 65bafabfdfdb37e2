"""Medians and quartiles, because a machine with other load has outliers in one direction only."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import TypeAlias

Summary: TypeAlias = dict[str, float]


def summary(samples: Sequence[float]) -> Summary | None:
    """The median and both quartiles, or None without samples."""
    if not samples:
        return None
    low, _, high = quantiles(samples, n=4) if len(samples) > 1 else (samples[0],) * 3
    return {"median": median(samples), "low": low, "high": high}


def ratio(samples: Sequence[float], floor: Sequence[float]) -> Summary | None:
    """The summary of the ratios of each round."""
    return summary([each / beneath for each, beneath in zip(samples, floor, strict=True)])


def difference(samples: Sequence[float], floor: Sequence[float]) -> Summary | None:
    """The summary of the differences of each round."""
    return summary([each - beneath for each, beneath in zip(samples, floor, strict=True)])
