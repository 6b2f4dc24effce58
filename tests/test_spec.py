"""Specs: sizes checked once, and the ranks they are solved for."""

from __future__ import annotations

import pickle
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor import LayerSpec
from mumoe_tensor.spec import as_budget
from mumoe_tensor.testing import specs

CLIP = dict(in_features=768, out_features=1000, bias=True, gate=True)
GPT2 = dict(in_features=768, hidden=3072, out_features=768, bias=True, gate=True)


#: Layers and blocks with their rank.
@st.composite
def layers_and_blocks(draw) -> LayerSpec:
    spec, hidden = draw(specs(most=12)), draw(st.none() | st.integers(1, 12))
    gated = hidden is not None and draw(st.booleans())
    try:
        return replace(spec, hidden=hidden, gated=gated)
    except ValueError:  # the parts of the layer do not hold it
        return spec


SPECS = layers_and_blocks()


# ---- the value ---------------------------------------------------------------------------------------


@given(SPECS)
def test_a_spec_is_a_value(spec: LayerSpec) -> None:
    same = eval(repr(spec), {"LayerSpec": LayerSpec, **vars(import_module("mumoe_tensor.formats"))})
    assert same == spec and hash(same) == hash(spec)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert (replace(spec, in_features=1) == spec) == (spec.in_features == 1)
    assert replace(spec, bias=not spec.bias) != spec


@given(SPECS)
def test_parameters_are_those_of_the_torch_layer(spec: LayerSpec) -> None:
    nn = pytest.importorskip("mumoe_tensor.nn")
    sizes = [n for n in (spec.in_features, spec.hidden, spec.out_features) if n is not None]
    make = nn.MuMoE if spec.hidden is None else nn.MuMoEMLP
    options = {"gated": True} if spec.gated else {}
    module = make(*sizes, spec.experts, spec.format, spec.rank, bias=spec.bias, device="meta", **options)
    counted = sum(parameter.numel() for parameter in module.parameters())
    assert spec.parameters == spec.weight_parameters + spec.gate_parameters == counted
    assert mt.cost(spec, gate=True).parameters == counted


@given(SPECS, st.integers(1, 100))
def test_functions_take_a_spec_or_its_arguments(spec: LayerSpec, batch: int) -> None:
    sizes = {name: getattr(spec, name) for name in ("experts", "in_features", "out_features", "rank", "bias")}
    block = {"hidden": spec.hidden, "gated": spec.gated}
    assert mt.cost(spec, batch=batch) == mt.cost(spec.format, batch=batch, **sizes, **block)
    if spec.hidden is not None:
        for function in (mt.plan, mt.FactorizedTensor.random):
            with pytest.raises(ValueError, match=f"a block has {'three' if spec.gated else 'two'} weights"):
                function(spec)
        return
    assert mt.plan(spec, batch=batch) == mt.plan(format=spec.format, batch=batch, **sizes)
    one, other = (
        mt.FactorizedTensor.random(*args, **kwargs, seed=0)
        for args, kwargs in (((spec,), {}), ((spec.format,), sizes))
    )
    assert one.shape == other.shape == spec.mode_sizes and one.rank == spec.rank
    np.testing.assert_array_equal(mt.to_dense(one), mt.to_dense(other))


def test_the_layers_of_a_block() -> None:
    block = LayerSpec(
        "tr", experts=(4, 2), in_features=5, hidden=7, out_features=3, rank=(1, 2, 3, 4), bias=True
    )
    assert [layer.mode_sizes for layer in block.layers] == [(4, 2, 6, 7), (4, 2, 8, 3)]
    assert block.weight_parameters == sum(layer.weight_parameters for layer in block.layers)
    (up, down) = block.layers
    assert up.layers == (up,) and up.rank == block.rank
    gated = replace(block, gated=True)
    assert gated.layers == (up, up, down) and gated != block
    assert (
        gated.dense_parameters == block.dense_parameters + 6 * 7 == mt.dense_parameters(5, 3, 7, gated=True)
    )
    assert gated.gate_parameters == block.gate_parameters and gated.max_expert_rank == block.max_expert_rank
    costs, of_up = [mt.cost(spec, batch=8) for spec in (block, gated)], mt.cost(up, batch=8)
    assert costs[1].flops - costs[0].flops == of_up.flops
    # Beside what the products save: both hidden features, the activation and the product.
    assert costs[1].saved - costs[0].saved == of_up.saved + 2 * 8 * 7


