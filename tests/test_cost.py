"""Costs: closed forms, published counts, ranks for a budget, expert ranks, what autograd keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.contraction.machine import predicted
from mumoe_tensor.testing import specs

CLIP = dict(in_features=768, out_features=1000, bias=True, gate=True)
GPT2 = dict(in_features=768, hidden=3072, out_features=768, bias=True, gate=True)


# ---- published counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "experts", "rank", "parameters"),
    [
        ("cp", 16, 424, 769_128),
        ("cp", 256, 283, 769_683),
        ("cp", 512, 165, 769_581),
        ("tr", 16, (4, 4, 107), 769_676),
        ("tr", 256, (4, 4, 81), 773_860),
        ("tr", 512, (4, 4, 52), 769_360),
    ],
)
def test_cost_counts_the_published_clip_heads(format, experts, rank, parameters) -> None:
    assert mt.cost(format, experts=experts, rank=rank, **CLIP).parameters == parameters


@pytest.mark.parametrize(
    ("format", "experts", "rank", "total"),
    [
        ("cp", 64, 599, 124_487_976),
        ("cp", 256, 556, 124_789_536),
        ("tr", 64, (4, 4, 153), 124_790_880),
        ("tr", 256, (4, 4, 149), 125_159_136),
    ],
)
def test_cost_counts_the_published_gpt2(format, experts, rank, total) -> None:
    width = 768
    block = width + 3 * width * width + width * width  # norm, attention
    rest = 50_304 * width + 1024 * width + 12 * block + width
    assert rest + 12 * (width + 8 * width * width) == 124_373_760  # the dense model, its MLP with a norm
    mixture = mt.cost(format, experts=experts, rank=rank, **GPT2).parameters + 2 * width  # input_norm
    assert rest + 12 * mixture == total


@pytest.mark.parametrize(("format", "share", "total"), [("cp", 0.75, 18_630_616), ("tr", 0.19, 18_290_792)])
def test_cost_counts_the_published_mixer(format, share, total) -> None:
    width, tokens = 512, 196
    rest = (3 * 16 * 16 + 1) * width + (width + 1) * 1000 + 2 * width + 8 * 4 * width
    sizes = ((tokens, 256), (width, 2048))
    dense = sum(mt.dense_parameters(i, i, hidden=hidden) for i, hidden in sizes)
    assert rest + 8 * dense == 18_528_264

    def block(features: int, hidden: int) -> int:
        r = int(share * features)
        rank = (r,) if format == "cp" else (4, 4, r)
        sizes = dict(in_features=features, hidden=hidden, out_features=features)
        return mt.cost(format, experts=64, rank=rank, bias=True, gate=True, **sizes).parameters

    assert rest + 8 * sum(block(*size) for size in sizes) == total


def test_dense_experts_of_the_published_models() -> None:
    def block(experts: int, features: int, hidden: int, bias: bool) -> int:
        sizes = dict(experts=experts, in_features=features, hidden=hidden, out_features=features)
        return mt.cost("dense", bias=bias, gate=False, **sizes).parameters

    assert 8 * (block(64, 196, 256, False) + block(64, 512, 2048, False)) == pytest.approx(1.125e9, rel=1e-3)
    assert 12 * block(256, 768, 3072, False) == pytest.approx(14.5e9, rel=1e-3)


def test_celeba_head() -> None:
    sizes = dict(experts=128, in_features=768, out_features=40, bias=True, gate=True)
    assert mt.cost("cp", rank=512, **sizes).parameters == 578_048
    assert mt.dense_parameters(768, 40) == 30_760
    assert mt.dense_parameters(768, 40, hidden=1024, bias=False) == 827_392


# ---- closed forms ------------------------------------------------------------------------------------


def closed_parameters(name: str, modes: tuple[int, ...], rank: tuple[int, ...]) -> int:
    """Parameters as the literature writes them, for any number of levels."""
    if name == "cp":
        return rank[0] * sum(modes)
    if name == "hadamard":
        return modes[-1] * sum(modes[:-1])
    if name == "dense":
        return int(np.prod(modes))
    if name == "tucker":
        return int(np.prod(rank)) + sum(n * r for n, r in zip(modes, rank, strict=True))
    bonds = (*rank, rank[0]) if name == "tr" else (1, *rank, 1)
    return sum(a * n * b for a, n, b in zip(bonds[:-1], modes, bonds[1:], strict=True))


def closed_flops(name: str, modes: tuple[int, ...], rank: tuple[int, ...]) -> int:
    """FLOPs of one level of experts as the literature writes them, two a multiply-add."""
    n, i, o = modes
    if name == "cp":
        return 2 * rank[0] * (n + i + o) + rank[0]
    if name == "hadamard":
        return 2 * o * (n + i) + o
    if name == "dense":
        return 2 * n * i * o + 2 * n * o
    if name == "tucker":
        p, q, s = rank
        return 2 * (n * p + i * q + p * q * s + p * s + s * o)
    a, b, c = rank if name == "tr" else (1, *rank)
    return 2 * (a * n * b + b * i * c + c * o * a + a * b * c)


#: Those that the literature writes closed forms of, as the library does: no mode is split.
CLOSED = ["cp", "hadamard", "dense", "tucker", "tr", "tt"]


def closed(**options: Any) -> st.SearchStrategy[mt.LayerSpec]:
    return st.sampled_from(CLOSED).flatmap(lambda name: specs(name, **options))


@given(closed(most=12))
def test_parameters_equal_the_closed_form(spec: mt.LayerSpec) -> None:
    expected = closed_parameters(spec.format.name, spec.mode_sizes, spec.full_rank)
    assert mt.cost(spec).parameters == expected


@given(closed(num_levels=1, most=12))
def test_reference_flops_equal_the_closed_form_of_the_literature(spec: mt.LayerSpec) -> None:
    modes, rank = spec.mode_sizes, spec.full_rank
    assert spec.format.reference_flops(modes, rank) == closed_flops(spec.format.name, modes, rank)


@pytest.mark.parametrize("num_levels", range(5))
@pytest.mark.parametrize("name", CLOSED)
def test_reference_flops_are_near_the_fewest(name: str, num_levels: int) -> None:
    """At the sizes of a layer, where the order of the closed form is the best or close to it."""
    bonds = len(mt.get_format(name).bonds(num_levels))
    rank = (*(2,) * num_levels, 12, 5) if name == "tucker" else (3,) * bonds
    spec = mt.LayerSpec(name, experts=(4,) * num_levels, in_features=50, out_features=40, rank=rank)
    fewest, closed = mt.plan(spec, minimize="flops").flops, mt.cost(spec).reference_flops
    assert fewest == closed if name in ("cp", "hadamard", "tr") else 0.94 * closed < fewest <= closed


@given(closed(most=40), st.sampled_from([1, 2, 30, 1000, 65_536]))
def test_the_plan_never_costs_more_than_the_closed_form(spec: mt.LayerSpec, batch: int) -> None:
    default, fewest = mt.cost(spec, batch=batch), mt.cost(spec, batch=batch, minimize="flops")
    assert fewest.flops <= fewest.reference_flops
    assert default.flops <= 1.05 * default.reference_flops


def test_the_block_adds_up() -> None:
    spec = mt.LayerSpec(
        "tr", experts=(8, 4), in_features=7, hidden=20, out_features=6, rank=(3, 3, 3, 5), bias=True
    )
    block = mt.cost(spec, gate=True, batch=10, dtype="float64")
    first, second = (mt.cost(layer, batch=10, dtype="float64") for layer in spec.layers)
    gate = 7 * (8 + 4)
    assert block.parameters == first.parameters + second.parameters + gate
    assert block.flops == first.flops + second.flops + 2 * 10 * gate
    assert block.reference_flops == first.reference_flops + second.reference_flops + 2 * 10 * gate
    assert block.write == first.write + second.write
    assert block.size == max(first.size, second.size)
    assert block.peak == max(first.peak, second.peak)
    assert block.saved == first.saved + second.saved + 8 * 2 * 10 * 20
    assert block.max_expert_rank == min(first.max_expert_rank, second.max_expert_rank)


@pytest.mark.parametrize(
    "options",
    [
        {"minimize": "peak"},
        {"implementation": "reconstructed", "fold_weights": True},
        {"dtype": "bfloat16", "batch": 2},
    ],
    ids=str,
)
def test_the_plans_are_those_of_the_options(options: Any) -> None:
    spec = mt.LayerSpec("tr", experts=(8, 4), in_features=7, hidden=20, out_features=6, rank=(3, 3, 3, 5))
    plans = mt.cost(spec, **options).plans
    assert plans == tuple(mt.plan(layer, **options) for layer in spec.layers)
    assert plans != mt.cost(spec).plans
    with pytest.raises(ValueError, match="within memory_limit"):
        mt.cost(spec, **options, memory_limit=2)


def test_the_bias_row_is_no_part_of_the_closed_form() -> None:
    sizes = dict(experts=2, in_features=3, out_features=9, batch=5)
    assert mt.cost("dense", **sizes, bias=True).reference_flops == mt.cost("dense", **sizes).reference_flops


def test_a_cost_reads_as_three_lines() -> None:
    sizes = dict(experts=3, in_features=1000, out_features=50, rank=20, batch=2)
    gated, bare = mt.cost("cp", gate=True, **sizes), mt.cost("cp", dtype="float32", **sizes)
    assert f"{gated.parameters:,} parameters (3,000 of the gate), {gated.flops:,} FLOPs" in str(gated)
    _, memory, time = str(bare).splitlines()
    assert memory.endswith(f"peak {bare.peak:,}, saved {bare.saved:,} bytes") and "gate" not in str(bare)
    assert time == predicted(bare.seconds, bare.plans[0].machine)
