"""The declarations of the library's formats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.testing import formats, levels, ranks, sizes

#: Bonds and factors for no, one and two levels of experts.
DECLARED = {
    "cp": {
        0: ("r", "r | i r | o r"),
        1: ("r", "r | n1 r | i r | o r"),
        2: ("r", "r | n1 r | n2 r | i r | o r"),
    },
    "hadamard": {0: ("", "i o"), 1: ("", "n1 o | i o"), 2: ("", "n1 o | n2 o | i o")},
    "dense": {0: ("", "i o"), 1: ("", "n1 i o"), 2: ("", "n1 n2 i o")},
    "tucker": {
        0: ("r_i r_o", "r_i r_o | i r_i | o r_o"),
        1: ("r_n1 r_i r_o", "r_n1 r_i r_o | n1 r_n1 | i r_i | o r_o"),
        2: ("r_n1 r_n2 r_i r_o", "r_n1 r_n2 r_i r_o | n1 r_n1 | n2 r_n2 | i r_i | o r_o"),
    },
    "tr": {
        0: ("b1 b2", "b1 i b2 | b2 o b1"),
        1: ("b1 b2 b3", "b1 n1 b2 | b2 i b3 | b3 o b1"),
        2: ("b1 b2 b3 b4", "b1 n1 b2 | b2 n2 b3 | b3 i b4 | b4 o b1"),
    },
    "tt": {
        0: ("b2", "i b2 | b2 o"),
        1: ("b2 b3", "n1 b2 | b2 i b3 | b3 o"),
        2: ("b2 b3 b4", "n1 b2 | b2 n2 b3 | b3 i b4 | b4 o"),
    },
}


def test_the_formats_are_these() -> None:
    assert set(mt.formats()) == set(DECLARED)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("format", DECLARED)
def test_declaration(format: str, levels: int) -> None:
    bonds, factors = DECLARED[format][levels]
    declared = mt.get_format(format).declaration(levels)
    assert " | ".join(" ".join(f.indices) for f in declared) == factors
    assert mt.get_format(format).bonds(levels) == tuple(bonds.split())
    assert [k for k, f in enumerate(declared) if f.optional] == ([0] if format == "cp" else [])


@pytest.mark.parametrize(
    ("format", "order"),
    [
        ("tr", "n1 b1 b2 | i b2 b3 | b1 b3 o"),
        ("tt", "n1 b2 | i b2 b3 | b3 o"),
        ("tucker", "r_i r_n1 r_o | n1 r_n1 | i r_i | o r_o"),
        ("cp", "r | n1 r | i r | o r"),
        ("hadamard", "n1 o | i o"),
        ("dense", "n1 i o"),
    ],
)
def test_memory_order(format: str, order: str) -> None:
    declared = mt.get_format(format).declaration(1)
    assert " | ".join(" ".join(f.memory_order) for f in declared) == order


@given(formats(), levels(), st.data())
def test_shapes_follow_modes_and_rank(format: mt.Format, levels: int, data: st.DataObject) -> None:
    modes = data.draw(st.tuples(*[sizes(9)] * (levels + 2)))
    rank = data.draw(ranks(format, levels, 9))
    size = format.index_sizes(modes, rank)
    assert tuple(size.values()) == (*modes, *rank)
    assert format.shapes(modes, rank) == [
        tuple(size[x] for x in f.indices) for f in format.declaration(levels)
    ]
    assert format.check_rank(rank, levels) == rank
    if len(rank) == 1:
        assert format.check_rank(rank[0], levels) == rank
    for t in (1, 7):
        default = format.default_rank(modes, t)
        assert format.check_rank(default, levels) == default
        assert format.default_rank(modes, t + 1) >= default
