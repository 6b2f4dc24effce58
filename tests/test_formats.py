"""Declarations, the registry, and TensorLy's containers."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import tensorly as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.random import random_cp, random_tr, random_tt, random_tucker

import mumoe_tensor as mt
from mumoe_tensor.backend import load_backend, tensorly_backend
from mumoe_tensor.testing import (
    check_equals_dense,
    dense_weight,
    formats,
    installed_backends,
    jax_float64,
    levels,
    make_array,
    ranks,
    run_check,
    sizes,
    to_numpy,
    weights,
)

#: Bonds and factors of one and of two levels, as DESIGN writes them.
DECLARED = {
    "cp": {
        0: ("r", "r | i r | o r"),
        1: ("r", "r | n1 r | i r | o r"),
        2: ("r", "r | n1 r | n2 r | i r | o r"),
    },
    "hadamard": {0: ("", "i o"), 1: ("", "n1 o | i o"), 2: ("", "n1 o | n2 o | i o")},
    "dense": {0: ("", "i o"), 1: ("", "n1 i o"), 2: ("", "n1 n2 i o")},
    "tucker": {
        0: ("r_i r_o", "r_i r_o | i r_i | o r_o"),
        1: ("r_n1 r_i r_o", "r_n1 r_i r_o | n1 r_n1 | i r_i | o r_o"),
        2: ("r_n1 r_n2 r_i r_o", "r_n1 r_n2 r_i r_o | n1 r_n1 | n2 r_n2 | i r_i | o r_o"),
    },
    "tr": {
        0: ("b1 b2", "b1 i b2 | b2 o b1"),
        1: ("b1 b2 b3", "b1 n1 b2 | b2 i b3 | b3 o b1"),
        2: ("b1 b2 b3 b4", "b1 n1 b2 | b2 n2 b3 | b3 i b4 | b4 o b1"),
    },
    "tt": {
        0: ("b2", "i b2 | b2 o"),
        1: ("b2 b3", "n1 b2 | b2 i b3 | b3 o"),
        2: ("b2 b3 b4", "n1 b2 | b2 n2 b3 | b3 i b4 | b4 o"),
    },
}


def test_registered_formats() -> None:
    assert set(mt.formats()) == set(DECLARED)
    for name, format in mt.formats().items():
        assert format.name == name
        assert mt.get_format(name) is format
        assert mt.get_format(format) is format


def test_formats_returns_a_copy() -> None:
    mt.formats().clear()
    assert "cp" in mt.formats()


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("format", DECLARED)
def test_declaration(format: str, levels: int) -> None:
    bonds, factors = DECLARED[format][levels]
    declared = mt.get_format(format).declaration(levels)
    assert " | ".join(" ".join(f.indices) for f in declared) == factors
    assert mt.get_format(format).bonds(levels) == tuple(bonds.split())
    assert [k for k, f in enumerate(declared) if f.optional] == ([0] if format == "cp" else [])


@pytest.mark.parametrize(
    ("format", "order"),
    [
        ("tr", "n1 b1 b2 | i b2 b3 | b1 b3 o"),
        ("tt", "n1 b2 | i b2 b3 | b3 o"),
        ("tucker", "r_i r_n1 r_o | n1 r_n1 | i r_i | o r_o"),
        ("cp", "r | n1 r | i r | o r"),
        ("hadamard", "n1 o | i o"),
        ("dense", "n1 i o"),
    ],
)
def test_memory_order(format: str, order: str) -> None:
    declared = mt.get_format(format).declaration(1)
    assert " | ".join(" ".join(f.memory_order) for f in declared) == order


@given(formats(), levels(), st.data())
def test_shapes_follow_modes_and_rank(format: mt.Format, levels: int, data: st.DataObject) -> None:
    modes = data.draw(st.tuples(*[sizes(9)] * (levels + 2)))
    rank = data.draw(ranks(format, levels, 9))
    size = format.index_sizes(modes, rank)
    assert tuple(size.values()) == (*modes, *rank)
    assert format.shapes(modes, rank) == [
        tuple(size[x] for x in f.indices) for f in format.declaration(levels)
    ]
    assert format.check_rank(rank, levels) == rank
    if len(rank) == 1:
        assert format.check_rank(rank[0], levels) == rank
    for t in (1, 7):
        default = format.default_rank(modes, t)
        assert format.check_rank(default, levels) == default
        assert format.default_rank(modes, t + 1) >= default


@given(st.data(), levels(), st.booleans())
def test_random_has_the_sizes_asked_for(data: st.DataObject, levels: int, bias: bool) -> None:
    format = data.draw(formats())
    *experts, i, o = data.draw(st.tuples(*[sizes()] * (levels + 2)))
    rank = data.draw(ranks(format, levels))
    options = dict(experts=tuple(experts), in_features=i, out_features=o, rank=rank, bias=bias, seed=3)
    weight = mt.FactorizedTensor.random(format, **options)
    assert weight.shape == (*experts, i + bias, o)
    assert weight.experts == tuple(experts)
    assert (weight.rank, weight.num_levels, weight.format) == (rank, levels, format)
    assert weight.missing == format.optional(levels)
    assert all(np.isfinite(f).all() for f in weight.arrays)
    again = mt.FactorizedTensor.random(format, **options)
    for mine, same in zip(weight.arrays, again.arrays, strict=True):
        np.testing.assert_array_equal(mine, same)
    declared = (f for f in format.declaration(levels) if not f.optional)
    for factor, f in zip(weight.arrays, declared, strict=True):
        assert np.transpose(factor, [f.indices.index(x) for x in f.memory_order]).flags.c_contiguous


@pytest.mark.parametrize("format", DECLARED)
def test_random_entries_have_variance_one_over_inputs(format: str) -> None:
    rank = {"cp": 5, "tucker": (3, 3, 3), "tr": (3, 2, 3), "tt": (3, 3)}.get(format)
    squares = [
        np.mean(
            mt.to_dense(
                mt.FactorizedTensor.random(
                    format, experts=4, in_features=6, out_features=5, rank=rank, seed=seed
                )
            )
            ** 2
        )
        for seed in range(200)
    ]
    assert 0.75 < 6 * np.mean(squares) < 1.25


def test_random_takes_everything_after_an_array() -> None:
    for backend in installed_backends():
        like = make_array([0.0], backend, "float32")
        weight = mt.FactorizedTensor.random(
            "tr", experts=(4, 3), in_features=9, out_features=5, rank=(2, 3, 2, 3), bias=True, like=like
        )
        for factor in weight.arrays:
            assert type(factor) is type(like)
            assert factor.dtype == like.dtype
            assert factor.device == like.device


@pytest.mark.parametrize(
    "text",
    ["FactorizedTensor('tt', shape=(2, 3, 4), rank=(5, 6), float64, numpy)"],
)
def test_repr(text: str) -> None:
    weight = mt.FactorizedTensor.random("tt", experts=2, in_features=3, out_features=4, rank=(5, 6))
    assert repr(weight) == text
    assert repr(weight.format) == "TensorTrain()"


# ---- the registry ------------------------------------------------------------------------------------


class Split(mt.Format):
    """Expert factors and a shared matrix joined by two bonds; a memory order other than that of the axes."""

    name = "split"
    title = "Split"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        *experts, i, o = modes
        return [
            mt.Factor("p q", optional=True),
            *(mt.Factor(f"{m} p", memory_order=f"p {m}") for m in experts),
            mt.Factor(f"{i} q p"),
            mt.Factor(f"q p {o}", memory_order=f"p q {o}"),
        ]


def test_a_format_that_is_not_registered_works_everywhere() -> None:
    format = Split()
    run_check(check_equals_dense, format, share=2)
    weight = mt.FactorizedTensor.random(format, experts=4, in_features=3, out_features=5, rank=(2, 3))
    assert weight.format is format
    assert mt.to_dense(weight).shape == (4, 3, 5)
    assert mt.plan(format, experts=4, in_features=3, out_features=5, rank=(2, 3)).flops > 0
    assert mt.cost(format, experts=4, in_features=3, out_features=5, rank=(2, 3)).parameters == 8 + 18 + 30
    assert mt.LayerSpec(format, experts=4, in_features=3, out_features=5, rank=(2, 3)).max_expert_rank == 3
    fit = mt.fit_rank(
        format, experts=4, in_features=3, out_features=5, rank=(2, None), parameters=60, rounding="down"
    )
    assert fit == (2, 3)
    with pytest.raises(ValueError, match="unknown format 'split'"):
        mt.plan("split", experts=4, in_features=3, out_features=5, rank=(2, 3))


def test_register_makes_a_format_known_by_its_name(registry: None) -> None:
    assert mt.register(Split) is Split
    assert list(mt.formats())[-1] == "split"
    assert mt.get_format("split") == Split()
    mt.register(Split)  # once more is no mistake: modules are reloaded
    assert list(mt.formats()).count("split") == 1


def test_factors_are_values() -> None:
    assert len({mt.Factor("a b"), mt.Factor("a b"), mt.Factor("a b", memory_order="b a")}) == 2


# ---- None for ones -----------------------------------------------------------------------------------


def test_weights_of_cp_may_be_left_out_or_none_or_given() -> None:
    factors = [np.random.default_rng(0).standard_normal((n, 3)) for n in (4, 5, 2)]
    left_out = mt.FactorizedTensor("cp", factors)
    none = mt.FactorizedTensor("cp", [None, *factors])
    ones = mt.FactorizedTensor("cp", [np.ones(3), *factors])
    assert left_out.missing == none.missing == (0,)
    assert ones.missing == ()
    assert len(left_out.factors) == len(ones.factors) == 4
    np.testing.assert_array_equal(mt.to_dense(left_out), mt.to_dense(none))
    np.testing.assert_allclose(mt.to_dense(left_out), mt.to_dense(ones), atol=1e-14)
    twice = mt.FactorizedTensor("cp", [np.full(3, 2.0), *factors])
    np.testing.assert_allclose(mt.to_dense(twice), 2 * mt.to_dense(none), atol=1e-14)


def test_none_that_leaves_a_bond_with_one_end_is_refused() -> None:
    factors = [np.ones((4, 2)), np.ones((5, 3)), np.ones((6, 2))]
    with pytest.raises(ValueError, match=r"None only where others have its modes.*factor\[0\].*'r_n1'"):
        mt.FactorizedTensor("tucker", [None, *factors])


def test_bias_needs_a_row_besides_it() -> None:
    weight = mt.FactorizedTensor("hadamard", [np.ones((4, 2)), np.ones((1, 2))])
    with pytest.raises(ValueError, match="input mode of size 1"):
        mt.multilinear_moe(weight, np.ones((5, 0)), [np.ones((5, 4))], bias=True)


# ---- TensorLy's containers ---------------------------------------------------------------------------

CONTAINERS = {
    "cp": (lambda shape: random_cp(shape, 3, normalise_factors=False), tl.cp_to_tensor),
    "tucker": (lambda shape: random_tucker(shape, (2,) * len(shape)), tl.tucker_to_tensor),
    "tr": (lambda shape: random_tr(shape, [2, *range(3, 2 + len(shape)), 2]), tl.tr_to_tensor),
    "tt": (lambda shape: random_tt(shape, [1, *range(2, 1 + len(shape)), 1]), tl.tt_to_tensor),
}


@pytest.mark.filterwarnings("ignore:Determining the TR-rank for the trivial case")
@pytest.mark.parametrize("shape", [(4, 3), (5, 4, 3), (2, 5, 4, 3)], ids=["E=0", "E=1", "E=2"])
@pytest.mark.parametrize("format", CONTAINERS)
@pytest.mark.parametrize("backend", installed_backends())
def test_tensorlys_random_tensors_are_read(format: str, shape: tuple[int, ...], backend: str) -> None:
    draw, whole = CONTAINERS[format]
    with jax_float64():
        with tensorly_backend(backend):
            container = draw(shape)
            if format == "cp":
                container.weights = container.weights * 3.0
            expected = whole(container)
        weight = mt.FactorizedTensor.from_tensorly(container)
        back = weight.to_tensorly()
        assert weight.format.name == format
        assert weight.shape == shape
        assert type(back) is type(container)
        assert back.rank == container.rank
        np.testing.assert_allclose(to_numpy(mt.to_dense(weight)), to_numpy(expected), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(to_numpy(mt.to_dense(container)), to_numpy(expected), rtol=1e-5, atol=1e-6)


@settings(max_examples=max(2, settings().max_examples // 2))
@given(weights("hadamard", backend="numpy", dtype="float64"))
def test_hadamard_becomes_cp_with_the_identity(weight: mt.FactorizedTensor) -> None:
    container = weight.to_tensorly()
    assert type(container).__name__ == "CPTensor"
    np.testing.assert_array_equal(container.factors[-1], np.eye(weight.shape[-1]))
    np.testing.assert_allclose(tl.cp_to_tensor(container), dense_weight(weight), atol=1e-12)
    assert mt.FactorizedTensor.from_tensorly(container).format.name == "cp"


def test_dense_is_its_array() -> None:
    array = np.ones((4, 3, 2))
    assert mt.FactorizedTensor("dense", [array]).to_tensorly() is array


def test_a_subclass_of_a_container_is_read() -> None:
    class Mine(tl.cp_tensor.CPTensor):
        pass

    container = Mine((np.full(2, 3.0), [np.ones((4, 2)), np.ones((3, 2)), np.ones((5, 2))]))
    assert mt.FactorizedTensor.from_tensorly(container).format.name == "cp"
    np.testing.assert_allclose(mt.to_dense(container), np.full((4, 3, 5), 6.0))


def test_parameters_of_a_weight_are_its_factors() -> None:
    weight = mt.FactorizedTensor.random(
        "tucker", experts=(4, 3), in_features=6, out_features=5, rank=(2, 3, 4, 2)
    )
    counted = mt.cost("tucker", experts=(4, 3), in_features=6, out_features=5, rank=(2, 3, 4, 2)).parameters
    assert sum(prod(f.shape) for f in weight.arrays) == counted
    assert load_backend("numpy").backend_name == "numpy"


def test_five_levels_of_experts() -> None:
    factors = [np.full((2, 3), 1.0) for _ in range(7)]
    assert mt.FactorizedTensor("cp", factors).experts == (2,) * 5


def test_random_takes_no_grad_of_like() -> None:
    torch = pytest.importorskip("torch")
    like = torch.nn.Parameter(torch.ones(2))
    sizes = dict(experts=2, in_features=3, out_features=4)
    assert not any(
        a.requires_grad for a in mt.FactorizedTensor.random("cp", rank=2, like=like, **sizes).arrays
    )