SIZES = dict(experts=4, in_features=6, out_features=5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LayerSpec("cp", **SIZES | {"experts": 0}), ValueError, "every number of experts must be"),
        (lambda: LayerSpec("cp", **SIZES | {"experts": (2,) * 17}), ValueError, "at most 16 levels, got 17"),
        (lambda: LayerSpec("cp", **SIZES, hidden=-1), ValueError, "hidden must be positive, got -1"),
        (lambda: LayerSpec("cp", **SIZES, hidden=2.0), TypeError, "hidden must be an integer"),
        (lambda: LayerSpec("cp", **SIZES, gated=True), ValueError, "gated must be False without hidden"),
        (lambda: LayerSpec("cp", **SIZES, hidden=2, gated=1), TypeError, "gated must be True or False"),
        (lambda: LayerSpec("cp", **SIZES, bias=1), TypeError, "bias must be True or False"),
        (lambda: LayerSpec("cp", **SIZES, rank=(2, 3)), ValueError, "one entry per bond, r; got"),
        (lambda: LayerSpec("dense", **SIZES, rank=2), ValueError, "no entries"),
        (lambda: LayerSpec("no", **SIZES), ValueError, "unknown format 'no'"),
        (lambda: mt.plan(LayerSpec("cp", **SIZES, rank=2), bias=True), TypeError, "without sizes.*got bias"),
        (lambda: mt.plan(LayerSpec("cp", **SIZES)), ValueError, "one entry per bond, r; got None"),
        (lambda: LayerSpec("cp", **SIZES).parameters, ValueError, "one entry per bond, r; got None"),
        (lambda: LayerSpec("tr", **SIZES, rank=(None, 2, None)).fitted(), ValueError, "exactly one entry"),
        (lambda: LayerSpec("cp", **SIZES, rank=2).fitted(), ValueError, "exactly one entry of the rank"),
        (lambda: LayerSpec("dense", **SIZES).fitted(), ValueError, "must have a rank to be fitted"),
        (lambda: LayerSpec("cp", **SIZES).fitted(rounding="even"), ValueError, "rounding must be one of"),
        (lambda: LayerSpec("cp", **SIZES).fitted("3y"), ValueError, "parameters must be match"),
        (lambda: LayerSpec("cp", **SIZES).fitted(gate=None), TypeError, "gate must be True or False"),
    ],
)  # fmt: skip
def test_what_is_no_spec_is_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@given(st.data())
def test_the_bias_of_a_split_input_is_no_part_of_it(data: st.DataObject) -> None:
    """The rank left out is solved for whatever the size of the input with a bias row would be."""
    split = [name for name, f in mt.formats().items() if f.splits_input and f.bonds(1)]
    sizes = st.sampled_from([12, 16, 18, 768])
    layer = LayerSpec(
        data.draw(st.sampled_from(split)),
        experts=data.draw(st.integers(1, 4)),
        in_features=data.draw(sizes),
        out_features=data.draw(sizes),
        bias=True,
    )
    parameters = layer.dense_parameters
    fitted = layer.fitted(parameters, rounding="down", gate=False)
    without = replace(layer, bias=False).fitted(parameters - layer.out_features, rounding="down", gate=False)
    assert fitted.rank == without.rank
    assert fitted.weight_parameters == without.weight_parameters + layer.out_features


# ---- rank of an expert -------------------------------------------------------------------------------


def numerical_rank(spec: LayerSpec, seed: int) -> int:
    """The largest rank among the experts of a random weight, the bias row left out."""
    dense = mt.to_dense(mt.FactorizedTensor.random(spec, seed=seed))
    singular = np.linalg.svd(dense[..., : spec.in_features, :], compute_uv=False)
    return int(np.max(np.sum(singular > 1e-9 * singular[..., :1], axis=-1)))


