"""Experts that are chosen by number map each input as their matrix does, and cost what that one takes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import ChosenExperts, RoutedExperts, routed  # noqa: E402
from mumoe_tensor.testing.strategies import leading_shapes, specs  # noqa: E402


def by_expert(experts: Any, z: Tensor, index: Tensor) -> Tensor:
    """Each input times the matrix of its expert, one after the other."""
    rows = []
    for row, n in zip(z.reshape(-1, z.shape[-1]), index.flatten().tolist(), strict=True):
        matrix, bias = experts.expert(n)
        rows.append(row @ matrix if bias is None else row @ matrix + bias)
    y = torch.stack(rows) if rows else z.new_zeros(0, experts.out_features)
    return y.reshape(*z.shape[:-1], experts.out_features)


@given(
    spec=specs(num_levels=1),
    leading=leading_shapes(),
    price=st.sampled_from([0, routed.CALL]),
    seed=st.integers(0, 99),
)
def test_each_input_is_mapped_by_its_expert(
    spec: mt.LayerSpec, leading: tuple[int, ...], price: int, seed: int
) -> None:
    """Outputs and gradients, with experts one after the other or gathered, in every format."""
    generator = torch.Generator().manual_seed(seed)
    with mock.patch.object(routed, "CALL", price):
        experts = ChosenExperts.from_spec(spec, dtype=torch.float64)
    z = torch.randn(*leading, spec.in_features, generator=generator, dtype=torch.float64).requires_grad_()
    index = torch.randint(spec.experts[0], leading, generator=generator)
    y, expected = experts(z, index), by_expert(experts, z, index)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    inputs = (z, *experts.factors)
    gradients, wanted = (
        torch.autograd.grad((weights * out).sum(), inputs, allow_unused=True, materialize_grads=True)
        for out in (y, expected if expected.requires_grad else 0 * z.sum() + expected)
    )
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("price", [0, routed.CALL])
def test_a_term_for_a_slice_maps_the_inputs_of_its_experts(price: int) -> None:
    format = mt.sum_of(mt.sliced("lowrank", 0, 2), mt.sliced("lowrank", 1, 4))
    with mock.patch.object(routed, "CALL", price):
        experts = ChosenExperts(5, 4, 4, format, (2, 3), dtype=torch.float64)
    assert {route.is_gathered for route in experts._routes} == {price > 0}
    z, index = torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 4
    torch.testing.assert_close(experts(z, index), by_expert(experts, z, index))


def test_bias_edits_are_added() -> None:
    experts = ChosenExperts(5, 4, 3, "cp", 2)
    edit_bias(experts, "more", torch.tensor([0.0, 1.0, 0.5]), outputs=[1, 2], strength=0.5)
    z, index = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [2, 1, 0]])
    torch.testing.assert_close(experts(z, index), by_expert(experts, z, index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast_as_in_its_dtype(dtype: Any) -> None:
    experts = ChosenExperts(5, 4, 3, "lowrank", 2, dtype=dtype)
    z, index = torch.randn(6, 5, dtype=dtype), torch.tensor([0, 1, 2, 2, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(z, index)
    short = torch.bfloat16 if dtype == torch.float32 else dtype
    assert torch.equal(y, experts.to(short)(z.to(short), index)) and y.dtype == short


@pytest.mark.parametrize("format, rank", [("cp", 12), ("tr", (2, 2, 6)), ("lowrank", 12), ("dense", ())])
def test_the_cost_of_an_input_does_not_grow_with_the_experts(format: str, rank: Any) -> None:
    def flops(experts: int) -> int:
        chosen = ChosenExperts(96, 64, experts, format, rank, bias=False, device="meta")
        return chosen.plan.flops * (1024 // chosen.plan.batch)

    assert flops(64) == flops(4)


@pytest.mark.parametrize("format, is_gathered", [("cp", True), ("lowrank", False), ("dense", False)])
def test_large_parts_of_factors_are_not_gathered(format: str, is_gathered: bool) -> None:
    rank = () if format == "dense" else 100
    experts = ChosenExperts(256, 512, 8, format, rank, bias=False, device="meta")
    assert [route.is_gathered for route in experts._routes] == [is_gathered]


@pytest.mark.parametrize(
    "shape, index, error, message",
    [
        ((2, 6), torch.tensor([0, 4]), ValueError, "from 0 to 3, got entries from 0 to 4"),
        ((2, 6), torch.tensor([-1, 0]), ValueError, "from 0 to 3, got entries from -1 to 0"),
        ((2, 6), torch.tensor([0.0, 1.0]), TypeError, "integer dtype"),
        ((2, 6), torch.tensor([True, False]), TypeError, "integer dtype"),
        ((2, 6), torch.tensor([0]), ValueError, "one entry per input"),
        ((2, 5), torch.tensor([0, 1]), ValueError, "6 features"),
    ],
)
def test_bad_calls(shape: Any, index: Tensor, error: type[Exception], message: str) -> None:
    experts = ChosenExperts(6, 5, 4, "cp", 2)
    with pytest.raises(error, match=message):
        experts(torch.zeros(shape), index)
    with pytest.raises(ValueError, match="one level"):
        ChosenExperts(6, 5, (4, 2), "cp", 2)


def gated(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What `RoutedExperts` compute, from the dense weights."""
    gate_up, down = mt.to_dense(experts.gate_up.weight), mt.to_dense(experts.down.weight)
    y = torch.zeros_like(x)
    for k in range(index.shape[-1]):
        gate, up = torch.einsum("...i,...io->...o", x, gate_up[index[..., k]]).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * up
        y = y + weights[..., k, None] * torch.einsum("...i,...io->...o", hidden, down[index[..., k]])
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("format", ["cp", "lowrank", "shared-expert", "btt"])
def test_routed_experts_are_weighted_gated_blocks(format: str, dtype: Any) -> None:
    torch.manual_seed(0)
    experts = RoutedExperts(12, 8, 5, format, parameters=0.7, dtype=dtype)
    dense = 5 * 12 * 16, 5 * 8 * 12
    for part, most in zip((experts.gate_up, experts.down), dense, strict=True):
        assert 0.5 * most < sum(factor.numel() for factor in part.factors) <= 0.7 * most
    x, weights = torch.randn(3, 7, 12, dtype=dtype), torch.rand(3, 7, 2)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(21)]).reshape(3, 7, 2)
    y = experts(x, index, weights)
    assert y.dtype == dtype and y.shape == x.shape
    expected = gated(experts.double(), x.double(), index, weights.double())
    torch.testing.assert_close(
        y.double(), expected, **({} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.05})
    )


