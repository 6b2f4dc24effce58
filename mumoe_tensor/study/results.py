"""Measurements as a tidy table, one row each. The table on disk is always complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
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

    @classmethod
    def of(cls, task: str, subject: Subject, quantity: str, value: float | None, **more: Any) -> Measurement:
        """A figure of a subject.

        Parameters
        ----------
        quantity : str
            A key of `UNITS`.
        **more
            Further attributes.
        """
        origin: dict[str, Any] = {"device": "", "batch": None, "seed": None} | more
        return cls(
            task=task,
            sizes=sizes_of(subject.spec),
            subject=subject.name,
            title=subject.title,
            experts=joined(subject.spec.experts),
            rank=joined(subject.spec.full_rank),
            budget=subject.budget,
            quantity=quantity,
            unit=UNITS[quantity],
            value=None if value is None else float(value),
            **origin,
        )


def joined(numbers: Iterable[int]) -> str:
    """Numbers joined by x."""
    return "x".join(map(str, numbers))


def sizes_of(spec: LayerSpec) -> str:
    """Feature sizes of a layer from input to output, joined by x."""
    return joined(features(spec))


def total(experts: str) -> int:
    """Total number of experts over all levels, from their text."""
    count = 1
    for n in experts.split("x") if experts else ():
        count *= int(n)
    return count


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
        self.path = path
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
        """Add all rows of a task at once.

        Parameters
        ----------
        environment : dict
            Machine, versions and commit.
        """
        self._ledger.add(asdict(row) | environment for row in rows)

    def of(self, quantity: str, **values: Any) -> list[Measurement]:
        """Measurements of a quantity whose attributes have given values.

        Parameters
        ----------
        **values
            Attributes and their values.
        """
        return list(map(_measurement, self._ledger.of(quantity=quantity, **values)))

    def of_subject(self, subject: Subject, quantity: str, **values: Any) -> list[Measurement]:
        """Measurements of a subject's quantity with finite values, one for each repetition."""
        experts, rank = joined(subject.spec.experts), joined(subject.spec.full_rank)
        rows = self.of(
            quantity, subject=subject.name, sizes=sizes_of(subject.spec), experts=experts, rank=rank, **values
        )
        return [row for row in rows if row.value is not None and isfinite(row.value)]


def _measurement(row: Row) -> Measurement:
    return Measurement(**{name: row[name] for name in COLUMNS})