@st.composite
def with_parts(draw, name: str) -> LayerSpec:
    """A layer of a registered format; the parts of a split mode hold exactly its entries."""
    format, experts = mt.formats()[name], draw(st.lists(st.integers(1, 3), max_size=2))
    third = [] if name in ("btt", "monarch") else draw(st.lists(st.none(), max_size=1))
    ends = []
    for mode in ("i", "o") if format.is_split else ():
        parts = [draw(st.integers(1, 3)), draw(st.integers(1, 8)), *(draw(st.integers(1, 3)) for _ in third)]
        format = format.with_splits({mode: parts})
        ends.append(int(np.prod(parts)))
    i, o = ends or draw(st.tuples(*[st.integers(1, 24)] * 2))
    ranks = st.tuples(*[st.integers(1, 4)] * len(format.bonds(len(experts))))
    return LayerSpec(
        format, experts=experts, in_features=i, out_features=o, rank=draw(ranks), bias=draw(st.booleans())
    )


@pytest.mark.parametrize("name", mt.formats())
def test_max_expert_rank_is_the_numerical_rank_of_each_format(name: str) -> None:
    is_always_full = name in ("dense", "hadamard", "shared-expert")
    lower = []

    @given(with_parts(name), st.integers(0, 2**31))
    def run(spec: LayerSpec, seed: int) -> None:
        rank = numerical_rank(spec, seed)
        if name == "kron" and len(spec.format.splits["i"]) > 2:
            assert rank <= spec.max_expert_rank
        else:
            assert rank == spec.max_expert_rank
        lower.append(spec.max_expert_rank < min(spec.in_features, spec.out_features))

    run()
    assert any(lower) != is_always_full


@given(specs(most=6), st.integers(0, 2**31))
def test_max_expert_rank_is_the_numerical_rank_of_random_experts(spec: LayerSpec, seed: int) -> None:
    """Or a bound, where the parts of a mode hold more than it has, or two terms of a sum are structured.

    The bound counts all that parts hold. And the images of two terms may meet: those of ``A ⊗ b`` and
    ``u ⊗ C`` do, whatever the entries are.
    """
    rank = numerical_rank(spec, seed)
    structured = [term for term, _ in spec.format.summands(spec.num_levels) if term.is_split]
    if spec.padding or len(structured) > 1:
        assert rank <= spec.max_expert_rank
    else:
        assert rank == spec.max_expert_rank


def test_max_expert_rank_is_a_bound_for_three_kronecker_parts() -> None:
    kron = mt.formats()["kron"].with_splits({"i": (2, 2, 2), "o": (3, 1, 3)})
    spec = LayerSpec(kron, experts=(), in_features=8, out_features=9, rank=2)
    assert (numerical_rank(spec, 0), spec.max_expert_rank) == (7, 8)


def test_max_expert_rank_is_a_bound_where_a_mode_is_padded_or_terms_are_structured() -> None:
    padded = mt.formats()["kron"].with_splits({"i": (2, 3), "o": (2, 2)})
    spec = LayerSpec(padded, experts=(), in_features=4, out_features=4, rank=1)
    assert (numerical_rank(spec, 0), spec.max_expert_rank) == (3, 4)
    ends = [{"i": (16, 1), "o": (6, 2)}, {"i": (4, 4), "o": (3, 4)}]
    kron, tucker = (
        mt.formats()[n].with_splits(s) for n, s in zip(("kron", "tucker-matrix"), ends, strict=True)
    )
    total = mt.sum_of(kron, tucker)
    spec = LayerSpec(total, experts=(), in_features=16, out_features=12, rank=(1, 3, 3, 1, 3))
    assert (numerical_rank(spec, 0), spec.max_expert_rank) == (8, 9)


@pytest.mark.parametrize(
    ("format", "rank", "expected"),
    [("cp", (5,), 5), ("tr", (2, 3, 4), 8), ("tr", (3, 2, 4), 8), ("tt", (3, 4), 4), ("tucker", (9, 6, 7), 6),
     ("hadamard", (), 20), ("dense", (), 20)],
)  # fmt: skip
def test_max_expert_rank_of_the_table(format: str, rank: tuple[int, ...], expected: int) -> None:
    spec = LayerSpec(format, experts=16, in_features=30, out_features=20, rank=rank)
    assert spec.max_expert_rank == expected


