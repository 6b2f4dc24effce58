"""The declarations of the library's formats."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given

import mumoe_tensor as mt
from mumoe_tensor.testing import specs

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
    "kron": {
        0: ("k", "i1 o1 k | i2 o2 k"),
        1: ("k", "n1 k | i1 o1 k | i2 o2 k"),
        2: ("k", "n1 k | n2 k | i1 o1 k | i2 o2 k"),
    },
    "btt": {
        0: ("r", "i1 i2 r o1 | o1 i1 r o2"),
        1: ("r", "n1 r | i1 i2 r o1 | o1 i1 r o2"),
        2: ("r", "n1 r | n2 r | i1 i2 r o1 | o1 i1 r o2"),
    },
    "monarch": {
        0: ("", "i1 i2 o1 | o1 i1 o2"),
        1: ("", "n1 i1 o1 | i1 i2 o1 | o1 i1 o2"),
        2: ("", "n1 i1 o1 | n2 i1 o1 | i1 i2 o1 | o1 i1 o2"),
    },
    "tt-matrix": {
        0: ("b1", "i1 o1 b1 | b1 i2 o2"),
        1: ("b1 b2", "n1 b1 | b1 i1 o1 b2 | b2 i2 o2"),
        2: ("b1 b2 b3", "n1 b1 | b1 n2 b2 | b2 i1 o1 b3 | b3 i2 o2"),
    },
    "tucker-matrix": {
        0: ("r_i1 r_i2 r_o1 r_o2", "r_i1 r_i2 r_o1 r_o2 | i1 r_i1 | i2 r_i2 | o1 r_o1 | o2 r_o2"),
        1: (
            "r_n1 r_i1 r_i2 r_o1 r_o2",
            "r_n1 r_i1 r_i2 r_o1 r_o2 | n1 r_n1 | i1 r_i1 | i2 r_i2 | o1 r_o1 | o2 r_o2",
        ),
        2: (
            "r_n1 r_n2 r_i1 r_i2 r_o1 r_o2",
            "r_n1 r_n2 r_i1 r_i2 r_o1 r_o2 | n1 r_n1 | n2 r_n2 | i1 r_i1 | i2 r_i2 | o1 r_o1 | o2 r_o2",
        ),
    },
    "cp-matrix": {
        0: ("r", "r | i1 r | i2 r | o1 r | o2 r"),
        1: ("r", "r | n1 r | i1 r | i2 r | o1 r | o2 r"),
        2: ("r", "r | n1 r | n2 r | i1 r | i2 r | o1 r | o2 r"),
    },
    "lowrank": {
        0: ("r", "i r | r o"),
        1: ("r", "n1 i r | n1 r o"),
        2: ("r", "n1 n2 i r | n1 n2 r o"),
    },
    "shared-expert": {
        0: ("t2_r", "i o | t2_r | i t2_r | o t2_r"),
        1: ("t2_r", "i o | t2_r | n1 t2_r | i t2_r | o t2_r"),
        2: ("t2_r", "i o | t2_r | n1 t2_r | n2 t2_r | i t2_r | o t2_r"),
    },
}
#: Position of the factor that may be missing, the weights of CP.
OPTIONAL = {"cp": [0], "cp-matrix": [0], "shared-expert": [1]}


def test_the_formats_are_these() -> None:
    assert set(mt.formats()) == set(DECLARED)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("format", DECLARED)
def test_declaration(format: str, levels: int) -> None:
    bonds, factors = DECLARED[format][levels]
    declared = mt.get_format(format).declaration(levels)
    assert " | ".join(" ".join(f.indices) for f in declared) == factors
    assert mt.get_format(format).bonds(levels) == tuple(bonds.split())
    assert [k for k, f in enumerate(declared) if f.optional] == OPTIONAL.get(format, [])


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


SLICE = mt.sum_of(mt.sliced("cp", 0, 2), "cp")


@given(specs(most=9))
@example(mt.LayerSpec(SLICE, experts=3, in_features=2, out_features=2, rank=(1, 2)))
def test_shapes_follow_modes_and_rank(spec: mt.LayerSpec) -> None:
    format, levels, rank = spec.weight_format, spec.num_levels, spec.full_rank
    shapes = []
    for term in format.terms(spec.mode_sizes, rank):
        size = term.format.index_sizes(term.mode_sizes, term.rank)
        assert tuple(size) == term.format.modes(levels) + term.format.bonds(levels)
        assert tuple(size.values()) == (*term.format.part_sizes(term.mode_sizes), *term.rank)
        shapes += [tuple(size[x] for x in f.indices) for f in term.format.declaration(levels)]
    assert format.shapes(spec.mode_sizes, rank) == shapes
    sizes: dict[str, int] = {}
    for f, shape in zip(format.declaration(levels), shapes, strict=True):
        for index, size in zip(f.indices, shape, strict=True):
            assert sizes.setdefault(index, size) == size, "an index has one size in all terms of a sum"
    assert format.check_rank(rank, levels) == rank
    if len(rank) == 1:
        assert format.check_rank(rank[0], levels) == rank
    for t in (1, 7):
        default = format.rank_family(spec.mode_sizes, t)
        assert format.check_rank(default, levels) == default
        assert format.rank_family(spec.mode_sizes, t + 1) >= default


@pytest.mark.parametrize(
    ("format", "splits"),
    [
        *((format, splits) for format in ("btt", "monarch") for splits in ({"i": 3}, {"i": 3, "o": 3})),
        *((format, {"o": 3}) for format in ("kron", "tt-matrix")),
    ],
)
def test_a_format_refuses_numbers_of_parts_that_it_has_no_factors_for(
    format: str, splits: dict[str, int]
) -> None:
    """Two in BTT and Monarch; in Kronecker and TT-matrix as many of the input as of the output."""
    counts = {"i": 2, "o": 2, **splits}
    with pytest.raises(ValueError, match=re.escape(f"with splits={counts} raises ValueError")):
        mt.get_format(format).with_splits(splits).declaration(1)
