"""Splits and sums that are no format are refused; the others are values."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor.formats import Bias, Sum, by_kind
from mumoe_tensor.formats.registry import config_entry

SIZES: dict[str, Any] = dict(experts=4, in_features=6, out_features=8)
COMPOSED = [
    mt.formats()["btt"].with_splits({"i": (2, 4)}),
    mt.formats()["kron"].with_splits({"i": 3, "o": 3}),
    mt.formats()["cp"].with_splits({"n1": (2, 2)}),
    mt.sum_of(mt.shared("dense"), "cp"),
    mt.sum_of(mt.sliced("tr", 0, 2), mt.sliced("btt", 2, 4)),
]


@pytest.mark.parametrize("format", COMPOSED, ids=repr)
def test_a_composed_format_is_a_value(format: mt.Format) -> None:
    for again in (
        pickle.loads(pickle.dumps(format)),
        mt.get_format(json.loads(json.dumps(config_entry(format)))),
    ):
        assert again == format and hash(again) == hash(format)
    assert all((other == format) == (other is format) for other in COMPOSED)


def test_the_splits_of_the_class_are_the_default() -> None:
    btt = mt.formats()["btt"]
    assert btt.with_splits({"i": 2}) == btt
    assert btt.with_splits({"i": [2, 3]}) == btt.with_splits({"i": (2, 3)}) != btt


@pytest.mark.parametrize(
    ("splits", "error"),
    [
        ({"x": 2}, ValueError),
        ({"n0": 2}, ValueError),
        ({2: 2}, ValueError),
        ({"i": 0}, ValueError),
        ({"i": -1}, ValueError),
        ({"i": "2"}, TypeError),
        ({"i": []}, ValueError),
        ({"i": True}, TypeError),
        ({"i": 2.0}, TypeError),
        ({"i": (2, 1.5)}, TypeError),
        ({"i": (2, 0)}, ValueError),
        ([("i", 2)], TypeError),
    ],
    ids=repr,
)
def test_splits_that_are_none_are_refused(splits: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="split"):
        mt.formats()["btt"].with_splits(splits)


@pytest.mark.parametrize(
    ("size", "count", "parts"),
    [(768, 2, (24, 32)), (3072, 2, (48, 64)), (768, 3, (8, 8, 12)), (7, 1, (7,)), (1, 3, (1, 1, 1))],
)
def test_the_default_is_the_most_balanced_factorization(size: int, count: int, parts: Any) -> None:
    format = mt.formats()["kron"].with_splits({"i": count, "o": count})
    assert format.part_sizes((size, size)) == parts * 2


@pytest.mark.parametrize("name", [name for name, f in mt.formats().items() if not isinstance(f, Sum)])
@pytest.mark.parametrize("experts", [(), (3,), (3, 9)])
def test_the_default_rank_of_a_term_is_that_of_its_format(name: str, experts: tuple[int, ...]) -> None:
    format = mt.formats()[name]
    for t in (1, 3, 20):
        shared = mt.shared(format).rank_family((*experts, 12, 20), t)
        assert shared == format.rank_family((12, 20), t)
        if experts:
            of_slice = mt.sliced(format, 1, 3, len(experts) - 1).rank_family((*experts, 12, 20), t)
            assert of_slice == format.rank_family((*experts[:-1], 2, 12, 20), t)
        total = mt.sum_of(mt.shared(format), format).rank_family((*experts, 12, 20), t)
        assert total == (*shared, *format.rank_family((*experts, 12, 20), t))


def test_parts_of_expert_modes_have_names_of_their_own() -> None:
    format = mt.formats()["cp"].with_splits({"n1": 2})
    assert format.modes(11) == ("n1_1", "n1_2", *(f"n{e}" for e in range(2, 12)), "i", "o")
    assert len(format.declaration(11)) == 15


class LeftOut(mt.Format):
    name, title, omits, splits = "left-out", "Left out", ("n",), {"n1": 2}

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        return [mt.Factor("n1_1 i o")]


class WholeInput(mt.Format):
    name, title, splits = "whole-input", "Whole input", {"i": 2}

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        return [mt.Factor("n1 r"), mt.Factor("i r"), mt.Factor("o r")]


class Repeated(mt.Format):
    """A Kronecker product, of a class whose constructor takes no splits."""

    name, title, splits = "repeated", "Repeated", {"i": 2, "o": 2}

    def __init__(self, bond: str = "r"):
        self.bond = bond

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        experts, *ends = by_kind(modes)
        pairs = zip(*ends, strict=True)
        return [mt.Factor(f"{' '.join(axes)} {self.bond}") for axes in (*((n,) for n in experts), *pairs)]


@pytest.mark.usefixtures("registry")
def test_a_format_needs_no_argument_for_splits() -> None:
    mt.register(Repeated)
    format = Repeated("k").with_splits({"i": (2, 3)})
    assert format.bonds(1) == ("k",) and format.part_sizes((4, 6, 8)) == (4, 2, 3, 2, 4)
    entry = json.loads(json.dumps(config_entry(format)))
    assert entry == {"name": "repeated", "bond": "k", "splits": {"i": [2, 3], "o": 2}}
    assert mt.get_format(entry) == format != Repeated("k")
    kron = mt.formats()["kron"].with_splits({"i": (2, 3)})
    factors = mt.FactorizedTensor.random(kron, **SIZES, rank=2, seed=0).factors
    for weight in (mt.FactorizedTensor(format, factors), mt.FactorizedTensor(kron, factors)):
        assert weight.shape == (4, 6, 8)
    np.testing.assert_array_equal(
        mt.to_dense(mt.FactorizedTensor(format, factors)), mt.to_dense(mt.FactorizedTensor(kron, factors))
    )


ones = np.ones
KRON = mt.FactorizedTensor.random("kron", rank=2, **SIZES)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no factorization": (
        lambda: mt.LayerSpec("btt", experts=(), in_features=769, out_features=8),
        ValueError,
        r"769; near it are 768 = 24·32 and 770 = 22·35",
    ),
    "splits that are no dict": (
        lambda: mt.get_format({"name": "btt", "splits": 3}),
        ValueError,
        r"'btt' cannot be made with \{'splits': 3\}: splits must be a dict.* got 3\.$",
    ),
    "too small a product": (
        lambda: mt.LayerSpec({"name": "btt", "splits": {"i": [2, 2]}}, **SIZES),
        ValueError,
        r"at least its size; mode 'i' has 6 entries, the parts \(2, 2\) have 4",
    ),
    "parts the format cannot take": (
        lambda: mt.LayerSpec({"name": "btt", "splits": {"i": 3}}, **SIZES | {"in_features": 8}),
        ValueError,
        "of BTT with splits=.* raises ValueError: too many values",
    ),
    "a slice beyond the experts": (
        lambda: mt.LayerSpec(mt.sum_of("cp", mt.sliced("cp", 2, 5)), **SIZES),
        ValueError,
        r"a slice must be within the experts of a level.*\(4,\) experts",
    ),
    "an empty slice": (lambda: mt.sliced("cp", 2, 2), ValueError, "0 <= start < stop"),
    "a sum of nothing": (lambda: mt.sum_of(), ValueError, "must have a term that is not a bias"),
    "shared sum": (lambda: mt.shared(mt.sum_of("cp", "tr")), TypeError, "must not wrap a sum"),
    "splits of a sum": (lambda: mt.sum_of("cp", "tr").with_splits({"i": 2}), TypeError, "set on the terms"),
    "TensorLy": (
        lambda: mt.FactorizedTensor.random("cp-matrix", rank=2, **SIZES).to_tensorly(),
        TypeError,
        "the format must have a TensorLy container, got 'cp-matrix'",
    ),
    "TensorLy, of a sum": (
        lambda: mt.FactorizedTensor.random(mt.sum_of("cp", "cp"), rank=(2, 2), **SIZES).to_tensorly(),
        TypeError,
        "must have a TensorLy container",
    ),
    "TensorLy, of split experts": (
        lambda: (
            mt.FactorizedTensor("dense", [ones((4, 2, 2))])
            and mt.FactorizedTensor(
                COMPOSED[2], [ones((2, 1)), ones((2, 1)), ones((6, 1)), ones((8, 1))]
            ).to_tensorly()
        ),
        TypeError,
        "must have a TensorLy container",
    ),
    "parts that disagree": (
        lambda: mt.FactorizedTensor(COMPOSED[0], [ones((2, 3, 1, 2)), ones((2, 2, 1, 4))]),
        ValueError,
        "must have the same parts as the format",
    ),
    "two biases": (lambda: mt.sum_of("btt", Bias(), Bias()), ValueError, "at most one bias"),
    "a bias alone": (lambda: mt.sum_of(Bias()), ValueError, "must have a term that is not a bias"),
    "a bias as a weight": (
        lambda: mt.LayerSpec(Bias(), **SIZES, bias=True),
        ValueError,
        r"a bias must be a term of a sum, .* got Bias\(\) for a weight",
    ),
    "a bias that is switched off": (
        lambda: mt.LayerSpec(mt.sum_of("btt", Bias()), **SIZES),
        ValueError,
        "bias must be True for a format with a bias",
    ),
    "a bias of a split input that is no term": (
        lambda: mt.expert_matrix(KRON, 1, bias=True),
        ValueError,
        "splits the input must be a term, as in .*, got bias=True for format Kronecker",
    ),
    "the same, of a mixture": (
        lambda: mt.multilinear_moe(KRON, ones((5, 5)), [ones((5, 4))], bias=True),
        ValueError,
        "splits the input must be a term",
    ),
    "the same, bound": (
        lambda: mt.bind(mt.plan("kron", rank=2, **SIZES), KRON, bias=True),
        ValueError,
        "splits the input must be a term",
    ),
    "a split mode used whole": (
        lambda: mt.get_format(WholeInput()).declaration(1),
        ValueError,
        "every mode must be in a factor; WholeInput leaves out 'i1'",
    ),
    "a part of a mode left out": (
        lambda: mt.get_format(LeftOut()).declaration(1),
        ValueError,
        "every mode must be in a factor; LeftOut leaves out 'n1_2'",
    ),
    "experts of which no factor has all": (
        lambda: mt.FactorizedTensor(mt.sliced("hadamard", 0, 2), [ones((2, 8)), ones((6, 8))]),
        ValueError,
        "a shape must be given if no factor has all entries of a mode, got None for mode 'n1'",
    ),
    "a shape of one size": (
        lambda: mt.FactorizedTensor(mt.shared("dense"), [ones((6, 8))], (6,)),
        ValueError,
        "must be .experts..., input, output.",
    ),
    "a wrong shape": (
        lambda: mt.FactorizedTensor("dense", [ones((4, 6, 8))], (4, 6, 9)),
        ValueError,
        "must match the weight; mode 'o' must have 9 entries",
    ),
}


@pytest.mark.parametrize("format", ["btt", mt.sum_of(mt.shared("btt"), "cp")], ids=repr)
def test_the_error_for_a_size_without_factors_names_a_format_that_has_it(format: Any) -> None:
    with pytest.raises(ValueError, match="pad the mode") as error:
        mt.LayerSpec(format, **SIZES | {"in_features": 769})
    padded = json.loads(str(error.value)[str(error.value).index("{") : -1])
    assert mt.LayerSpec(padded, **SIZES | {"in_features": 769}).padding == {"in_features": (769, 770)}


@pytest.mark.parametrize("rank", [((), 3, 4), 3, (3, 4, 5)])
def test_the_error_for_a_rank_of_a_sum_names_the_bonds_of_all_terms(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"one entry per bond, t2_r, t3_r; got"):
        mt.LayerSpec(mt.sum_of(mt.shared("dense"), "cp", "cp"), **SIZES, rank=rank)


@pytest.mark.parametrize("wrap", [mt.shared, lambda format: mt.sliced(format, 0, 2)])
@pytest.mark.parametrize("format", [mt.shared("cp"), mt.sliced("cp", 0, 2), Bias()], ids=repr)
def test_a_term_of_a_term_is_refused(wrap: Any, format: mt.Format) -> None:
    with pytest.raises(TypeError, match="must not wrap a sum or another term, got "):
        wrap(format)


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
