"""Layers in the place of others equal plain formulas, start at their bias, and are made like a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import gelu  # noqa: E402

from mumoe_tensor.formats import Factor, Format  # noqa: E402
from mumoe_tensor.nn.watch import hooked  # noqa: E402
from mumoe_tensor.replace import MixtureOfDecoders, MixtureOfTransforms, Transcoder  # noqa: E402
from mumoe_tensor.testing import dense_weight, leading_shapes, specs  # noqa: E402
from mumoe_tensor.testing.oracle import sum_of_terms  # noqa: E402

FLOAT64 = torch.float64


class Outward(Format):
    """A format of a user: CP with the factor of the output first."""

    name = title = "outward"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor(f"{mode} r") for mode in reversed(modes)]


def decoders(spec: mt.LayerSpec, in_features: int = 3, **options: Any) -> Any:
    """The mixture of decoders whose experts have a spec, in float64."""
    if spec.experts and not options.keys() & {"k", "gate"}:
        options["k"] = min(spec.experts)
    return MixtureOfDecoders(
        in_features, spec.in_features, spec.out_features, spec.experts, format=spec.format, rank=spec.rank,
        dtype=FLOAT64, **options,
    )  # fmt: skip


def drawn(layer: Any) -> Any:
    """The layer with all parameters drawn from a normal distribution."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def with_gradients(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Outputs of a function of the parameters of a layer, and gradients of these and of the input."""
    x = x.detach().requires_grad_()
    y = function(x)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent, materialize_grads=True)]


def assert_equals(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    pairs = zip(with_gradients(layer, layer, x), with_gradients(layer, function, x), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def coefficients(layer: Any, x: Tensor, k: int) -> list[Tensor]:
    """ReLU of the k largest logits of each level."""
    levels = []
    for logits in (x @ layer.gate.weight.T + layer.gate.bias).split(layer.num_experts, -1):
        last = logits.sort(-1, descending=True).values[..., k - 1 : k]
        levels.append(torch.where(logits >= last, logits, 0).relu())
    return levels


def weight(experts: Any) -> Tensor:
    """The dense weight, of shape (N1, ..., NE, I, O)."""
    shapes = experts.weight.format.shapes(experts.weight.shape, experts.weight.rank)
    pairs = zip(experts.weight.factors, shapes, strict=True)
    factors = [torch.ones(shape, dtype=FLOAT64) if factor is None else factor for factor, shape in pairs]
    return sum_of_terms(experts.weight, factors, torch.einsum, torch.from_numpy)


def mixed(dense: Tensor, levels: list[Tensor], z: Tensor) -> Tensor:
    matrices = dense.expand(*z.shape[:-1], *dense.shape)
    for a in levels:
        matrices = (matrices * a.reshape(*a.shape, *[1] * (matrices.ndim - a.ndim))).sum(a.ndim - 1)
    return (z[..., None] * matrices).sum(-2)


# ---- plain formulas -------------------------------------------------------------------------------------


@given(specs(bias=False), st.booleans(), st.booleans(), leading_shapes(), st.data())
def test_a_mixture_of_decoders_is_its_formula_with_all_gradients(spec, gated, bias, leading, data) -> None:
    k = data.draw(st.integers(1, min(spec.experts))) if spec.experts else None
    layer = drawn(decoders(spec, k=k, gated=gated, hidden_bias=bias))

    def formula(x: Tensor) -> Tensor:
        u, v = layer.up, layer.gate_proj
        hidden = x @ u.weight.T + (u.bias if bias else 0)
        z = gelu(x @ v.weight.T + (v.bias if bias else 0)) * hidden if gated else gelu(hidden)
        levels = coefficients(layer, x, k) if spec.experts else []
        return mixed(weight(layer.mixture.experts), levels, z) + layer.bias

    assert_equals(layer, formula, torch.randn(*leading, 3, dtype=FLOAT64))


@pytest.mark.parametrize("format", [Outward(), mt.sum_of(mt.shared("dense"), Outward())])
def test_a_format_of_a_user_serves(format) -> None:
    spec = mt.LayerSpec(format, experts=(5,), in_features=6, out_features=4, rank=2)
    layer = drawn(decoders(spec, k=2))
    z = gelu(layer.up(x := torch.randn(7, 3, dtype=FLOAT64)))
    expected = mixed(torch.from_numpy(dense_weight(layer.mixture.weight)), coefficients(layer, x, 2), z)
    torch.testing.assert_close(layer(x), expected + layer.bias)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.booleans(), leading_shapes())
def test_with_constant_coefficients_it_is_the_block_with_another_decoder(counts, gated, leading) -> None:
    spec = mt.LayerSpec("hadamard", experts=counts, in_features=6, out_features=4)
    layer = drawn(decoders(spec, gated=gated))
    levels = tuple(torch.randn(n, dtype=FLOAT64) for n in counts)
    *factors, decoder = layer.mixture.weight.factors
    scale = torch.ones(4, dtype=FLOAT64)
    for c, a in zip(factors, levels, strict=True):
        scale = scale * (c.T @ a)
    last = nn.Linear(6, 4, dtype=FLOAT64)
    last.weight, last.bias = nn.Parameter((decoder * scale).T), layer.bias
    x = torch.randn(*leading, 3, dtype=FLOAT64)
    hidden = layer.up(x)
    expected = last(gelu(layer.gate_proj(x)) * hidden if gated else gelu(hidden))
    with hooked(layer.gate, lambda *_: tuple(a.expand(*leading, -1) for a in levels)):
        torch.testing.assert_close(layer(x), expected)


@given(st.integers(1, 6), st.booleans(), st.booleans(), leading_shapes(), st.data())
def test_a_transcoder_is_its_formula_with_all_gradients(latents, skip, bias, leading, data) -> None:
    k = data.draw(st.integers(1, latents))
    layer = drawn(Transcoder(3, 4, latents, k, skip=skip, bias=bias, dtype=FLOAT64))

    def formula(x: Tensor) -> Tensor:
        (a,) = coefficients(layer, x, k)
        (d,) = layer.mixture.weight.factors
        y = a @ d[:, 0] + (layer.bias if bias else 0)
        return y + x @ layer.skip.weight.T if skip else y

    assert_equals(layer, formula, torch.randn(*leading, 3, dtype=FLOAT64))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.booleans(), leading_shapes())
