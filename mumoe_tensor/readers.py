"""Readers of files, one for each file format.

Error messages start with the path and state the rule that the file violates.
"""

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

#: Exceptions for damaged files. `TypeError`: a value of the wrong type; `RuntimeError`: nested too deeply, or
#: an archive with a password; `TokenError`: the header of an array.
_DAMAGED = (
    ValueError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, csv.Error,
    tokenize.TokenError,
)  # fmt: skip
#: Readers of the headers of NumPy's file format. Only structured arrays use version 3.
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Convert exceptions that a damaged file causes to a ValueError that starts with the path.

    Errors of the operating system that name a path are not changed, for example if the file is missing.
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
    """Read UTF-8 text, with or without a byte order mark; line endings become newline characters.

    Raises
    ------
    ValueError
        If the text is empty, is not UTF-8, or contains NUL; the message names the line.
    """
    with reading(path):
        content = Path(path).read_bytes().removeprefix(BOM_UTF8)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            byte, where = content[error.start], _place(content, error.start)
            raise ValueError(f"a text must be UTF-8, got the byte 0x{byte:02x} {where}.") from None
        if not text:
            raise ValueError("a text must not be empty.")
        if b"\0" in content:
            where = _place(content, content.index(0))
            raise ValueError(f"a text must not contain a NUL character, got one {where}.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _place(content: bytes, position: int) -> str:
    before = content[:position]
    return f"in line {before.count(10) + 1}, byte {position - before.rfind(10)}"


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ValueError
        If the file is not a JSON object; see `parse_json`.
    """
    text = read_text(path)
    with reading(path):
        return parse_json(text)


def parse_json(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    ValueError
        If the text is not a JSON object, contains a key twice, NaN or infinity, or is nested too deeply.
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
        raise ValueError(f"the keys of a JSON object must be unique, got {twice!r} twice.")
    return entries


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    ValueError
        If the file is not TOML; the message names the line.
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
    """Read a CSV file written by `mumoe_tensor.files.write_table`.

    Parameters
    ----------
    columns : mapping of str to callable
        Names of the columns, and functions that convert the text of a cell to a value.
    more : bool, default False
        Whether further columns are allowed; their values remain text.

    Raises
    ------
    ValueError
        If columns are missing, unknown or repeated, a row is truncated, repeated or has the wrong number of
        values, or a value cannot be converted; the message names the row.
    """
    text = read_text(path)
    with reading(path):
        if not text.endswith("\n"):
            raise ValueError("a table must end with a complete line; the last one is truncated.")
        # `str.splitlines` would also split at other characters, which may be inside cells.
        names, *rows = csv.reader(StringIO(text), strict=True)
        missing = [name for name in columns if name not in names]
        others = [name for name in names if name not in columns]
        if missing or len(set(names)) < len(names) or (others and not more):
            wrong = sorted(set(others) if not more else ()) + [n for n in names if names.count(n) > 1]
            raise ValueError(
                f"a table must have each of its columns once; missing {missing}, unknown or repeated {wrong}."
            )
        seen: set[tuple[str, ...]] = set()
        table = []
        for number, row in enumerate(rows, 1):
            if len(row) != len(names) or tuple(row) in seen:
                what = "is repeated" if tuple(row) in seen else f"has {len(row)}"
                raise ValueError(f"rows must be unique, with {len(names)} values; row {number} {what}.")
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
    """Convert text to a finite number.

    Raises
    ------
    ValueError
        If the text is not a finite number.
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
    """Read arrays of numbers from a NumPy archive, checking shapes before memory is allocated.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` file, which may contain other arrays too.

    Returns
    -------
    list of ndarray
        Arrays of real numbers, read-only and in native byte order.

    Raises
    ------
    ValueError
        If the file is not an ``.npz`` archive or is damaged, or an array is missing, repeated or not real.
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
            f"{name} of shape {shape} and {dtype} must have {expected:,} bytes, got {len(content) - start:,}."
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


# ---- objects ----------------------------------------------------------------------------------------------


def checked(kind: type[T], values: Any) -> T:
    """Build a dataclass from a JSON object, without converting values to other types.

    Parameters
    ----------
    kind : type
        The dataclass.
    values : dict
        The JSON object.

    Raises
    ------
    ValueError
        If a value is missing, unknown or of the wrong type; the message names its key.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        rule = first["msg"].removeprefix("Value error, ").rstrip(".")
        keys = ".".join(map(str, first["loc"]))
        if first["type"] == "value_error":
            raise ValueError(f"{keys}: {rule}." if keys else f"{rule}.") from None
        raise ValueError(f"{keys or 'the object'}: {rule}, got {short(first['input'])}.") from None
