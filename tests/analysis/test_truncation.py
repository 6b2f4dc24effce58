"""Truncated layers are the best approximations of their rank, and come back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.analysis import truncate  # noqa: E402


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 7, bias=False)).double()


@pytest.mark.parametrize(("share", "ranks"), [(0.0, (0, 0)), (0.25, (3, 2)), (0.5, (6, 4)), (0.9, (11, 6))])
def test_the_error_is_that_of_the_singular_values_left_out(share: float, ranks: tuple[int, int]) -> None:
    model = network()
    layers = [model[0], model[2]]
    before = [layer.weight.detach().clone() for layer in layers]
    bias = model[0].bias.detach().clone()
    with truncate(layers, share):
        for layer, weight, rank in zip(layers, before, ranks, strict=True):
            assert torch.linalg.matrix_rank(layer.weight) == rank
            lost = torch.linalg.svdvals(weight)[rank:]
            # No matrix of this rank is nearer (Eckart and Young).
            assert torch.dist(layer.weight, weight).item() == pytest.approx(lost.norm().item())
        assert torch.equal(model[0].bias, bias)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))


def test_all_singular_values_are_the_layer_itself() -> None:
    model, x = network(), torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        with truncate([model[0]], 1.0):
            assert torch.equal(model(x), y)


def test_weights_come_back_after_an_error() -> None:
    model = network()
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), truncate([model[0]], 0.1):
        raise RuntimeError("inside")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_lie_from_zero_to_one(share: float) -> None:
    with pytest.raises(ValueError, match="must be from 0 to 1"), truncate([network()[0]], share):
        pass


def test_only_linear_layers_are_truncated() -> None:
    with pytest.raises(ValueError, match="got none"), truncate([], 0.5):
        pass
    with pytest.raises(TypeError, match="got GELU"), truncate([*network()], 0.5):
        pass
