"""What is done to a layer, against the dense weight tensor to which it is done by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.analysis import ablate, attribute, edit_bias, keep_only, remove_edit, scale  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402
from mumoe_tensor.testing import dense_moe, dense_weight, leading_shapes, specs  # noqa: E402

EXAMPLES = max(10, settings().max_examples)


@st.composite
def layers(draw: Callable, fewest_levels: int = 1) -> Any:
    """A layer of any format, levels and norm, with a bias or without, and inputs."""
    spec = draw(specs(num_levels=draw(st.integers(fewest_levels, 3))))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = MuMoE.from_spec(
        spec,
        gate=draw(st.sampled_from(["entmax15", "softmax"])),
        gate_norm=draw(st.sampled_from(["batch", "layer", "none"])),
        dtype=torch.float64,
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(*draw(leading_shapes()), layer.gate.in_features, dtype=torch.float64)
    return layer.eval(), x


def dense(layer: Any) -> Any:
    """The weight tensor, in which the last row of the input mode is the bias even where there was none."""
    weight = dense_weight(layer.weight)
    return weight if layer.experts.bias else np.concatenate([weight, 0 * weight[..., :1, :]], -2)


def outputs(weight: Any, layer: Any, x: Any) -> Any:
    coefficients = [a.detach().numpy() for a in layer.gate(x)]
    return torch.from_numpy(dense_moe(weight, x.numpy(), coefficients, bias=True))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-9)


def some(data: Any, count: int) -> list[int]:
    return data.draw(st.lists(st.integers(0, count - 1), unique=True))


@settings(max_examples=EXAMPLES)
@given(layers(), st.data())
def test_coefficients_changed_are_slices_changed(drawn: Any, data: Any) -> None:
    layer, x = drawn
    intact = layer(x)
    level = data.draw(st.integers(0, len(layer.gate.num_experts) - 1))
    experts = some(data, layer.gate.num_experts[level])
    others = [k for k in range(layer.gate.num_experts[level]) if k not in experts]
    for context, changed, factor in (
        (ablate(layer, experts, level), experts, 0.0),
        (scale(layer, experts, -1.5, level), experts, -1.5),
        (keep_only(layer, experts, level), others, 0.0),
    ):
        weight = dense(layer)
        np.moveaxis(weight, level, 0)[list(set(changed))] *= factor
        expected = outputs(weight, layer, x)
        with context, torch.set_grad_enabled(data.draw(st.booleans())):
            close(layer(x), expected)
    assert torch.equal(layer(x), intact)


def test_interventions_add_up() -> None:
    torch.manual_seed(0)
    layer, x = MuMoE(4, 3, (3, 2), rank=2, gate_norm="layer").double().eval(), torch.randn(5, 4).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    weight = dense(layer)
    weight[1] = 0
    weight[2] *= 3
    weight[:, 0] *= 2
    expected = outputs(weight, layer, x)
    with scale(layer, [2], 3.0), ablate(layer, [1]), scale(layer, [0], 2.0, level=1):
        close(layer(x), expected)


@st.composite
def edits(draw: Callable, layer: Any) -> Any:
    shares = st.floats(0, 1)
    lists = [st.lists(shares, min_size=n, max_size=n) for n in layer.gate.num_experts]
    means = [torch.tensor(draw(each), dtype=torch.float64) for each in lists]
    changed = draw(st.lists(st.integers(0, layer.experts.out_features - 1), min_size=1, unique=True))
    return means, changed, draw(st.floats(-9, 9))


def edited(weight: Any, means: Any, changed: Any, strength: float) -> Any:
    """λ times the mean coefficient of an expert more in its bias, for every output that is changed."""
    weight = weight.copy()
    for index in np.ndindex(weight.shape[:-2]):
        share = np.prod([float(mean[n]) for mean, n in zip(means, index, strict=True)])
        for o in set(changed):
            weight[(*index, -1, o)] += strength * share
    return weight


@settings(max_examples=EXAMPLES)
@given(layers(fewest_levels=0), st.data())
def test_edited_biases_are_those_of_the_dense_tensor(drawn: Any, data: Any) -> None:
    layer, x = drawn
    before, keys = layer(x), list(layer.state_dict())
    one, other = data.draw(edits(layer)), data.draw(edits(layer))
    edit_bias(layer, "one", *one)
    edit_bias(layer, "the other", *other)
    weight = edited(edited(dense(layer), *one), *other)
    with torch.set_grad_enabled(data.draw(st.booleans())):
        close(layer(x), outputs(weight, layer, x))
    for index in product(*map(range, layer.gate.num_experts)):
        matrix, bias = layer.expert(index)
        close(torch.cat([matrix, bias[None]]), torch.from_numpy(weight[index]))
    if layer.gate.num_experts:
        with ablate(layer, [0]):
            weight[0] = 0
            close(layer(x), outputs(weight, layer, x))
    remove_edit(layer, "one")
    close(layer(x), outputs(edited(dense(layer), *other), layer, x))
    remove_edit(layer, "the other")
    assert torch.equal(layer(x), before) and list(layer.state_dict()) == keys


@settings(max_examples=EXAMPLES)
@given(layers(), st.data())
def test_contributions_are_those_of_single_experts(drawn: Any, data: Any) -> None:
    layer, x = drawn
    edit_bias(layer, "edit", *data.draw(edits(layer)))
    level = data.draw(st.integers(0, len(layer.gate.num_experts) - 1))
    output = data.draw(st.integers(0, layer.experts.out_features - 1))
    direction = torch.randn(layer.experts.out_features, dtype=torch.float64)
    coefficients = [a.detach() for a in layer.gate(x)]
    one, any_direction = torch.zeros(2, *coefficients[level].shape, dtype=torch.float64)
    for index in product(*map(range, layer.gate.num_experts)):
        matrix, bias = layer.expert(index)
        share = torch.ones(x.shape[:-1], dtype=torch.float64)
        for a, n in zip(coefficients, index, strict=True):
            share = share * a[..., n]
        y = share[..., None] * (x @ matrix + bias).detach()
        one[..., index[level]] += y[..., output]
        any_direction[..., index[level]] += y @ direction
    close(attribute(layer, layer, x, output, level=level), one)
    actual = attribute(nn.Sequential(layer), layer.experts, x, direction, level=level)
    close(actual, any_direction)
    close(actual.sum(-1), (layer(x) @ direction).detach())
    with ablate(layer, [0], level):
        removed = layer(x) @ direction
    close(actual[..., 0], (layer(x) @ direction - removed).detach())
