"""Terms of a sum are views of the parameters, and are trained or not."""

from __future__ import annotations

from typing import Any

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from mumoe_tensor.nn import MuMoE  # noqa: E402

#: Its terms are a shared expert, differences for all experts and for some, and the bias.
FORMAT = mt.sum_of(mt.shared("kron"), "cp", mt.sliced("cp", 1, 4))


def made() -> Any:
    torch.manual_seed(0)
    layer = MuMoE(6, 8, 5, FORMAT, (2, 3, 4), gate_norm="none", dtype=torch.float64)
    nn.init.normal_(layer.gate.weight)
    return layer


def trained_factors(layer: Any) -> list[bool]:
    return [factor.requires_grad for factor in layer.experts.factors]


def test_outputs_are_those_of_the_terms_added() -> None:
    layer, x = made(), torch.randn(7, 6, dtype=torch.float64)
    y, coefficients = layer(x, return_coefficients=True)
    *terms, bias = layer.experts.terms
    assert [term.format for term in terms] == list(FORMAT.formats)
    assert [term.shape for term in (*terms, bias)] == [(5, 6, 8)] * 3 + [(5, 1, 8)]
    parts = [mt.multilinear_moe(term, x, coefficients) for term in terms]
    torch.testing.assert_close(y, sum(parts) + bias.arrays[0])
    with torch.no_grad():
        for array in terms[1].arrays:  # views of the parameters
            array.zero_()
        torch.testing.assert_close(layer(x), parts[0] + parts[2] + bias.arrays[0])


@pytest.mark.parametrize(
    ("term", "frozen"),
    [
        (0, {0, 1}), (1, {2, 3, 4}), (3, {8}), (mt.shared("kron"), {0, 1}), ("shared Kronecker", {0, 1}),
        ("cp", {2, 3, 4}), ("sliced", {5, 6, 7}), ("bias", {8}), (FORMAT.formats[2], {5, 6, 7}),
    ],
    ids=str,
)  # fmt: skip
def test_frozen_terms_do_not_learn_and_others_do(term: Any, frozen: set[int]) -> None:
    layer, x = made(), torch.randn(7, 6, dtype=torch.float64)
    layer.experts.freeze(term)
    assert trained_factors(layer) == [k not in frozen for k in range(9)]
    before = [factor.clone() for factor in layer.experts.factors]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    for k, (factor, old) in enumerate(zip(layer.experts.factors, before, strict=True)):
        assert torch.equal(factor, old) == (k in frozen)
    layer.load_state_dict(made().state_dict())
    assert trained_factors(layer) == [k not in frozen for k in range(9)]
    layer.experts.unfreeze(term)
    assert all(trained_factors(layer))


def test_all_terms_of_a_name_are_frozen() -> None:
    layer = MuMoE(6, 8, 4, mt.sum_of(mt.sliced("cp", 0, 2), "lowrank", mt.sliced("lowrank", 2, 4)), (2, 2, 2))
    layer.experts.freeze("sliced")
    assert trained_factors(layer) == [False] * 3 + [True] * 2 + [False] * 2


def test_a_format_of_one_term_is_its_only_term() -> None:
    layer = MuMoE(6, 8, 4, "btt", 2, bias=False)
    (term,) = layer.experts.terms
    assert [array.data_ptr() for array in term.arrays] == [f.data_ptr() for f in layer.experts.factors]
    layer.experts.freeze("btt")
    assert not any(trained_factors(layer))


@pytest.mark.parametrize(
    ("term", "error", "says"),
    [
        (4, ValueError, r"a term of sum_of\(shared\(.* must be an integer at least 0 and less than 4"),
        (-1, ValueError, "must be an integer"),
        (1.5, TypeError, "must be an integer"),
        ("tucker", ValueError, "by its number, format, name or title, got 'tucker'"),
        (mt.get_format("kron"), ValueError, "by its number, format, name or title"),
    ],
    ids=str,
)
def test_unknown_terms_are_refused(term: Any, error: Any, says: str) -> None:
    layer = made()
    with pytest.raises(error, match=says):
        layer.experts.freeze(term)
    assert all(trained_factors(layer))


def test_computed_factors_are_refused_and_nothing_changes() -> None:
    layer = made()
    prune.l1_unstructured(layer.experts, "factor_1", amount=0.5)
    with pytest.raises(ValueError, match="must be parameters to be frozen"):
        layer.experts.freeze(0)
    assert layer.experts.factor_0.requires_grad
