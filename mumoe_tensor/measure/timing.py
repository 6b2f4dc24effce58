"""Times of callables that take turns in one process, as ratios to one of them.

A machine's speed drifts by more than what is to be told apart, so every figure of one callable is set against
the baseline's figure of the same turn.
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

#: Rounds that are run even if the time for them has passed.
FEWEST_ROUNDS = 3
#: Calls before the first that is timed. On CUDA the first ones load, choose and compile kernels.
WARM_UP = {"cpu": 1, "cuda": 3}


class Spread(NamedTuple):
    """The median of some figures, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of these values, at least one."""
        values = list(values)
        low, median, high = quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
        return cls(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """Times of named callables that took turns.

    Attributes
    ----------
    baseline : str
        The callable that the others are compared with.
    seconds : dict of str to tuple of float
        Seconds a call, one entry a round. Entries of the same position are of one round.
    loops : dict of str to int
        Calls in each entry.
    """

    baseline: str
    seconds: dict[str, tuple[float, ...]]
    loops: dict[str, int]

    @property
    def rounds(self) -> int:
        """How often each callable had its turn."""
        return len(self.seconds[self.baseline])

    def spread(self, name: str) -> Spread:
        """Seconds a call."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str) -> Spread:
        """Seconds a call over the baseline's, round by round."""
        return Spread.of(value / base for value, base in self._pairs(name))

    def excess(self, name: str) -> Spread:
        """Seconds a call more than the baseline's, round by round."""
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
    """Time callables in turns, after a warm-up that also sets how often a turn calls.

    Each round has its own order: a call is slower after one that left the caches full.

    Parameters
    ----------
    callables : mapping of str to callable
        Called without arguments.
    baseline : str
        One of the names.
    rounds : int
        Turns of each.
    turn : float
        Seconds that a turn lasts at least: quick callables are called in a loop.
    limit : float
        Seconds after which no new round begins, but for the first three.
    device : {"cpu", "cuda"}, default "cpu"
        Where the callables compute. A turn begins and ends when the device has no work left.

    Raises
    ------
    ValueError
        If the baseline is none of the callables.
    """
    if baseline not in callables:
        raise ValueError(f"the baseline must be one of {', '.join(map(repr, callables))}, got {baseline!r}.")
    finish = synchronizer(device)

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


def synchronizer(device: str) -> Callable[[], object]:
    """A function that waits until the device has done its work; on a CPU it does nothing.

    Parameters
    ----------
    device : {"cpu", "cuda"}

    Raises
    ------
    ValueError
        If the device is another.
    """
    if device not in WARM_UP:
        raise ValueError(f"device must be one of {', '.join(map(repr, WARM_UP))}, got {device!r}.")
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a turn."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
