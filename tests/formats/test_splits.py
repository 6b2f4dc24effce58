"""The sizes of the parts of a mode, against a search through all factorizations."""

from __future__ import annotations

import re
from itertools import combinations_with_replacement
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.formats.splits import BALANCED, Splits, balanced, is_default

#: Of sizes up to 70, into one to three factors above one, in ascending order.
FACTORIZATIONS = {
    count: [parts for parts in combinations_with_replacement(range(2, 71), count) if prod(parts) <= 70]
    for count in (1, 2, 3)
}


@given(st.integers(2, 60), st.sampled_from([*FACTORIZATIONS]))
def test_the_default_is_the_factorization_of_least_ratio_or_an_error_with_the_nearest(size, count) -> None:
    every = [parts for parts in FACTORIZATIONS[count] if prod(parts) == size]
    if every:
        parts = balanced("i", size, count, "kron")
        assert parts in every
        assert parts[-1] / parts[0] == min(other[-1] / other[0] for other in every)
        assert is_default(size, parts)
        assert not any(is_default(size, other) for other in every if other != parts)
        return
    with pytest.raises(ValueError, match=f"a product of {count} factors above one, got {size};") as raised:
        balanced("i", size, count, "kron")

    near = {1, *(prod(parts) for parts in FACTORIZATIONS[count] if parts[-1] <= BALANCED * parts[0])}
    below, above = max(n for n in near if n < size), min(n for n in near if n > size)
    named = re.findall(r"(\d+) = ([\d·]+)", str(raised.value))
    assert [int(n) for n, _ in named] == [below, above]
    assert all(prod(map(int, parts.split("·"))) == int(n) for n, parts in named)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2))
def test_parts_of_sizes_must_hold_the_mode(parts: list[int], more: int) -> None:
    splits, size = Splits.read({"i": parts}), max(1, prod(parts) - 1 + more)
    if prod(parts) >= size:
        assert splits.sizes("i", size, "kron") == tuple(parts)
    else:
        with pytest.raises(ValueError, match=f"has {size} entries, .* have {prod(parts)}"):
            splits.sizes("i", size, "kron")


def test_a_whole_mode_is_its_only_part() -> None:
    splits = Splits.read({"i": 1, "n16": (2, 3)})
    assert (splits.count("o"), splits.count("i"), splits.count("n16")) == (None, 1, 2)
    assert splits.sizes("o", 7, "cp") == splits.sizes("i", 7, "cp") == (7,)


@given(st.permutations(["i", "o", "n1"]), st.permutations(["i", "o", "n1"]))
def test_the_order_of_the_modes_does_not_matter(one: list[str], other: list[str]) -> None:
    cp = mt.formats()["cp"]
    formats = [cp.with_splits(dict.fromkeys(modes, 2)) for modes in (one, other)]
    assert formats[0] == formats[1] and hash(formats[0]) == hash(formats[1])