def test_max_expert_rank_of_the_ring_without_experts() -> None:
    assert LayerSpec("tr", experts=(), in_features=30, out_features=20, rank=(2, 3)).max_expert_rank == 6


def test_the_bias_row_does_not_raise_the_rank_of_an_expert() -> None:
    spec = LayerSpec("dense", experts=2, in_features=3, out_features=9)
    assert replace(spec, bias=True).max_expert_rank == spec.max_expert_rank == 3


# ---- rank for a budget -------------------------------------------------------------------------------


@given(
    specs(most=30).filter(lambda spec: spec.rank),
    st.integers(1, 40_000),
    st.sampled_from(["up", "down", "nearest"]),
    st.booleans(),
    st.one_of(st.none(), st.integers(0, 6)),
)
def test_fitted_is_the_last_rank_before_the_budget(spec, budget, rounding, gate, place) -> None:
    rank = None if place is None else tuple(
        None if k == place % len(spec.rank) else r for k, r in enumerate(spec.rank)
    )  # fmt: skip
    open_spec = replace(spec, rank=rank)

    def family(t: int) -> tuple[int, ...]:
        if rank is not None:
            return tuple(t if r is None else r for r in rank)
        return spec.weight_format.rank_family(spec.mode_sizes, t)

    def total(t: int) -> int:
        return mt.cost(replace(spec, rank=family(t)), gate=gate).parameters

    if total(1) > budget:
        with pytest.raises(ValueError, match="gate alone has"):
            open_spec.fitted(budget, rounding=rounding, gate=gate)
        return
    below, above = 1, 50_000
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if total(middle) <= budget else (below, middle)
    reached = total(below) == budget
    saturated = family(below + 1) == family(below)
    if rounding == "up" and saturated and not reached:
        with pytest.raises(ValueError, match="full rank"):
            open_spec.fitted(budget, rounding=rounding, gate=gate)
        return
    fitted = open_spec.fitted(budget, rounding=rounding, gate=gate)
    fitted_total = mt.cost(fitted, gate=gate).parameters
    over = total(below) if reached or saturated else total(below + 1)
    expected = {
        "up": over,
        "down": total(below),
        "nearest": min((total(below), over), key=lambda cost: abs(cost - budget)),
    }[rounding]
    assert fitted_total == expected


@pytest.mark.parametrize("rounding", ["up", "down", "nearest"])
def test_a_budget_that_a_rank_meets(rounding: str) -> None:
    spec = LayerSpec("cp", experts=4, in_features=6, out_features=6)  # 16 parameters for each of the rank
    for rank in (1, 2, 3, 7):
        assert spec.fitted(16 * rank, rounding=rounding, gate=False).rank == (rank,)
        halfway = spec.fitted(16 * rank + 8, rounding=rounding, gate=False)
        assert halfway.rank == (rank + (rounding == "up"),)


@pytest.mark.parametrize(
    ("format", "of_layer", "of_block"),
    [
        ("cp", (20,), (30,)),
        ("tr", (4, 4, 4, 5), (4, 4, 4, 8)),
        ("tt", (4, 4, 20), (4, 4, 30)),
        ("tucker", (4, 2, 20, 20), (4, 2, 30, 30)),
    ],
)
def test_the_smallest_rank_that_allows_experts_of_full_rank(format, of_layer, of_block) -> None:
    layer = LayerSpec(format, experts=(64, 2), in_features=50, out_features=20)
    assert layer.with_full_rank_experts() == replace(layer, rank=of_layer)
    assert replace(layer, rank=of_layer).max_expert_rank == 20
    # Both layers of a block have the rank that one of them needs.
    block = replace(layer, hidden=30)
    assert block.with_full_rank_experts() == replace(block, rank=of_block)
    assert [part.max_expert_rank for part in replace(block, rank=of_block).layers] == [30, 20]
    assert replace(block, rank=of_block).max_expert_rank == 20


