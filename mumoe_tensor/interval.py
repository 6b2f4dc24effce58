"""Confidence intervals of means and of proportions."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, sqrt
from statistics import mean, stdev

#: Half width, in standard deviations, of the 95 % interval of a normal distribution.
NORMAL = 1.959963984540054


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean, and half width of its 95 % confidence interval by Student's t.

    At least one value is required. The half width is None for a single value, or if any value is not finite.
    """
    from scipy.stats import t

    values = list(values)
    count = len(values)
    if count < 2 or not all(map(isfinite, values)):
        return mean(values), None
    return mean(values), float(t.ppf(0.975, count - 1)) * stdev(values) / count**0.5


def proportion(shares: Iterable[float], trials: int) -> tuple[float, float, float]:
    """Mean of proportions, such as accuracies of several runs, with its 95 % confidence interval.

    The interval is Wilson's ("Probable inference, the law of succession, and statistical inference", 1927),
    which stays between 0 and 1. It uses an effective number of trials, for which the binomial variance equals
    the variance of the mean: the variance within a run, whose trials are the same in every run, plus the
    variance between runs.

    Parameters
    ----------
    shares : iterable of float
        At least one proportion, between 0 and 1.
    trials : int
        Number of trials of a run, such as validation rows.

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
