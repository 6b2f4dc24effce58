"""The penalty, and the norms of experts without forming them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from torch import nn  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.formats import sliced, sum_of  # noqa: E402
from mumoe_tensor.replace import MixtureOfDecoders, MixtureOfTransforms, Transcoder  # noqa: E402
from mumoe_tensor.replace.penalty import Penalized, expert_norms  # noqa: E402
from mumoe_tensor.testing.strategies import weights  # noqa: E402


@given(weight=weights(backend="pytorch", dtype="float64"))
def test_norms_are_those_of_the_matrices(weight: mt.FactorizedTensor) -> None:
    factors = [f if f is None else f.detach().requires_grad_() for f in weight.factors]
    weight = mt.FactorizedTensor(weight.format, factors, weight.shape)
    expected = mt.to_dense(weight).flatten(-2).norm(dim=-1)
    torch.testing.assert_close(expert_norms(weight), expected, atol=1e-9, rtol=1e-7)
    if expected.min() > 1e-3:
        of_norms, exact = (
            torch.autograd.grad(norms.sum(), weight.arrays, allow_unused=True)
            for norms in (expert_norms(weight), expected)
        )
        torch.testing.assert_close(of_norms, exact)


def test_norms_of_slices_form_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mumoe_tensor.replace.penalty.to_dense", None)
    format = sum_of(sliced("lowrank", 0, 2), sliced("cp", 3, 6))
    weight = mt.FactorizedTensor.random(
        format, experts=7, in_features=5, out_features=4, rank=(2, 3), like=torch.empty(0)
    )
    norms = expert_norms(weight)
    monkeypatch.undo()
    torch.testing.assert_close(norms, mt.to_dense(weight).flatten(-2).norm(dim=-1))
    assert norms.count_nonzero() == 5 or norms[[2, 6]].max() < 1e-18


def test_the_penalty_is_its_formula_and_has_gradients_at_zero() -> None:
    torch.manual_seed(0)
    layer = MixtureOfTransforms(6, 4, ranks=[3, 2, 2, 1])
    x = torch.randn(10, 6)
    y, penalty = Penalized(layer)(x)
    torch.testing.assert_close(y, layer(x))
    assert penalty < 1e-12
    penalty.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    for parameter in layer.mixture.parameters():
        nn.init.normal_(parameter)
    _, (a,) = layer(x, return_coefficients=True)
    norms = [mt.expert_matrix(layer.mixture.weight, n).norm() for n in range(4)]
    expected = (a * torch.stack(norms)).tanh().sum(1).mean()
    torch.testing.assert_close(Penalized(layer)(x)[1], expected)


def test_the_penalty_of_two_levels_and_of_negative_coefficients() -> None:
    torch.manual_seed(0)
    layer = MixtureOfDecoders(6, 5, 4, (3, 2), gate=torch.tanh, format="cp", rank=2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(10, 6)
    first, second = layer(x, return_coefficients=True)[1]
    norms = mt.to_dense(layer.mixture.weight).flatten(-2).norm(dim=-1)
    expected = (torch.einsum("bm,bn->bmn", first, second).abs() * norms).tanh().sum((1, 2)).mean()
    torch.testing.assert_close(Penalized(layer)(x)[1], expected)


def test_a_penalty_is_for_layers_with_experts() -> None:
    assert Penalized(Transcoder(4, 4, latents=8, k=2))
    with pytest.raises(ValueError, match=r"a layer with experts, .*; Linear has none"):
        Penalized(nn.Linear(4, 4))
