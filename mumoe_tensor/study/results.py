"""Measurements as a tidy table, one row each. The table on disk is whole at every moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from mumoe_tensor.files import write_table
from mumoe_tensor.readers import read_table
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.study.layers import features
from mumoe_tensor.study.subjects import UNITS, Subject


@dataclass(frozen=True)
class Measurement:
    """One figure of one subject.

    Attributes
    ----------
    task : str
        The task it came from, which is not done again.
    sizes, experts, rank : str
        Numbers with an x between.
    subject, title : str
        See `Subject`.
    budget : int
        Parameters asked for; 0 where nothing was fitted.
    device : str
        Empty for what is computed.
    batch : int or None
    seed : int or None
        Of what is random in it.
    quantity, unit : str
        See `UNITS`.
    value : float or None
        A median where it was repeated; None where it was not run, see `note`.
    low, high : float or None
        Quartiles.
    ratio, ratio_low, ratio_high : float or None
        Over the dense layer's figure of the same turn, median and quartiles.
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
    """Numbers with an x between."""
    return "x".join(map(str, numbers))


def sizes_of(spec: LayerSpec) -> str:
    """Sizes of a layer from the input to the output, with an x between."""
    return joined(features(spec))


def total(experts: str) -> int:
    """Number of experts of all levels together, from how they are written."""
    count = 1
    for n in experts.split("x") if experts else ():
        count *= int(n)
    return count


class Results:
    """Measurements so far, in memory or in a file.

    Parameters
    ----------
    path : Path, optional
        A CSV file. What it has already is read; every `add` writes it anew, whole.

    Raises
    ------
    ValueError
        If the file is no table of measurements.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._rows: list[tuple[Measurement, dict[str, Any]]] = []
        if path is not None and path.exists():
            self._rows = list(_read(path))

    def __iter__(self) -> Iterator[Measurement]:
        return (row for row, _ in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def tasks(self) -> set[str]:
        """The tasks that are done."""
        return {row.task for row in self}

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Machines and versions of the rows, without date and load, each once."""
        environments = {}
        for _, about in self._rows:
            environment = {k: str(v or "") for k, v in about.items() if k not in ("date", "load")}
            environments[tuple(environment.values())] = environment
        return list(environments.values())

    def add(self, rows: Sequence[Measurement], environment: dict[str, Any]) -> None:
        """Add all rows of a task at once.

        Parameters
        ----------
        environment : dict
            Machine, versions and commit.
        """
        self._rows += [(row, environment) for row in rows]
        if self.path is not None:
            lines = [asdict(row) | about for row, about in self._rows]
            # Another version may record other columns.
            write_table(self.path, list(dict.fromkeys(name for line in lines for name in line)), lines)

    def of(self, quantity: str, **values: Any) -> list[Measurement]:
        """Measurements of a quantity that have these values.

        Parameters
        ----------
        **values
            Attributes and their values.
        """
        return [
            row
            for row in self
            if row.quantity == quantity and all(getattr(row, k) == v for k, v in values.items())
        ]


def _read(path: Path) -> Iterator[tuple[Measurement, dict[str, Any]]]:
    names = {f.name: partial(_parsed, kind=str(f.type)) for f in fields(Measurement)}
    for row in read_table(path, names, more=True):
        yield Measurement(**{name: row.pop(name) for name in names}), row


def _parsed(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    if not text and kind.endswith("None"):
        return None
    return int(text) if kind.startswith("int") else float(text)
