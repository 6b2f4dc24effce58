"""A table of finished runs. Rows are only added, and a run that has its rows is not done again."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from mumoe_tensor.files import locked, whole_file
from mumoe_tensor.readers import read_table

Row = dict[str, Any]
#: What makes a value from the text of a cell.
Parser = Callable[[str], Any]


class Ledger:
    """Rows of finished runs, in memory or in a CSV file.

    A process that is killed during an `add` leaves all of its rows in the file, or none. Several processes
    may add to one file: an `add` first reads what the others have added.

    Parameters
    ----------
    path : Path or None
        A CSV file, which need not exist yet. Without one the rows stay in memory.
    columns : mapping of str to type
        Names of columns, and ``str``, ``int`` or ``float``. Cells of ``int | None`` and ``float | None`` may
        be empty; NaN is another value than None.
    more : callable, optional
        Makes a value from the text of a cell in columns that are not declared. By default there are none.

    Raises
    ------
    TypeError
        If a column has another type.
    ValueError
        If the file has other columns, or a cell that is not of its type; see `read_table`.
    """

    def __init__(self, path: Path | None, columns: Mapping[str, Any], *, more: Parser | None = None):
        self.path = path
        self._kinds = dict(columns)
        self._parsers = {name: _parser(name, kind) for name, kind in self._kinds.items()}
        self._more = more
        self._content: bytes | None = None
        self._names = list(self._kinds)
        # A table has a row once; so its cells as text are its key.
        self._rows: dict[tuple[str, ...], Row] = {}
        self._read()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, **key: Any) -> bool:
        """Whether a row has these values."""
        return bool(self.of(**key))

    def of(self, **values: Any) -> list[Row]:
        """Rows that have these values.

        Raises
        ------
        ValueError
            If there is no such column, or a value is not of the type of its column.
        """
        if self._rows and (unknown := [name for name in values if name not in self._names]):
            raise ValueError(f"a ledger must have the columns that are asked for; it has no {unknown}.")
        wanted = {name: self._value(name, value) for name, value in values.items()}
        return [row for row in self if all(row[name] == value for name, value in wanted.items())]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, all at once.

        Raises
        ------
        ValueError
            If a row has other columns, a value that is not of the type of its column, or is there already.
        OSError
            If the file cannot be written. Then nothing is added.
        """
        rows = list(rows)
        if self.path is None:
            self._extend(rows)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            self._read()
            self._extend(rows)

    def frame(self) -> Any:
        """The rows as a pandas frame. In columns of floats None is NaN."""
        import pandas

        kinds = {name: _type_of(kind) for name, kind in self._kinds.items()}
        types = {name: "Int64" if kind is int else kind for name, kind in kinds.items()}
        return pandas.DataFrame(list(self), columns=self._names).astype(types)

    def _read(self) -> None:
        """Read the file, unless it is as it was."""
        content = self.path.read_bytes() if self.path is not None and self.path.exists() else None
        if self.path is None or content == self._content:
            return
        rows = [] if content is None else read_table(self.path, self._parsers, more=self._more is not None)
        for row in rows:
            row.update({name: self._value(name, row[name]) for name in row if name not in self._kinds})
        self._names = list(rows[0]) if rows else list(self._kinds)
        self._rows = {_texts(row): row for row in rows}
        self._content = content

    def _extend(self, rows: list[Mapping[str, Any]]) -> None:
        for row in rows:
            missing = [name for name in self._kinds if name not in row]
            unknown = [name for name in row if name not in self._kinds]
            if missing or (unknown and self._more is None):
                raise ValueError(
                    f"a row must have the columns of its ledger; missing {missing}, unknown {unknown}."
                )
        names = list(dict.fromkeys([*self._names, *(name for row in rows for name in row)]))
        grows = names != self._names
        old = self._keyed(names, self) if grows else self._rows
        new = self._keyed(names, rows)
        if len(new) < len(rows) or new.keys() & old.keys():
            raise ValueError("a table must have a row once, got one that is there already.")
        if self.path is not None:
            # What is in the file stays as it is, byte by byte, unless all rows get another column. (To copy
            # two megabytes takes half as long as to wait for a disk that has one more line.)
            is_whole = grows or not old
            content = _lines([names, *old, *new]) if is_whole else (self._content or b"") + _lines(new)
            with whole_file(self.path) as file:
                file.write(content)
            self._content = content
        self._names, self._rows = names, old | new

    def _keyed(self, names: list[str], rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], Row]:
        values = ({name: self._value(name, row.get(name)) for name in names} for row in rows)
        return {_texts(row): row for row in values}

    def _value(self, name: str, value: Any) -> Any:
        """What the file will say of a value."""
        parse = self._parsers.get(name, self._more)
        assert parse is not None
        try:
            return parse(_text(value))
        except ValueError as error:
            raise ValueError(f"column {name}: {error}.") from None


def plain(text: str) -> int | float | str | None:
    """A value from its text, by its looks: a number if it is one, None if it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def _type_of(kind: Any) -> type:
    (plain_kind,) = {*(get_args(kind) or (kind,))} - {NoneType}
    return plain_kind


def _parser(name: str, kind: Any) -> Parser:
    if kind not in (str, int, float, int | None, float | None):
        raise TypeError(
            f"a column must be of str, int or float, or one of these or None; {name} is of {kind}."
        )
    of_text, may_be_none = _type_of(kind), kind != _type_of(kind)
    return lambda text: None if may_be_none and not text else of_text(text)


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    if "\0" in text or "\r" in text:
        raise ValueError(f"a cell must have no NUL and no carriage return, got {text!r}")
    return text


def _texts(row: Row) -> tuple[str, ...]:
    return tuple(map(_text, row.values()))


def _lines(rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
