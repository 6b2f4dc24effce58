"""Interleaved timing of callables in one process, relative to a baseline.

The speed of a machine drifts by more than the differences of interest, so every time is compared with that of
the baseline in the same round.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from random import Random
from statistics import quantiles
from time import perf_counter
from typing import NamedTuple

import torch

from mumoe_tensor.checks import check_choice

#: Minimum number of rounds, regardless of the time limit.
FEWEST_ROUNDS = 3
#: Number of warm-up calls. On CUDA the first calls load, select and compile kernels.
WARM_UP = {"cpu": 1, "cuda": 3}


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Median and quartiles of one or more values."""
        values = list(values)
        low, median, high = quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
        return cls(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """Interleaved times of named callables.

    Attributes
    ----------
    baseline : str
        Name of the callable with which the others are compared.
    seconds : dict of str to tuple of float
        Seconds per call, one entry per round.
    loops : dict of str to int
        Number of calls in each round.
    """

    baseline: str
    seconds: dict[str, tuple[float, ...]]
    loops: dict[str, int]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.seconds[self.baseline])

    def spread(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str) -> Spread:
        """Time per call divided by that of the baseline in the same round."""
        return Spread.of(value / base for value, base in self._pairs(name))

    def excess(self, name: str) -> Spread:
        """Time per call minus that of the baseline in the same round, in seconds."""
        return Spread.of(value - base for value, base in self._pairs(name))

    def _pairs(self, name: str) -> Iterator[tuple[float, float]]:
        return zip(self.seconds[name], self.seconds[self.baseline], strict=True)


def compare(
    callables: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    rounds: int = 15,
    turn: float = 2e-3,
    limit: float = 5.0,
    device: str = "cpu",
    clock: Callable[[], float] = perf_counter,
) -> Comparison:
    """Time callables in interleaved rounds, after a warm-up that also sets the number of calls per round.

    The order is random in each round, since the caches depend on the previous callable.

    Parameters
    ----------
    callables : mapping of str to callable
        Functions without arguments.
    baseline : str
        Name of the baseline.
    rounds : int
        Number of rounds.
    turn : float
        Minimum time in seconds of a callable in a round: fast callables are called in a loop.
    limit : float
        Time in seconds after which no new round begins, except the first three.
    device : {"cpu", "cuda"}, default "cpu"
        Device of the callables, which is synchronised before and after each measurement.

    Raises
    ------
    ValueError
        If the baseline is not one of the callables, or the device is unknown.
    """
    if baseline not in callables:
        raise ValueError(f"the baseline must be one of {', '.join(map(repr, callables))}, got {baseline!r}.")
    check_choice(device, WARM_UP, "device")
    finish: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(function: Callable[[], object], loops: int) -> float:
        finish()
        start = clock()
        for _ in repeat(None, loops):
            function()
        finish()
        return clock() - start

    loops = {name: 1 for name in callables}
    for name, function in callables.items():
        for _ in range(WARM_UP[device]):
            function()
        while timed(function, loops[name]) < turn:
            loops[name] *= 2
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    with _no_collection():
        start, orders = clock(), Random(0)
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and clock() - start > limit:
                break
            for name in orders.sample([*callables], len(callables)):
                seconds[name].append(timed(callables[name], loops[name]) / loops[name])
    return Comparison(baseline, {name: tuple(s) for name, s in seconds.items()}, loops)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection within the context."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
