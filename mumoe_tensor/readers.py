"""Readers of files: one for each format. A complaint starts with the file's path and states the rule."""

from __future__ import annotations

import csv
import json
import lzma
import tokenize
import tomllib
import zipfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from math import isfinite, prod
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

#: What is raised for a damaged file. `TypeError`: a value is of another type; `RuntimeError`: too deeply
#: nested, or an archive with a password; `TokenError`: the header of an array.
_DAMAGED = (
    ValueError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, csv.Error,
    tokenize.TokenError,
)  # fmt: skip
#: Readers of the headers of NumPy's format. Version 3 is for structured arrays alone.
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Make what a damaged file raises a ValueError that starts with the path of the file.

    What the operating system says of a path stays: a missing file, a folder in the place of one.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{path}: {error}") from error
    except _DAMAGED as error:
        raise ValueError(f"{path}: {error}") from error


# ---- text -------------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """Read a text in UTF-8, with or without a byte order mark; every line then ends in a newline character.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        If it is empty, not UTF-8, or has the character NUL; the message names the line.
    """
    with reading(path):
        content = Path(path).read_bytes().removeprefix(BOM_UTF8)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            byte, where = content[error.start], _place(content, error.start)
            raise ValueError(f"a text must be UTF-8, got the byte 0x{byte:02x} {where}.") from None
        if not text:
            raise ValueError("a text must have characters, it is empty.")
        if b"\0" in content:
            where = _place(content, content.index(0))
            raise ValueError(f"a text must not have the character NUL, got one {where}.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _place(content: bytes, position: int) -> str:
    before = content[:position]
    return f"in line {before.count(10) + 1}, byte {position - before.rfind(10)}"


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        If it is no JSON, no object, or as `parse_json`.
    """
    text = read_text(path)
    with reading(path):
        return parse_json(text)


def parse_json(text: str) -> dict[str, Any]:
    """An object from JSON.

    Parameters
    ----------
    text : str

    Raises
    ------
    ValueError
        If it is no JSON object, has a key twice, NaN or infinity, or is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise ValueError("JSON must not be nested this deeply.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it must be JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, got {short(value)}.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object of JSON must have a key once, got {twice!r} twice.")
    return entries


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        If it is no TOML; the message names the line.
    """
    text = read_text(path)
    with reading(path):
        try:
            return tomllib.loads(text)
        except RecursionError:
            raise ValueError("TOML must not be nested this deeply.") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"settings must be TOML: {error}.") from None


def read_table(
    path: str | Path, columns: Mapping[str, Callable[[str], Any]], *, more: bool = False
) -> list[dict[str, Any]]:
    """Read a CSV file as `mumoe_tensor.files.write_table` writes it.

    Parameters
    ----------
    path : str or Path
    columns : mapping of str to callable
        Names of the columns, and what makes a value from its text.
    more : bool, default False
        Whether there may be further columns, which stay text.

    Raises
    ------
    ValueError
        If columns are missing, unknown or doubled, a row is cut off, doubled or has another number of values,
        or a value is not what its column has; the message names the line.
    """
    text = read_text(path)
    with reading(path):
        if not text.endswith("\n"):
            raise ValueError("a table must end with a whole line; the last one is cut off.")
        # (Lines of text may end in other characters too, which stand in the middle of cells.)
        names, *rows = csv.reader(StringIO(text), strict=True)
        missing = [name for name in columns if name not in names]
        others = [name for name in names if name not in columns]
        if missing or len(set(names)) < len(names) or (others and not more):
            wrong = sorted(set(others) if not more else ()) + [n for n in names if names.count(n) > 1]
            raise ValueError(
                f"a table must have its columns, each once; missing {missing}, unknown or doubled {wrong}."
            )
        seen: set[tuple[str, ...]] = set()
        table = []
        for number, row in enumerate(rows, 1):
            if len(row) != len(names) or tuple(row) in seen:
                what = "is there twice" if tuple(row) in seen else f"has {len(row)}"
                raise ValueError(f"a row must be there once, with {len(names)} values; row {number} {what}.")
            seen.add(tuple(row))
            values: dict[str, Any] = dict(zip(names, row, strict=True))
            for name, of_text in columns.items():
                try:
                    values[name] = of_text(values[name])
                except ValueError as error:
                    raise ValueError(f"row {number}, column {name}: {error}.") from None
            table.append(values)
    return table


def finite(text: str) -> float:
    """A number from its text.

    Raises
    ------
    ValueError
        If it is none, or not finite.
    """
    if not isfinite(float(text)):
        raise ValueError(f"a number must be finite, got {text}")
    return float(text)


# ---- arrays -----------------------------------------------------------------------------------------------


def array_names(path: str | Path) -> list[str]:
    """Names of the arrays in a NumPy archive."""
    with reading(path), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        return [entry.removesuffix(".npy") for entry in archive.namelist()]


def read_arrays(path: str | Path, names: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """Read arrays of numbers from a NumPy archive; a declared shape takes no memory before it is checked.

    Parameters
    ----------
    path : str or Path
        Of an ``.npz`` file; it may have other arrays too.
    names : sequence of str

    Returns
    -------
    list of ndarray
        Of real numbers, read-only, in the byte order of the machine.

    Raises
    ------
    ValueError
        If the file is no such archive or damaged, or an array is missing, doubled or not of real numbers.
    """
    with reading(path), open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            keywords = ", ".join(f"{name}=…" for name in names)
            raise ValueError(f"it must be .npz, got a single array (.npy); see np.savez(path, {keywords}).")
        with zipfile.ZipFile(file) as archive:
            entries = [entry.removesuffix(".npy") for entry in archive.namelist()]
            if any(entries.count(name) != 1 for name in names):
                raise ValueError(
                    f"it must have arrays {' and '.join(names)}, each once; it has {sorted(entries)}."
                )
            return [_array(name, archive.read(archive.namelist()[entries.index(name)])) for name in names]


def _array(name: str, content: bytes) -> np.ndarray[Any, Any]:
    file = BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"{name} must be an array of numbers, got NumPy's format {version}.")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, got an array of {dtype}.")
    start, expected = file.tell(), prod(shape) * dtype.itemsize
    if len(content) - start != expected:
        raise ValueError(
            f"{name} of shape {shape} and {dtype} has {expected:,} bytes, got {len(content) - start:,}."
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


# ---- objects ----------------------------------------------------------------------------------------------


def checked(kind: type[T], values: Any) -> T:
    """A dataclass from what JSON has of it; no value is made into one of another type.

    Parameters
    ----------
    kind : type
    values : dict
        As JSON has it.

    Raises
    ------
    ValueError
        If a value is missing, unknown or of another type; the message names its key.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        rule = first["msg"].removeprefix("Value error, ").rstrip(".")
        keys = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":
            raise ValueError(f"{keys}: {rule}." if keys else f"{rule}.") from None
        raise ValueError(f"{keys or 'the whole'}: {rule}, got {short(first['input'])}.") from None
