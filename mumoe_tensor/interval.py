"""Intervals of means."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from statistics import mean, stdev


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean, and half width of the 95 % interval of Student's t; None for that of a single value.

    None, too, where a value is NaN or infinite. There must be at least one value.
    """
    from scipy.stats import t

    values = list(values)
    count = len(values)
    if count < 2 or not all(map(isfinite, values)):
        return mean(values), None
    return mean(values), float(t.ppf(0.975, count - 1)) * stdev(values) / count**0.5
