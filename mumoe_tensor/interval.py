"""Intervals of means, and of proportions."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, sqrt
from statistics import mean, stdev

#: Standard deviations of a normal distribution that hold 95 % of it.
NORMAL = 1.959963984540054


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


def proportion(shares: Iterable[float], trials: int) -> tuple[float, float, float]:
    """Mean of shares of successes, as accuracies of several runs, and its 95 % interval.

    It is the interval of Wilson ("Probable inference, the law of succession, and statistical inference",
    1927), which stays between 0 and 1. The number of trials is that with the variance of the mean: of so many
    trials, which are the same ones in every run, and between the runs.

    Parameters
    ----------
    shares : iterable of float
        One or more, between 0 and 1.
    trials : int
        Trials of a run, as rows of validation.

    Returns
    -------
    mean, low, high : float
    """
    shares = list(shares)
    middle, half = interval(shares)
    variance = middle * (1 - middle)
    between = (half / NORMAL) ** 2 if half else 0.0
    count = trials / (1 + trials * between / variance) if variance else trials
    square = NORMAL**2 / count
    centre, room = middle + square / 2, NORMAL * sqrt(variance / count + (square / NORMAL / 2) ** 2)
    low, high = ((centre + side * room) / (1 + square) for side in (-1, 1))
    return middle, max(low, 0.0), min(high, 1.0)
