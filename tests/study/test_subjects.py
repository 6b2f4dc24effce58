"""The modules that a study compares are those of their specs, and cost what their figures say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mumoe_tensor as mt
from mumoe_tensor.formats import get_format
from mumoe_tensor.formats.text import format_text
from mumoe_tensor.study.layers import dense
from mumoe_tensor.study.mixtures import SparseMixture
from mumoe_tensor.study.subjects import BASELINE, SPARSE, Subject, fitted

LAYERS = [dense(24, 20), dense(24, 20, hidden=40)]
#: One format with two splits, of which one pads an input of 24, and two sums of terms of one title.
COMPOSED = [
    get_format({"name": "btt", "splits": {"i": [5, 8]}}),
    mt.sum_of(mt.shared("lowrank"), "cp"),
    mt.sum_of(mt.shared("lowrank"), mt.sliced("cp", 0, 2)),
]
NAMES = [*mt.formats(), *map(format_text, COMPOSED)]


def sparse(layer: mt.LayerSpec, *experts: int) -> Subject:
    return Subject(replace(layer, experts=experts), SPARSE)


def subjects(layer: mt.LayerSpec, experts: tuple[int, ...]) -> list[Subject]:
    subjects, _ = fitted(layer, experts, NAMES, "3x")
    return [Subject(layer, BASELINE), *subjects, sparse(layer, *experts)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("experts", [(4,), (3, 2)], ids=str)
def test_modules_have_the_parameters_of_their_figures(layer: mt.LayerSpec, experts: tuple[int, ...]) -> None:
    for subject in subjects(layer, experts):
        module = subject.build()
        assert subject.figures(8)["parameters"] == sum(p.numel() for p in module.parameters()), subject
        assert module(torch.randn(8, 24)).shape == (8, 20)
    assert len({subject.key for subject in subjects(layer, experts)}) == len(NAMES) + 2
    assert len({subject.title for subject in subjects(layer, experts)}) == len(NAMES) + 2


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_figures_are_those_of_the_cost(layer: mt.LayerSpec) -> None:
    for subject in subjects(layer, (4,))[1:-1]:
        cost = mt.cost(subject.spec, gate=True, batch=8, dtype="float32")
        assert subject.figures(8) == {
            "parameters": cost.parameters,
            "gate parameters": 4 * 24,
            "FLOPs": cost.flops / 8,
            "intensity": cost.flops / (4 * (cost.parameters + 8 * (24 + 4)) + cost.write),
            "saved": (cost.saved + 4 * 8 * 24) / 8,
            "expert rank": cost.max_expert_rank,
        }
        assert subject.predicted(8, "cpu") == cost.seconds
        gpu = mt.cost(subject.spec, gate=True, batch=8, machine="cuda")
        assert subject.predicted(8, "cuda") == gpu.seconds


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_more_inputs_are_predicted_to_take_longer(layer: mt.LayerSpec) -> None:
    for subject in subjects(layer, (4,)):
        for device in ("cpu", "cuda"):
            times = [subject.predicted(batch, device) for batch in (1, 64, 4096)]
            assert 0 < times[0] <= times[1] <= times[2]


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.is_floating_point() and saved.untyped_storage().data_ptr() not in weights:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        module(x).sum().backward()
    return sum(sizes.values())


def test_the_dense_and_the_sparse_layer_save_what_their_figures_say() -> None:
    x = torch.randn(64, 240, requires_grad=True)
    for layer in (dense(240, 200), dense(240, 200, hidden=400)):
        baseline = Subject(layer, BASELINE)
        assert saved_bytes(baseline.build(), x) == 64 * baseline.figures(64)["saved"]
        mixture = sparse(layer, 4)
        # Besides: the chosen coefficients, and what top k and softmax save, small beside the rest.
        assert saved_bytes(mixture.build(), x) == pytest.approx(64 * mixture.figures(64)["saved"], rel=0.1)


def test_flops_of_the_products() -> None:
    x = torch.randn(64, 24)
    for layer in LAYERS:
        for subject in (Subject(layer, BASELINE), sparse(layer, 4)):
            module = subject.build()
            with FlopCounterMode(display=False) as counter:
                module(x)
            # The counter sees products only: not the weighting of two outputs.
            extra = 2 * 2 * 20 if subject.role == SPARSE else 0
            assert counter.get_total_flops() == 64 * (subject.figures(64)["FLOPs"] - extra)


def test_the_sparse_mixture_is_the_sum_over_the_largest_logits() -> None:
    torch.manual_seed(0)
    layer = SparseMixture(replace(dense(5, 3, hidden=7), experts=(6,)), k=2).double()
    x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = torch.zeros_like(y)
    for row in range(4):
        for column in range(2):
            z = x[row, column]
            logits = layer.gate.weight @ z
            values, chosen = logits.topk(2)
            for a, n in zip(values.softmax(0), chosen, strict=True):
                hidden = z @ layer.weights[0][n] + layer.biases[0][n]
                expected[row, column] += a * (
                    nn.functional.gelu(hidden) @ layer.weights[1][n] + layer.biases[1][n]
                )
    torch.testing.assert_close(y, expected)
    wanted = (x, *layer.parameters())
    gradients = [torch.autograd.grad(out.sin().sum(), wanted) for out in (y, expected)]
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_ranks_come_nearest_to_the_budget() -> None:
    match = 25 * 40 + 41 * 20
    for text, budget in (("1.5x", 3 * match // 2), ("2x", 2 * match), ("3,000", 3000)):
        subjects, unfitted = fitted(dense(24, 20, hidden=40), (4,), list(mt.formats()), text)
        assert not unfitted
        for subject in subjects:
            if not subject.budget:
                assert not subject.spec.format.bonds(1)
                continue
            assert subject.budget == budget
            unsolved = replace(subject.spec, rank=None)
            sides = [unsolved.fitted(budget, rounding=rounding).parameters for rounding in ("down", "up")]
            parameters = subject.figures(1)["parameters"]
            assert parameters in sides
            assert abs(parameters - budget) == min(abs(side - budget) for side in sides)


@pytest.mark.parametrize("text", ["some", "0", "-5", "0x", "1e400x", "nanx", "x", ""])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="parameters must be match, a positive number, or a multiple"):
        fitted(dense(3, 2), (4,), ["cp"], text)


def test_formats_without_room_in_the_budget_have_a_reason() -> None:
    subjects, unfitted = fitted(dense(24, 20), (64,), list(mt.formats()))
    assert {subject.name for subject in subjects} == {n for n, f in mt.formats().items() if not f.bonds(1)}
    assert "the gate alone has 1,536" in unfitted["cp"]


@pytest.mark.parametrize("classes", [10, 47, 100, 101])
def test_a_size_without_parts_leaves_out_the_formats_that_split_it(classes: int) -> None:
    subjects, unfitted = fitted(dense(64, classes, hidden=128), (4,), list(mt.formats()), "2x")
    left_out = {name for name, format in mt.formats().items() if format.is_split and classes in (47, 101)}
    assert (
        set(unfitted) == left_out and {subject.name for subject in subjects} == set(mt.formats()) - left_out
    )
    for why in unfitted.values():
        assert f"the size of mode 'o' must be a product of 2 factors above one, got {classes}" in why


def test_layers_without_levels_of_experts_are_subjects() -> None:
    subjects, unfitted = fitted(dense(24, 20), (), ["cp", "btt", "kron", "monarch"])
    assert not unfitted
    for subject in subjects:
        assert subject.build()(torch.randn(3, 24)).shape == (3, 20)
        assert subject.figures(8)["gate parameters"] == 0


def test_sizes_of_levels_multiply_for_the_sparse_mixture() -> None:
    assert sparse(dense(4, 3), 3, 2).build().gate.num_experts == (6,)