def test_a_config_makes_the_same_module_again() -> None:
    experts = RoutedExperts(
        12, 8, 5, mt.sum_of(mt.shared("dense"), "lowrank"), parameters=0.7, activation="gelu", batch_hint=64
    )
    again = RoutedExperts.from_config(experts.config)
    assert again.config == experts.config and again.down.options["batch_hint"] == 64
    again.load_state_dict(experts.state_dict())
    x, index = torch.randn(4, 12), torch.tensor([[0], [4], [2], [0]])
    assert torch.equal(again(x, index, torch.ones(4, 1)), experts(x, index, torch.ones(4, 1)))


@pytest.mark.parametrize(
    "format, options, message",
    [
        ("cp", {}, "gate_up_rank or parameters must be given for 'cp', got neither"),
        ("cp", {"gate_up_rank": 3}, "down_rank or parameters must be given"),
        ("cp", {"gate_up_rank": 3, "parameters": 0.5}, "only one of gate_up_rank and parameters"),
        ("dense", {"parameters": 0.5}, "budget of 480 parameters; format 'dense' has 960"),
        ("cp", {"parameters": 0.0}, r"a positive fraction of those of dense experts, got 0\.0"),
        ("cp", {"parameters": 1e-4}, "the smallest rank must fit the budget of 1 param"),
    ],
)
def test_ranks_that_are_not_given_once(format: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutedExperts(12, 8, 5, format, **options)


def test_one_entry_of_a_rank_may_be_solved_for() -> None:
    experts = RoutedExperts(12, 8, 5, "tt", (5, None), (5, None), parameters=0.7)
    assert experts.gate_up.rank[0] == experts.down.rank[0] == 5
    parts = (experts.gate_up, 12 * 16), (experts.down, 8 * 12)
    for part, size in parts:
        assert 0.5 * 5 * size < sum(factor.numel() for factor in part.factors) <= 0.7 * 5 * size


def test_weights_and_indices_of_different_shapes() -> None:
    experts = RoutedExperts(12, 8, 5, "cp", 3, 3)
    with pytest.raises(ValueError, match="must have one shape, with a row per input"):
        experts(torch.zeros(4, 12), torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 1))
    inputs = torch.zeros(4, 12), torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2)
    for place in range(3):
        wrong = [x.numpy() if n == place else x for n, x in enumerate(inputs)]
        with pytest.raises(TypeError, match=r"an input must be a torch\.Tensor, got ndarray"):
            experts(*wrong)
    with pytest.raises(ValueError, match="must have one shape, with a row per input"):
        experts(torch.zeros(1, 12), torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2))
