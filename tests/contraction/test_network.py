"""What a network reads of each vector: all entries or some, their sum, and zeros after them."""

from __future__ import annotations

from typing import Any

import pytest

import mumoe_tensor as mt
from mumoe_tensor.contraction.network import Network, Reading, forward_networks
from mumoe_tensor.formats import Bias


def networks(format: mt.Format, *shape: int, bias: bool = False) -> tuple[Network, ...]:
    return forward_networks(format, shape, (1,) * len(format.bonds(len(shape) - 2)), bias=bias)


CP = mt.formats()["cp"]
#: Format, shape, and what its first term reads of the coefficients of each level and of the input.
READ: dict[str, tuple[Any, tuple[int, ...], list[Reading]]] = {
    "all": (CP, (4, 5, 6), [Reading(), Reading()]),
    "some experts": (mt.sliced("cp", 1, 3), (4, 5, 6), [Reading((1, 3)), Reading()]),
    "some of the second level": (
        mt.sliced("cp", 1, 3, level=1),
        (4, 3, 5, 6),
        [Reading(), Reading((1, 3)), Reading()],
    ),
    "a shared term": (
        mt.shared("cp"),
        (4, 2, 5, 6),
        [Reading(is_summed=True), Reading(is_summed=True), Reading()],
    ),
    "padded experts": (CP.with_splits({"n1": (2, 3)}), (4, 5, 6), [Reading(padding=2), Reading()]),
    "padded experts of a slice": (
        mt.sliced(CP.with_splits({"n1": (2, 2)}), 2, 5),
        (9, 5, 6),
        [Reading((2, 5), padding=1), Reading()],
    ),
    "a padded input": (CP.with_splits({"i": (2, 4)}), (4, 5, 6), [Reading(), Reading(padding=3)]),
    "a bias": (mt.sum_of(Bias(), "cp"), (4, 5, 6), [Reading(is_summed=True)]),
    "what a bias leaves of the input": (
        mt.sum_of(CP.with_splits({"i": (2, 4)}), Bias()),
        (4, 6, 6),
        [Reading(), Reading(padding=3)],
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str) -> None:
    format, shape, readings = READ[case]
    network = networks(format, *shape)[0]
    assert list(network.readings) == readings
    assert network.takes_input == (case != "a bias")
    assert network.vector_of_input == (len(network.operands) - 1 if network.takes_input else None)


def test_a_bias_row_is_read_where_no_term_is_the_bias() -> None:
    whole = networks(mt.sum_of("cp", "tr"), 4, 6, 5, bias=True)
    assert [network.bias for network in whole] == [True, True]
    assert [dict(network.index_sizes)["i"] for network in whole] == [6, 6]
    term, bias = networks(mt.sum_of("btt", Bias()), 4, 5, 6, bias=True)
    assert (term.bias, bias.bias) == (False, False)
    assert dict(term.index_sizes) | {"i1": 2, "i2": 2} == dict(term.index_sizes)


def test_parts_of_the_output_are_joined_to_its_size() -> None:
    (whole,) = networks(CP, 4, 5, 6)
    (padded,) = networks(CP.with_splits({"o": (2, 4)}), 4, 5, 6)
    assert (whole.output, whole.out_features) == (("B", "o"), None)
    assert (padded.output, padded.out_features) == (("B", "o1", "o2"), 6)
    (alone,) = networks(mt.formats()["btt"], 4, 6)
    assert alone.output == ("B", "o1", "o2")
