"""What is compared costs what it is said to cost, and is what it is said to be."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mumoe_tensor as mt
from mumoe_tensor.study.mixtures import SparseMixture
from mumoe_tensor.study.subjects import BASELINE, SPARSE, Subject, budget_of, fitted

SIZES = [(24, 20), (24, 40, 20)]


def named(sizes: tuple[int, ...]) -> dict[str, Any]:
    return {
        "in_features": sizes[0],
        "hidden": sizes[1] if len(sizes) == 3 else None,
        "out_features": sizes[-1],
    }


def subjects(sizes: tuple[int, ...], experts: tuple[int, ...]) -> list[Subject]:
    found, _ = fitted(sizes, experts, list(mt.formats()), "2x")
    return [Subject(BASELINE, sizes), *found, Subject(SPARSE, sizes, experts)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("experts", [(4,), (3, 2)], ids=str)
def test_modules_have_the_parameters_that_are_told(sizes: tuple[int, ...], experts: tuple[int, ...]) -> None:
    for subject in subjects(sizes, experts):
        module = subject.build()
        told = subject.figures(8)
        assert told["parameters"] == sum(p.numel() for p in module.parameters()), subject
        assert module(torch.randn(8, sizes[0])).shape == (8, sizes[-1])
    assert len({subject.key for subject in subjects(sizes, experts)}) == len(mt.formats()) + 2


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_figures_are_those_of_the_cost(sizes: tuple[int, ...]) -> None:
    for subject in subjects(sizes, (4,))[1:-1]:
        cost = mt.cost(
            subject.name, experts=4, rank=subject.rank or None, bias=True, gate=True, batch=8,
            dtype="float32", **named(sizes),
        )  # fmt: skip
        assert subject.figures(8) == {
            "parameters": cost.parameters,
            "gate parameters": 4 * 24,
            "FLOPs": cost.flops / 8,
            "intensity": cost.flops / (4 * (cost.parameters + 8 * (24 + 4)) + cost.write),
            "saved": (cost.saved + 4 * 8 * 24) / 8,
            "expert rank": cost.max_expert_rank,
        }


def kept_bytes(module: nn.Module, x: torch.Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.is_floating_point() and saved.untyped_storage().data_ptr() not in own:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        module(x).sum().backward()
    return sum(kept.values())


def test_the_dense_and_the_sparse_layer_keep_what_is_told() -> None:
    x = torch.randn(64, 240, requires_grad=True)
    for sizes in ((240, 200), (240, 400, 200)):
        dense = Subject(BASELINE, sizes)
        assert kept_bytes(dense.build(), x) == 64 * dense.figures(64)["saved"]
        sparse = Subject(SPARSE, sizes, (4,), top_k=2)
        # Besides: the chosen coefficients, and what top k and softmax keep, small beside the rest.
        assert kept_bytes(sparse.build(), x) == pytest.approx(64 * sparse.figures(64)["saved"], rel=0.1)


def test_flops_of_the_products() -> None:
    x = torch.randn(64, 24)
    for sizes in SIZES:
        for subject in (Subject(BASELINE, sizes), Subject(SPARSE, sizes, (4,), top_k=2)):
            module = subject.build()
            with FlopCounterMode(display=False) as counter:
                module(x)
            # The counter sees products only: not the weighting of two outputs.
            extra = 2 * 2 * sizes[-1] if subject.name == SPARSE else 0
            assert counter.get_total_flops() == 64 * (subject.figures(64)["FLOPs"] - extra)


def test_the_sparse_mixture_is_the_sum_over_the_largest_logits() -> None:
    torch.manual_seed(0)
    layer = SparseMixture((5, 7, 3), experts=6, k=2).double()
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
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_ranks_come_nearest_to_the_budget() -> None:
    for text, budget in (("match", 25 * 40 + 41 * 20), ("2x", 2 * (25 * 40 + 41 * 20)), ("3,000", 3000)):
        found, unfitted = fitted((24, 40, 20), (4,), list(mt.formats()), text)
        assert not unfitted and budget_of(text, (24, 40, 20)) == budget
        for subject in found:
            layer = {"experts": 4, "bias": True, "gate": True, **named(subject.sizes)}
            if not subject.budget:
                assert not mt.formats()[subject.name].bonds(1)
                continue
            assert subject.budget == budget
            sides = [
                mt.cost(subject.name, rank=rank, **layer).parameters
                for rank in (
                    mt.fit_rank(subject.name, parameters=budget, rounding=r, **layer) for r in ("down", "up")
                )
            ]
            mine = subject.figures(1)["parameters"]
            assert mine in sides and abs(mine - budget) == min(abs(side - budget) for side in sides)


def test_what_has_no_room_is_told() -> None:
    found, unfitted = fitted((24, 20), (64,), list(mt.formats()))
    assert {subject.name for subject in found} == {n for n, f in mt.formats().items() if not f.bonds(1)}
    assert "the gate alone has 1,536" in unfitted["cp"]


@pytest.mark.parametrize("text", ["some", "0", "-5", "0x", "1e400x", "nanx", "x", ""])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="parameters must be match, a positive number, or a multiple"):
        budget_of(text, (3, 2))


def test_sizes_of_levels_multiply_for_the_sparse_mixture() -> None:
    subject = Subject(SPARSE, (4, 3), (3, 2))
    assert subject.build().gate.num_experts == (prod((3, 2)),)
