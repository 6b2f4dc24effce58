"""An append-only table of finished runs, used to skip runs that it already contains."""

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
#: Converts the text of a cell to a value.
Parser = Callable[[str], Any]


class Ledger:
    """Rows of finished runs, in memory or in a CSV file.

    `add` is atomic: if the process is killed, the file contains all of its rows or none. Several processes
    may add to one file: `add` first reads the rows that others have added.

    Parameters
    ----------
    path : Path or None
        A CSV file, which need not exist yet. If None, the rows are kept in memory only.
    columns : mapping of str to type
        Names of columns, and their types: ``str``, ``int`` or ``float``. Cells of ``int | None`` and
        ``float | None`` may be empty, which means None and not NaN.
    more : callable, optional
        Converts the text of a cell in an undeclared column to a value. By default, undeclared columns raise a
        ValueError.

    Raises
    ------
    TypeError
        If the type of a column is not supported.
    ValueError
        If the columns of the file differ, or a cell does not have the type of its column; see `read_table`.
    """

    def __init__(self, path: Path | None, columns: Mapping[str, Any], *, more: Parser | None = None):
        self.path = path
        self._kinds = dict(columns)
        self._parsers = {name: _parser(name, kind) for name, kind in self._kinds.items()}
        self._more = more
        self._content: bytes | None = None
        self._names = list(self._kinds)
        # Rows are unique, so the text of a row's cells is its key.
        self._rows: dict[tuple[str, ...], Row] = {}
        self._read()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, **key: Any) -> bool:
        """Whether any row has these values."""
        return bool(self.of(**key))

    def of(self, **values: Any) -> list[Row]:
        """All rows with these values.

        Raises
        ------
        ValueError
            If there is no such column, or a value does not have the type of its column.
        """
        if self._rows and (unknown := [name for name in values if name not in self._names]):
            raise ValueError(f"names must be columns of the ledger, got {unknown}.")
        wanted = {name: self._value(name, value) for name, value in values.items()}
        return [row for row in self if all(row[name] == value for name, value in wanted.items())]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows atomically.

        Raises
        ------
        ValueError
            If a row does not have these columns, a value has the wrong type, or the row already
            exists.
        OSError
            If the file cannot be written. Then no row is added.
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
        """The rows as a pandas data frame. In float columns, None becomes NaN."""
        import pandas

        kinds = {name: _type_of(kind) for name, kind in self._kinds.items()}
        types = {name: "Int64" if kind is int else kind for name, kind in kinds.items()}
        return pandas.DataFrame(list(self), columns=self._names).astype(types)

    def _read(self) -> None:
        """Read the file if it has changed."""
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
            raise ValueError("the rows of a ledger must be unique, got a row that already exists.")
        if self.path is not None:
            # The existing bytes of the file are kept unless a column is added.
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
        """A value as it will be read from the file."""
        parse = self._parsers.get(name, self._more)
        assert parse is not None
        try:
            return parse(_text(value))
        except ValueError as error:
            raise ValueError(f"column {name}: {error}.") from None


def plain(text: str) -> int | float | str | None:
    """Parse the text of a cell: a number if possible, None if it is empty, otherwise the text."""
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
            f"a column must have type str, int, float, int | None or float | None, got {kind} for {name}."
        )
    of_text, may_be_none = _type_of(kind), kind != _type_of(kind)
    return lambda text: None if may_be_none and not text else of_text(text)


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    if "\0" in text or "\r" in text:
        raise ValueError(f"a cell must not contain NUL or carriage return, got {text!r}")
    return text


def _texts(row: Row) -> tuple[str, ...]:
    return tuple(map(_text, row.values()))


def _lines(rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