@pytest.mark.parametrize("name", [name for name, f in mt.formats().items() if f.is_split and f.bonds(1)])
def test_parts_of_both_layers_of_a_block_allow_experts_of_full_rank(name: str) -> None:
    block = LayerSpec(name, experts=3, in_features=12, hidden=24, out_features=16)

    def is_full(rank: tuple[int, ...]) -> bool:
        return [layer.max_expert_rank for layer in replace(block, rank=rank).layers] == [12, 16]

    family = [block.format.rank_family((3, 24, 24), t) for t in range(1, 25)]
    assert block.with_full_rank_experts().rank == next(filter(is_full, family))


@pytest.mark.parametrize("format", ["cp", "tr", "tt", "tucker"])
def test_fit_rank_refuses_what_the_gate_alone_exceeds(format) -> None:
    with pytest.raises(ValueError, match="769,536"):
        mt.fit_rank(format, experts=1002, parameters=769_000, **CLIP)


def test_fit_rank_is_proportional_for_tucker_and_capped() -> None:
    rank = mt.fit_rank("tucker", experts=8, in_features=768, out_features=96, bias=False, parameters=200_000)
    ratios = [r / n for r, n in zip(rank, (8, 768, 96), strict=True)]
    assert max(ratios) <= 1
    assert max(ratios) - min(ratios) < 1 / 8


@pytest.mark.parametrize(
    ("experts", "cp", "tr"),
    [(16, 424, 107), (32, 414, 106), (64, 393, 102), (128, 354, 95), (256, 283, 81), (512, 165, 52)],
)
def test_fit_rank_gives_the_published_clip_heads(experts: int, cp: int, tr: int) -> None:
    assert mt.fit_rank("cp", experts=experts, parameters=769_000, **CLIP) == cp
    assert mt.fit_rank("cp", experts=experts, **CLIP) == cp  # 769,000 is the linear layer
    assert mt.fit_rank("tr", experts=experts, rank=(4, 4, None), parameters=769_000, **CLIP) == (4, 4, tr)


@pytest.mark.parametrize(("format", "rank"), [("cp", 599), ("tr", (4, 4, 153))])
def test_fit_rank_gives_the_published_gpt2_blocks(format, rank) -> None:
    open_rank = None if format == "cp" else (4, 4, None)
    assert mt.dense_parameters(768, 768, hidden=3072) == 4_722_432
    assert mt.fit_rank(format, experts=64, rank=open_rank, parameters=4_722_432, **GPT2) == rank


def test_tucker_rank_of_a_block_is_capped_by_both_layers() -> None:
    block = dict(experts=4, in_features=6, hidden=30, out_features=5)
    rank = mt.fit_rank("tucker", parameters=1200, rounding="down", **block)
    assert all(r <= n for r, n in zip(rank, (4, 6, 5), strict=True))


def test_match_is_the_dense_layer_without_biases_if_there_are_none() -> None:
    sizes = dict(experts=2, in_features=30, out_features=40)
    dense = mt.dense_parameters(30, 40, bias=False)
    assert mt.fit_rank("cp", **sizes) == mt.fit_rank("cp", parameters=dense, **sizes) == 17


def test_a_multiple_is_rounded_to_the_nearest_budget() -> None:
    assert as_budget("0.29x", 100) == 29


def test_padding_shows() -> None:
    format = mt.get_format("btt").with_splits({"i": (22, 35), "o": (3, 3)})
    spec = mt.LayerSpec(format, experts=4, in_features=769, out_features=9, rank=2)
    assert spec.padding == {"in_features": (769, 770)}
    assert str(mt.cost(spec)).endswith("\nin_features 769 padded to 770")
    wide = mt.get_format("kron").with_splits({"i": (4, 3), "o": (3, 4)})
    block = mt.LayerSpec(
        mt.sum_of("cp", wide), experts=4, in_features=12, hidden=11, out_features=12, rank=(1, 1)
    )
    assert block.padding == {"hidden": (11, 12)}
    assert mt.LayerSpec("btt", experts=4, in_features=768, out_features=9, rank=2).padding == {}


def test_slices_that_meet_have_no_expert_in_common() -> None:
    format = mt.sum_of(mt.sliced("cp", 0, 2), mt.sliced("cp", 2, 4))
    assert LayerSpec(format, experts=4, in_features=8, out_features=8, rank=(2, 3)).max_expert_rank == 3
