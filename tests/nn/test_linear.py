"""Layers made of linear layers start equal to them."""

from __future__ import annotations

from typing import Any

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402

FULL = {"cp": 6, "tucker": 6, "tr": 6, "tt": 6, "hadamard": None, "dense": None}


def rank_of(format: str, levels: int, size: int | None) -> Any:
    return () if size is None else (size,) * len(mt.get_format(format).bonds(levels))


@pytest.mark.parametrize("format", FULL)
@pytest.mark.parametrize("experts", [(), (4,), (3, 2), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_every_expert_starts_as_the_linear_layer(format, experts, bias, norm) -> None:
    linear = nn.Linear(5, 6, bias=bias, dtype=torch.float64)
    layer = MuMoE.from_linear(
        linear, experts, format=format, rank=rank_of(format, len(experts), FULL[format]), gate_norm=norm
    )
    assert layer.fit_errors[0] < 1e-9
    x = torch.randn(7, 5, dtype=torch.float64)
    for training in (True, False):
        y, coefficients = layer.train(training)(x, return_coefficients=True)
        torch.testing.assert_close(y, linear(x))
        assert all(float(a.detach().std(0).max()) > 0 for a in coefficients if a.shape[-1] > 1)
    matrix, row = layer.expert(tuple(n - 1 for n in experts))
    torch.testing.assert_close(matrix, linear.weight.T)
    assert (row is None) == (not bias)


@pytest.mark.parametrize("format", ["cp", "tucker", "tr", "tt"])
def test_a_rank_too_small_gives_the_best_fit_and_says_how_far_it_is(format: str) -> None:
    linear = nn.Linear(9, 8, dtype=torch.float64)
    rank = {"cp": 3, "tucker": (2, 3, 3), "tr": (1, 1, 3), "tt": (1, 3)}[format]
    layer = MuMoE.from_linear(linear, 4, format=format, rank=rank)
    whole = torch.cat([linear.weight.T, linear.bias[None]]).detach()
    fitted = torch.cat([layer.expert(1)[0], layer.expert(1)[1][None]]).detach()
    singular = torch.linalg.svdvals(whole)
    best = (singular[3:].square().sum() / singular.square().sum()).sqrt()
    error = torch.linalg.norm(fitted - whole) / torch.linalg.norm(whole)
    torch.testing.assert_close(error, best)
    assert layer.fit_errors == pytest.approx((float(best),))


def test_a_linear_layer_of_zeros_is_fitted_without_error() -> None:
    linear = nn.Linear(5, 6)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    layer = MuMoE.from_linear(linear, 3, format="cp", rank=2)
    assert layer.fit_errors == (0.0,) and (layer(torch.ones(4, 5)) == 0).all()


def test_experts_part_in_training() -> None:
    torch.manual_seed(0)
    layer = MuMoE.from_linear(nn.Linear(6, 6), 4, format="cp", rank=6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(64, 6)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x) - x.abs()).square().mean().backward()
        optimizer.step()
    first, second = (layer.expert(k)[0] for k in (0, 1))
    assert (first - second).abs().max() > 0.05


class Basis(mt.Format):
    """Experts that mix a few matrices: one factor has both the input and the output."""

    name, title = "basis", "Basis"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        experts = [mt.Factor(f"{mode} r") for mode in modes[:-2]]
        return [mt.Factor("r o i" if experts else "o i"), *experts]


@pytest.mark.parametrize("experts", [(), (4,), (3, 2)], ids=str)
def test_experts_start_as_a_linear_layer_where_one_factor_has_input_and_output(experts) -> None:
    linear = nn.Linear(5, 6)
    layer = MuMoE.from_linear(linear, experts, format=Basis(), rank=3 if experts else None)
    matrix, bias = layer.expert(tuple(n - 1 for n in experts))
    assert layer.fit_errors == (0.0,)
    torch.testing.assert_close(matrix, linear.weight.T)
    torch.testing.assert_close(bias, linear.bias)


def test_other_modules_and_pairs_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a linear layer is torch\.nn\.Linear or a Conv1D, got LayerNorm"):
        MuMoE.from_linear(nn.LayerNorm(3), 2)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'bias'"):
        MuMoE.from_linear(nn.Linear(3, 3), 2, bias=False)
    with pytest.raises(ValueError, match="both linear layers must have a bias or none"):
        MuMoEMLP.from_linears(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), 2, rank=2)
