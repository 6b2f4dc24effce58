"""Results of runs as one table. On disk it is whole at every moment, and what is in it is not run again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mumoe_tensor.files import write_table
from mumoe_tensor.readers import read_table

Row = dict[str, Any]


class Records:
    """Rows so far, each with the name of its run, and where they are kept.

    Parameters
    ----------
    path : Path
        A CSV file. What it has already is read; every `add` writes it anew, whole.
    columns : dict of str to type
        Beside ``run``, which comes first.

    Raises
    ------
    ValueError
        If the file has other columns, or an entry that is not of its type; see `read_table`.
    """

    def __init__(self, path: Path, columns: dict[str, type]):
        self.path = path
        self._columns = {"run": str, **columns}
        self._rows: list[Row] = []
        if path.exists():
            self._rows = read_table(path, self._columns)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def has(self, run: str) -> bool:
        """Whether the run is done."""
        return any(row["run"] == run for row in self._rows)

    def add(self, run: str, rows: Sequence[Row]) -> None:
        """Add all rows of a run at once."""
        self._rows += [{name: {"run": run, **row}[name] for name in self._columns} for row in rows]
        write_table(self.path, list(self._columns), self._rows)

    def of(self, **known: Any) -> list[Row]:
        """Rows that have these values."""
        return [row for row in self._rows if all(row[key] == value for key, value in known.items())]
