"""Tables of the experiments, with one row per finished run, and statistics over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mumoe_tensor import files
from mumoe_tensor.interval import interval
from mumoe_tensor.jobs import side_by_side
from mumoe_tensor.ledger import Ledger, Row, plain
from mumoe_tensor.measure.environment import environment_text
from mumoe_tensor.progress import progress_bar

ROOT = Path(__file__).resolve().parents[2]
DATA, TABLES = ROOT / "data", ROOT / "paper_figures" / "tables"


def table(name: str) -> Ledger:
    """A table of the experiment."""
    return Ledger(TABLES / f"{name}.csv", {}, more=plain)


def write_table(name: str, rows: Sequence[Row]) -> None:
    """Write a table atomically."""
    files.write_table(TABLES / f"{name}.csv", list(rows[0]), rows)


def keep(name: str, tasks: Sequence[tuple[Row, tuple[Any, ...]]], work: Any, jobs: int | str) -> None:
    """Run the tasks without a row in a table; a task is the key columns of its row and its arguments."""
    kept = table(name)
    where = environment_text()
    left = [arguments for key, arguments in tasks if not kept.has(**key)]
    for row in go_through(left, work, jobs):
        kept.add([row | {"measured": where}])


def go_through(tasks: Sequence[tuple[Any, ...]], work: Any, jobs: int | str) -> Iterator[Any]:
    """Yield results as they arrive."""
    results = side_by_side([partial(work, *task) for task in tasks], jobs)
    with progress_bar("experiment") as progress:
        for count, (_, result) in enumerate(results, 1):
            yield result
            progress(count, len(tasks), f"{count} of {len(tasks)}")


def tuned_rate(tuned: Ledger, key: Row, rates: Sequence[float]) -> float:
    """The rate with the highest accuracy among rows with these columns; all rates must have been tried."""
    group = tuned.of(**key)
    if len(group) != len(rates):
        raise ValueError(f"learning rates must be tried first, with `tune`; {key} has {len(group)}.")
    return float(max(group, key=lambda row: row["accuracy"])["learning_rate"])


def grouped(rows: Iterable[Row], *columns: str) -> dict[Any, list[Row]]:
    """The rows by the value of a column, or by the values of several, in the order of first occurrence."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[column] for column in columns) if columns[1:] else row[columns[0]]
        groups.setdefault(key, []).append(row)
    return groups


def means(rows: Iterable[Row], by: str, columns: Sequence[str]) -> list[Row]:
    """Means over seeds for each value of a column."""
    records = []
    for value, group in grouped(rows, by).items():
        constant = {c: group[0][c] for c in columns if len({row[c] for row in group}) == 1}
        mean = {c: constant[c] if c in constant else fmean(row[c] for row in group) for c in columns}
        records.append({by: value, **mean, "seeds": len(group)})
    return records


def over_seeds(rows: Sequence[Row], column: str) -> Row:
    """The mean of a column and its 95 % interval over seeds, as columns for figures."""
    mean, half = interval([row[column] for row in rows])
    return {column: mean, f"{column}_low": mean - (half or 0), f"{column}_high": mean + (half or 0)}


def difference(one: Mapping[int, float], other: Mapping[int, float], unit: float = 1) -> Row:
    """Mean and 95 % interval of the paired differences, over the seeds that both have; None without any."""
    values = [unit * (one[seed] - other[seed]) for seed in sorted(one.keys() & other.keys())]
    mean, half = interval(values) if values else (None, None)
    return {"mean": mean, "half": half, "seeds": len(values)}
