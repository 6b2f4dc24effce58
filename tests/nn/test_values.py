"""The weight of a layer can be set to a factorized tensor of its format and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.backend import to_float64  # noqa: E402
from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP  # noqa: E402
from mumoe_tensor.testing.strategies import Problem, problems  # noqa: E402


@given(problems(leading=()))
def test_a_weight_of_any_backend_and_dtype_is_copied(problem: Problem) -> None:
    experts = Experts.from_spec(problem.layer, dtype=torch.float64)
    config = experts.config
    experts.factors[-1].requires_grad_(False)
    places = [(factor, factor.data_ptr()) for factor in experts.factors]
    experts.weight = problem.weight
    factors = [None if factor is None else to_float64(factor) for factor in problem.weight.factors]
    expected = mt.FactorizedTensor(problem.weight.format, factors, problem.weight.shape)
    for copied, term in zip(experts.weight.terms, expected.terms, strict=True):
        np.testing.assert_allclose(to_float64(mt.to_dense(copied)), mt.to_dense(term), rtol=1e-5, atol=1e-5)
    assert [(factor, factor.data_ptr()) for factor in experts.factors] == places
    assert [factor.requires_grad for factor in experts.factors] == [True] * (len(places) - 1) + [False]
    assert experts.config == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_decomposed_weight_goes_into_a_layer(dtype: Any) -> None:
    matrices, biases = torch.randn(3, 6, 4), torch.randn(3, 4)
    layer = MuMoE(6, 4, 3, "tucker", (3, 7, 4), dtype=dtype)
    layer.weight, error = mt.decompose(matrices, "tucker", (3, 7, 4), bias=biases)
    assert error < 1e-5
    for expert in range(3):
        matrix, bias = layer.expert(expert)
        assert matrix.dtype == dtype
        torch.testing.assert_close(matrix.float(), matrices[expert], rtol=0.05, atol=0.1)
        torch.testing.assert_close(bias.float(), biases[expert], rtol=0.05, atol=0.1)


def test_each_weight_of_a_block_and_containers_of_tensorly() -> None:
    block, other = (MuMoEMLP(5, 6, 4, 3, "tr", (2, 2, 3)) for _ in range(2))
    block.up.weight, block.down.weight = other.up.weight, other.down.weight.to_tensorly()
    for name, value in other.state_dict().items():
        assert name.startswith("gate") or torch.equal(block.state_dict()[name], value)


def test_the_weights_of_a_cp_tensor_are_multiplied_without_rounding() -> None:
    layer = MuMoE(5, 4, 3, rank=2, bias=False)
    weights, *factors = [torch.randn(n, 2, dtype=torch.bfloat16) for n in (1, 3, 5, 4)]
    layer.weight = mt.FactorizedTensor("cp", [weights[0], *factors])
    wide = mt.FactorizedTensor("cp", [weights[0].float(), *(factor.float() for factor in factors)])
    torch.testing.assert_close(mt.to_dense(layer.weight).detach(), mt.to_dense(wide))


def test_factors_may_change_places() -> None:
    layer = MuMoE(4, 4, 4, rank=2, bias=False)
    first, second, third = (factor.detach().clone() for factor in layer.experts.factors)
    layer.weight = mt.FactorizedTensor("cp", [*layer.experts.factors[1:], layer.experts.factors[0]])
    assert all(map(torch.equal, layer.experts.factors, (second, third, first)))


def test_no_history_of_the_values_is_kept() -> None:
    layer = MuMoE(5, 4, 3, rank=2, bias=False)
    trained = [torch.randn(n, 2, requires_grad=True) for n in (3, 5, 4)]
    layer.weight = mt.FactorizedTensor("cp", [2 * factor for factor in trained])
    assert all(factor.is_leaf for factor in layer.experts.factors)
    layer(torch.randn(2, 5)).sum().backward()
    assert trained[0].grad is None


def test_what_does_not_fit_changes_nothing() -> None:
    layer = MuMoE(5, 4, 3, "tr", (2, 2, 3))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    sizes = {"experts": 3, "in_features": 5, "out_features": 4, "rank": (2, 2, 3), "bias": True}

    def refused(weight: Any, got: str) -> None:
        with pytest.raises(
            ValueError, match=rf"must have .* \(3, 6, 4\), \(2, 2, 3\)\), including bias rows; got {got}"
        ):
            layer.weight = weight
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    def drawn(format: str = "tr", **changed: Any) -> Any:
        return mt.FactorizedTensor.random(format, like=torch.zeros(()), **{**sizes, **changed})

    refused(drawn("cp", rank=2), r"\(CP\(\), \(3, 6, 4\), \(2,\)\)")
    refused(drawn(bias=False), r"\(TensorRing\(\), \(3, 5, 4\)")
    refused(drawn(rank=(2, 2, 2)), r".*\(2, 2, 2\)\)")
    refused(drawn(experts=(3, 1), rank=(2, 2, 2, 3)), r".*\(3, 1, 6, 4\)")
    refused(torch.zeros(3, 6, 4), r"\(Dense\(\)")
    with pytest.raises(TypeError, match="a weight must be a FactorizedTensor"):
        layer.weight = "tr"


def test_formats_with_other_parts_differ() -> None:
    layer = MuMoE(6, 4, (), {"name": "kron", "splits": {"i": [2, 3]}}, rank=2, bias=False)
    other = MuMoE(6, 4, (), {"name": "kron", "splits": {"i": [3, 2]}}, rank=2, bias=False)
    with pytest.raises(ValueError, match=r"must have \(format"):
        layer.weight = other.weight
    layer.weight = MuMoE(6, 4, (), "kron", rank=2, bias=False).weight  # whose default parts are these


def test_computed_factors_and_those_without_values_are_refused() -> None:
    weight = MuMoE(5, 4, 3, rank=2).weight
    pruned = MuMoE(5, 4, 3, rank=2)
    prune.random_unstructured(pruned.experts, "factor_1", 0.5)
    for layer in (pruned, MuMoE(5, 4, 3, rank=2, device="meta")):
        with pytest.raises(ValueError, match="must be parameters with values to be set"):
            layer.weight = weight
    with pytest.raises(TypeError, match="no weight that can be a parameter"):
        pruned.weight = nn.Parameter(torch.zeros(5, 4))
