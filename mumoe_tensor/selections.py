"""Parsing of selections of experts, outputs, levels or rows, with the same rules everywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from reprlib import repr as shortened
from typing import Any, TypeAlias

from mumoe_tensor.checks import as_python

#: An integer, a slice, an iterable or array of integers, or a boolean mask.
Selection: TypeAlias = Any

#: One integer per level; for one level, also a plain integer.
Index: TypeAlias = Any


def read_number(value: Any, count: int, what: str) -> int:
    """Parse the index of one of `count` items: an integer or 0-d array from any library."""
    number = _plain(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{what} must be an integer {_interval(count)}, got {shortened(number)}.")
    if not 0 <= number < count:
        raise ValueError(f"{what} must be an integer {_interval(count)}, got {number}.")
    return number


def read_selection(
    selection: Selection, count: int, what: str, *, empty: bool = True, repeats: bool = False
) -> list[int]:
    """Parse a selection of some of `count` items, in the order of the selection (ascending for a mask).

    Parameters
    ----------
    selection : int, slice, iterable of int, iterable of bool, or array of these
        A mask has `count` booleans. An iterator is consumed.
    what : str
        Name of the items in error messages.
    empty, repeats : bool
        Whether the selection may be empty, and whether an item may occur more than once.
    """
    numbers = "integers" if repeats else "different integers"
    rule = (
        f"{what} must be {'' if empty else 'one or more '}{numbers} {_interval(count)}, "
        f"or a boolean mask of length {count}"
    )
    values = _plain(range(count)[selection] if isinstance(selection, slice) else selection)
    entries = _entries(values)
    is_mask = not isinstance(values, bool) and all(isinstance(entry, bool) for entry in entries)
    if entries and is_mask:
        if len(entries) != count:
            raise ValueError(f"{rule}; got a mask of length {len(entries)}.")
        entries = [k for k, is_selected in enumerate(entries) if is_selected]
    if wrong := [entry for entry in entries if not isinstance(entry, int) or isinstance(entry, bool)]:
        raise TypeError(f"{rule}; got {shortened(wrong)}.")
    if wrong := [number for number in entries if not 0 <= number < count]:
        raise ValueError(f"{rule}; got {shortened(wrong)}.")
    if not repeats and len(set(entries)) < len(entries):
        twice = [number for number, times in Counter(entries).items() if times > 1]
        raise ValueError(f"{rule}; got {shortened(twice)} more than once.")
    if not entries and not empty:
        raise ValueError(f"{rule}; got none.")
    return entries


def read_index(value: Index, counts: Sequence[int]) -> tuple[int, ...]:
    """Parse the index of one expert: one integer per level."""
    entries = _entries(value)
    if len(entries) != len(counts):
        raise ValueError(
            f"an index must have one entry per level, {len(counts)} here, got {shortened(entries)}."
        )
    return tuple(
        read_number(entry, n, f"the index at level {level}")
        for level, (entry, n) in enumerate(zip(entries, counts, strict=True))
    )


def _interval(count: int) -> str:
    return f"at least 0 and less than {count}"


def _entries(values: Any) -> list[Any]:
    """The entries as Python objects; a value without entries is returned as the only one."""
    values = _plain(values)
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        return [values]
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """Convert integers and arrays from any library to Python; return other values unchanged."""
    value = as_python(value)
    return index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value
