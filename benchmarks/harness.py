"""Reports of comparisons: as printed tables, as JSON, and in a ledger."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mumoe_tensor.files import whole_file
from mumoe_tensor.ledger import Ledger, plain
from mumoe_tensor.text_table import text_table


@contextmanager
def threads(count: int) -> Iterator[str]:
    """Set the number of threads of NumPy and torch; yields the numbers in use, as text."""
    with ExitStack() as stack:
        used = []
        if find_spec("threadpoolctl"):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(count))
            used.append(f"NumPy {count}")
        else:
            used.append(f"NumPy {os.environ.get('OMP_NUM_THREADS', 'its default')} (no threadpoolctl)")
        if find_spec("torch"):
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(count)
            used.append(f"torch {torch.get_num_threads()}")
        yield ", ".join(used)


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
    rows: list[dict[str, Any]]
    notes: list[str]

    def __str__(self) -> str:
        cells = [list(self.columns)]
        for row in self.rows:
            values = [(row.get(column), spec) for column, spec in self.columns.items()]
            cells.append(["-" if value is None else format(value, spec) for value, spec in values])
        align = "".join(">" if spec else "<" for spec in self.columns.values())
        return "\n".join([self.title, text_table(cells, align), *self.notes])


def write_json(path: Path, reports: Sequence[Report], about: Mapping[str, Any]) -> None:
    """Write reports as JSON, together with the environment `about`."""
    content = {"about": dict(about), "reports": [asdict(report) for report in reports]}
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> tuple[list[Report], dict[str, Any]]:
    """Read a file written by `write_json`."""
    content = json.loads(path.read_text())
    return [Report(**report) for report in content["reports"]], content["about"]


def keep(path: Path, report: Report, about: Mapping[str, Any]) -> None:
    """Append the rows of a report, together with the environment `about`, to a table."""
    Ledger(path, {}, more=plain).add({"report": report.name, **row, **about} for row in report.rows)
