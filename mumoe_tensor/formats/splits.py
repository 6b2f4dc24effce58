"""Split modes: modes reshaped to several parts, in row-major order, as in `numpy.kron`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any, Self

from mumoe_tensor.checks import as_entries, as_positive
from mumoe_tensor.compiling import constant_under_compile

#: For a suggested size, the largest part is at most this multiple of the smallest.
BALANCED = 2


class Splits(dict[str, "int | tuple[int, ...]"]):
    """The modes that a format splits, with the number or the sizes of their parts. Immutable."""

    @classmethod
    def read(cls, splits: Mapping[str, Any]) -> Self:
        """Check splits given by a user."""
        if not isinstance(splits, Mapping):
            raise TypeError(f"splits must be a dict, such as {{'i': 2, 'o': (16, 48)}}, got {splits!r}.")
        read = cls()
        for mode, parts in splits.items():
            if not isinstance(mode, str) or not re.fullmatch("[io]|n[1-9][0-9]*", mode):
                raise ValueError(f"the keys of splits must be modes 'i', 'o', 'n1', 'n2', ..., got {mode!r}.")
            what = f"splits of {mode!r}"
            if isinstance(parts, (list, tuple)):
                read[mode] = tuple(as_positive(n, f"{what}, every part,") for n in as_entries(parts, what))
            else:
                read[mode] = as_positive(parts, what)
            if not read[mode]:
                raise ValueError(f"{what} must have one part or more, got none.")
        return read

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))

    def count(self, mode: str) -> int | None:
        """The number of parts of a mode, or None if it is not split."""
        parts = self.get(mode)
        return len(parts) if isinstance(parts, tuple) else parts

    def sizes(self, mode: str, size: int, name: str) -> tuple[int, ...]:
        """The sizes of the parts of a mode; a mode that is not split is its only part.

        `name` is the name of the format in error messages.

        Raises
        ------
        ValueError
            If the product of the sizes is smaller than the mode, or its size has no factorization into this
            number of parts.
        """
        parts = self.get(mode, (size,))
        if isinstance(parts, int):
            return balanced(mode, size, parts, name)
        if prod(parts) < size:
            raise ValueError(
                f"the product of the parts of a mode must be at least its size; mode {mode!r} has {size} "
                f"entries, the parts {parts} have {prod(parts)}."
            )
        return parts


@lru_cache(maxsize=4096)
def balanced(mode: str, size: int, count: int, name: str) -> tuple[int, ...]:
    """The factorization of a size with the smallest ratio of largest to smallest factor, in ascending order.

    Raises
    ------
    ValueError
        If every such factorization has a factor of one.
    """
    best = _most_balanced(size, count)
    if best is not None:
        return best
    near = [next(_sizes_with_balanced_parts(range(size, 0, -1), count), None)]
    near.append(next(_sizes_with_balanced_parts(range(size, 4 * size + 2**count), count), None))
    named = " and ".join(f"{prod(parts)} = {'·'.join(map(str, parts))}" for parts in near if parts)
    # This notation is valid both in Python and on the command line.
    padded = json.dumps({"name": name, "splits": {mode: near[-1] or (size, *(1,) * (count - 1))}})
    raise ValueError(
        f"the size of mode {mode!r} must be a product of {count} factors above one, got {size}; near it are "
        f"{named}. Change the size, or pad the mode with the format {padded}."
    )


@constant_under_compile
def is_default(size: int, parts: tuple[int, ...]) -> bool:
    """Whether these are the default parts of a size, those chosen if only their number is given."""
    return parts == _most_balanced(size, len(parts))


def _most_balanced(size: int, count: int) -> tuple[int, ...] | None:
    if size == 1:
        return (1,) * count
    every = list(_factorizations(size, count, 2))
    return min(every, key=lambda parts: parts[-1] / parts[0], default=None)


def _factorizations(size: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """Factorizations with ascending factors, all at least `least`."""
    if count == 1:
        if size >= least:
            yield (size,)
        return
    factor = least
    while factor**count <= size:
        if size % factor == 0:
            yield from ((factor, *rest) for rest in _factorizations(size // factor, count - 1, factor))
        factor += 1


def _sizes_with_balanced_parts(sizes: range, count: int) -> Iterator[tuple[int, ...]]:
    for size in sizes:
        parts = _most_balanced(size, count)
        if parts is not None and parts[-1] <= BALANCED * parts[0]:
            yield parts
