"""Measurements as a tidy table, one row each. The table on disk is always complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, get_type_hints

from mumoe_tensor.ledger import Ledger, Row
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.study.layers import features
from mumoe_tensor.study.subjects import UNITS, Subject


@dataclass(frozen=True)
class Measurement:
    """One measured or computed figure of one subject.

    Attributes
    ----------
    task : str
        The task it came from, which is not repeated.
    sizes, experts, rank : str
        Numbers joined by x.
    subject, title : str
        See `Subject`.
    budget : int
        Requested number of parameters; 0 without a budget.
    device : str
        Empty for computed figures.
    batch : int or None
    seed : int or None
        Seed of the measurement.
    quantity, unit : str
        See `UNITS`.
    value : float or None
        The median, if it was repeated; None if it was not run, see `note`.
    low, high : float or None
        Quartiles.
    ratio, ratio_low, ratio_high : float or None
        Ratio to the dense layer's figure in the same round, median and quartiles.
    repetitions : int
    note : str
    """

    task: str
    sizes: str
    subject: str
    title: str
    experts: str
    rank: str
    budget: int
    device: str
    batch: int | None
    seed: int | None
    quantity: str
    unit: str
    value: float | None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    repetitions: int = 1
    note: str = ""

    @property
    def total(self) -> int:
        """Total number of experts over all levels."""
        return prod(map(int, filter(None, self.experts.split("x"))))

    @classmethod
    def of(cls, task: str, subject: Subject, quantity: str, value: float | None, **more: Any) -> Measurement:
        """A figure of a subject, with further attributes."""
        origin: dict[str, Any] = {"device": "", "batch": None, "seed": None}
        return cls(
            task=task, title=subject.title, budget=subject.budget, quantity=quantity, unit=UNITS[quantity],
            value=None if value is None else float(value), **_identity(subject), **origin | more,
        )  # fmt: skip


#: Names and types of the columns.
COLUMNS = get_type_hints(Measurement)


class Results:
    """Measurements so far, in memory or in a file.

    Parameters
    ----------
    path : Path, optional
        A CSV file; existing measurements are read.

    Raises
    ------
    ValueError
        If the file is not a table of measurements.
    """

    def __init__(self, path: Path | None = None):
        # Columns of the environment, which may differ between versions, are text.
        self._ledger = Ledger(path, COLUMNS, more=str)

    def __iter__(self) -> Iterator[Measurement]:
        return map(_measurement, self._ledger)

    def __len__(self) -> int:
        return len(self._ledger)

    @property
    def tasks(self) -> set[str]:
        """The finished tasks."""
        return {row["task"] for row in self._ledger}

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Distinct machines and versions of the rows, without date and load."""
        left = {*COLUMNS, "date", "load"}
        environments = ({k: value for k, value in row.items() if k not in left} for row in self._ledger)
        return list({tuple(environment.values()): environment for environment in environments}.values())

    def add(self, rows: Sequence[Measurement], environment: dict[str, Any]) -> None:
        """Add all rows of a task at once, with the machine, versions and commit."""
        self._ledger.add(asdict(row) | environment for row in rows)

    def of(self, quantity: str, **values: Any) -> list[Measurement]:
        """Measurements of a quantity whose attributes have given values."""
        return list(map(_measurement, self._ledger.of(quantity=quantity, **values)))

    def of_subject(self, subject: Subject, quantity: str, **values: Any) -> list[Measurement]:
        """Measurements of a subject's quantity with finite values, one for each repetition."""
        rows = self.of(quantity, **_identity(subject), **values)
        return [row for row in rows if is_figure(row.value)]


def is_figure(value: float | None) -> bool:
    """Whether a value was measured and is finite."""
    return value is not None and isfinite(value)


def joined(numbers: Iterable[int]) -> str:
    """Numbers joined by x."""
    return "x".join(map(str, numbers))


def sizes_of(spec: LayerSpec) -> str:
    """Feature sizes of a layer from input to output, joined by x."""
    return joined(features(spec))


def _identity(subject: Subject) -> dict[str, Any]:
    """The columns that identify a subject."""
    spec = subject.spec
    return {
        "subject": subject.name, "sizes": sizes_of(spec), "experts": joined(spec.experts),
        "rank": joined(spec.full_rank),
    }  # fmt: skip


def _measurement(row: Row) -> Measurement:
    return Measurement(**{name: row[name] for name in COLUMNS})