def test_a_mixture_of_transforms_is_its_formula_with_all_gradients(ranks, bias, leading) -> None:
    layer = drawn(MixtureOfTransforms(3, 4, ranks, bias=bias, dtype=FLOAT64))

    def formula(x: Tensor) -> Tensor:
        a = mt.jumprelu(x @ layer.gate.weight.T, layer.gate.log_threshold.exp(), bandwidth=0.001)
        maps = [
            (down, up) for term in layer.mixture.weight.terms for down, up in zip(*term.factors, strict=True)
        ]
        assert [down.shape[1] for down, _ in maps] == ranks
        parts = [a[..., n : n + 1] * (x @ down @ up) for n, (down, up) in enumerate(maps)]
        return sum(parts) + (layer.bias if bias else 0)

    assert_equals(layer, formula, torch.randn(*leading, 3, dtype=FLOAT64))


# ---- the start ------------------------------------------------------------------------------------------


@given(specs(bias=False))
def test_outputs_start_at_the_bias_and_the_output_factor_learns(spec) -> None:
    layer = decoders(spec)
    nn.init.normal_(layer.bias)
    y = layer(torch.randn(50, 3, dtype=FLOAT64))
    assert torch.equal(y, layer.bias.expand(50, -1))
    y.square().sum().backward()
    for term in layer.mixture.experts._terms:
        assert layer.mixture.experts.factors[term.factors][-1].grad.any()


# ---- like a block ---------------------------------------------------------------------------------------


def test_sizes_are_those_of_a_block() -> None:
    block = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double()
    x = torch.randn(5, 3, 6, dtype=FLOAT64)
    layers = [
        MixtureOfDecoders.like(block, experts=8, k=2),
        Transcoder.like(block, latents=8, k=2),
        MixtureOfTransforms.like(block, ranks=[2, 1]),
        Transcoder.like(nn.Linear(6, 4, dtype=FLOAT64), latents=8, k=2, skip=True),
    ]
    for layer in layers:
        assert layer(x).shape == (5, 3, 4) and layer(x).dtype == FLOAT64
    assert layers[0].up.out_features == 10 and type(layers[0].activation) is nn.ReLU
    for layer in layers:
        again = type(layer).from_config(layer.config, dtype=FLOAT64)
        again.load_state_dict(drawn(layer).state_dict())
        assert torch.equal(again(x), layer(x)) and again.config == layer.config
