"""Compare callables in one process, as ratios to one of them. Needs the standard library only.

A machine's speed drifts by more than what is to be told apart, so the callables take turns, and every
figure of one is set against the baseline's figure of the same turn.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any, NamedTuple

#: Rounds that are run even if the time for them has passed.
FEWEST_ROUNDS = 3


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
        Seconds a call, one entry a round. Entries of the same position were taken one after the other.
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
        return Spread.of(mine / base for mine, base in self._pairs(name))

    def excess(self, name: str) -> Spread:
        """Seconds a call more than the baseline's, round by round."""
        return Spread.of(mine - base for mine, base in self._pairs(name))

    def _pairs(self, name: str) -> Iterator[tuple[float, float]]:
        return zip(self.seconds[name], self.seconds[self.baseline], strict=True)


def compare(
    callables: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    rounds: int = 15,
    turn: float = 2e-3,
    limit: float = 5.0,
    clock: Callable[[], float] = perf_counter,
) -> Comparison:
    """Time callables in turns A B C A B C ..., after a warm-up that also sets how often a turn calls.

    Parameters
    ----------
    callables : mapping of str to callable
        Called without arguments, in this order.
    baseline : str
        One of the names.
    rounds : int
        Turns of each.
    turn : float
        Seconds that a turn lasts at least: quick callables are called in a loop.
    limit : float
        Seconds after which no new round begins, but for the first three.
    clock : callable
    """
    if baseline not in callables:
        raise ValueError(f"the baseline must be one of {', '.join(map(repr, callables))}, got {baseline!r}.")
    loops = {name: _calibrated(function, turn, clock) for name, function in callables.items()}
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    with _no_collection():
        start = clock()
        for done in range(rounds):
            if done >= FEWEST_ROUNDS and clock() - start > limit:
                break
            for name, function in callables.items():
                seconds[name].append(_timed(function, loops[name], clock) / loops[name])
    return Comparison(baseline, {name: tuple(s) for name, s in seconds.items()}, loops)


def _calibrated(function: Callable[[], object], turn: float, clock: Callable[[], float]) -> int:
    """Warm a callable up; the number of calls that last at least a turn."""
    function()
    loops = 1
    while _timed(function, loops, clock) < turn:
        loops *= 2
    return loops


def _timed(function: Callable[[], object], loops: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in repeat(None, loops):
        function()
    return clock() - start


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a turn."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(count: int) -> Iterator[str]:
    """Have NumPy and torch use so many threads; tells what they really use."""
    with ExitStack() as stack:
        told = []
        if find_spec("threadpoolctl"):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(count))
            told.append(f"NumPy {count}")
        else:
            told.append(f"NumPy {os.environ.get('OMP_NUM_THREADS', 'its default')} (no threadpoolctl)")
        if find_spec("torch"):
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
            told.append(f"torch {torch.get_num_threads()}")
        yield ", ".join(told)


@dataclass(frozen=True)
class Report:
    """A comparison's outcome, as a table.

    Attributes
    ----------
    name, title : str
    columns : dict of str to str
        Format of the numbers in each column, e.g. ``",.1f"``; empty for text.
    rows : list of dict
        One entry a column; a missing one or None is printed as ``-``.
    notes : list of str
        What has to be known to read it.
    """

    name: str
    title: str
    columns: dict[str, str]
    rows: list[dict[str, Any]]
    notes: list[str]

    def __str__(self) -> str:
        cells = [list(self.columns)]
        for row in self.rows:
            values = [(row.get(column), spec) for column, spec in self.columns.items()]
            cells.append(["-" if value is None else format(value, spec) for value, spec in values])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(_justified, row, widths, self.columns.values())).rstrip() for row in cells]
        rule = "-" * max(map(len, lines))
        return "\n".join([self.title, rule, lines[0], rule, *lines[1:], *self.notes])


def _justified(cell: str, width: int, spec: str) -> str:
    return cell.rjust(width) if spec else cell.ljust(width)


def environment() -> dict[str, str]:
    """Machine and versions that figures belong to."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for package in ("mumoe_tensor", "numpy", "opt_einsum", "tensorly", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def write_json(path: Path, reports: Sequence[Report], about: Mapping[str, Any]) -> None:
    """Write reports, and what they belong to, as JSON."""
    content = {"about": dict(about), "reports": [asdict(report) for report in reports]}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> tuple[list[Report], dict[str, Any]]:
    """Read what `write_json` wrote."""
    content = json.loads(path.read_text())
    return [Report(**report) for report in content["reports"]], content["about"]


def write_csv(path: Path, reports: Sequence[Report], about: Mapping[str, Any]) -> None:
    """Write a tidy table: one line a figure, with the report, its row and what it belongs to in each."""
    text = io.StringIO(newline="")
    lines = [
        {"report": report.name, "row": k, "column": column, "value": row.get(column), **about}
        for report in reports
        for k, row in enumerate(report.rows)
        for column in report.columns
    ]
    writer = csv.DictWriter(text, ["report", "row", "column", "value", *about], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder, path.name)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
