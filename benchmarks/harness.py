"""Reports of comparisons as printed tables and as JSON, and the columns that they share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mumoe_tensor.files import whole_file
from mumoe_tensor.measure.timing import Comparison, Spread
from mumoe_tensor.text_table import text_table

Row = dict[str, Any]
MIB = 2**20


@contextmanager
def threads(count: int) -> Iterator[str]:
    """Set the number of threads of torch, and of NumPy if threadpoolctl is installed; yields them as text."""
    before, limits, of_numpy = torch.get_num_threads(), nullcontext(), "NumPy not limited"
    if find_spec("threadpoolctl"):
        from threadpoolctl import threadpool_limits

        limits, of_numpy = threadpool_limits(count), f"NumPy {count}"
    with limits:
        torch.set_num_threads(count)
        try:
            yield f"{of_numpy}, torch {count}"
        finally:
            torch.set_num_threads(before)


def effort(quick: bool, rounds: int = 15, limit: float = 20.0) -> dict[str, Any]:
    """The number of rounds of `compare` and its time limit, both small if `quick`."""
    return {"rounds": 3, "limit": 1.0} if quick else {"rounds": rounds, "limit": limit}


def times(timings: Comparison, names: Iterable[str], unit: str = "ms") -> Row:
    """Median times per call, as columns."""
    scale = {"ms": 1e3, "us": 1e6}[unit]
    return {f"{name} {unit}": scale * timings.spread(name).median for name in names}


def quartiles(spread: Spread, name: str, low: str = "low", high: str = "high", scale: float = 1) -> Row:
    """A median and its quartiles, as columns."""
    return {column: scale * value for column, value in zip((name, low, high), spread, strict=True)}


@dataclass(frozen=True)
class Report:
    """The results of a comparison as a table.

    Attributes
    ----------
    name, title : str
    columns : dict of str to str
        Format of the numbers in each column, e.g. ``",.1f"``; empty for text.
    rows : list of dict
        One entry per column; missing entries and None are printed as ``-``.
    notes : list of str
        Explanations of the table, one line each.
    """

    name: str
    title: str
    columns: dict[str, str]
    rows: list[Row]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        cells = [list(self.columns)]
        for row in self.rows:
            values = [(row.get(column), spec) for column, spec in self.columns.items()]
            cells.append(["-" if value is None else format(value, spec) for value, spec in values])
        align = "".join(">" if spec else "<" for spec in self.columns.values())
        return "\n".join([self.title, text_table(cells, align), *self.notes])


def about_text(about: Mapping[str, Any]) -> str:
    """The environment of a measurement as one line."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


def write_json(path: Path, reports: Sequence[Report], about: Mapping[str, Any]) -> None:
    """Write reports as JSON, together with the environment `about`."""
    content = {"about": dict(about), "reports": [asdict(report) for report in reports]}
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
