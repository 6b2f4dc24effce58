"""Weights as the factors of a format: random ones, missing factors, TensorLy's containers."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import tensorly as tl
from hypothesis import given, settings
from tensorly.random import random_cp, random_tr, random_tt, random_tucker

import mumoe_tensor as mt
from mumoe_tensor.backend import tensorly_backend
from mumoe_tensor.testing import (
    dense_weight,
    installed_backends,
    jax_float64,
    make_array,
    specs,
    to_numpy,
    weights,
)


@given(specs())
def test_random_has_the_sizes_asked_for(spec: mt.LayerSpec) -> None:
    format, levels = spec.weight_format, spec.num_levels
    weight = mt.FactorizedTensor.random(spec, seed=3)
    assert weight.shape == (*spec.experts, spec.in_features + spec.bias, spec.out_features)
    assert weight.experts == spec.experts
    assert (weight.rank, weight.num_levels, weight.format) == (spec.rank, levels, format)
    assert weight.missing == format.optional(levels)
    assert all(np.isfinite(f).all() for f in weight.arrays)
    again = mt.FactorizedTensor.random(spec, seed=3)
    for mine, same in zip(weight.arrays, again.arrays, strict=True):
        np.testing.assert_array_equal(mine, same)
    declared = (f for f in format.declaration(levels) if not f.optional)
    for factor, f in zip(weight.arrays, declared, strict=True):
        assert np.transpose(factor, [f.indices.index(x) for x in f.memory_order]).flags.c_contiguous


#: Sums of terms, and parts that hold more than their mode.
COMPOSED: list[str | mt.Format] = [
    mt.sum_of(mt.sliced("tr", 0, 2), mt.sliced("cp", 2, 4), mt.shared("tucker")),
    mt.formats()["btt"].with_splits({"i": (2, 4), "o": (3, 3)}),
    mt.sum_of("kron", mt.shared("btt"), "cp"),
]


@pytest.mark.parametrize("format", [*mt.formats(), *COMPOSED], ids=str)
def test_random_entries_have_variance_one_over_inputs(format: str | mt.Format) -> None:
    """Those of the bias row too, whether it is a row of the input or a term."""
    sizes = dict(experts=4, in_features=6, out_features=8, bias=True)
    rank = (3,) * len(mt.get_format(format).bonds(1))
    weights = (mt.FactorizedTensor.random(format, **sizes, rank=rank, seed=seed) for seed in range(400))
    squares = np.mean([mt.to_dense(weight) ** 2 for weight in weights], axis=(0, 1, 3))
    for variance in (np.mean(squares[:-1]), squares[-1]):
        assert 0.75 < 6 * variance < 1.25


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


def test_random_takes_no_grad_of_like() -> None:
    torch = pytest.importorskip("torch")
    like = torch.nn.Parameter(torch.ones(2))
    sizes = dict(experts=2, in_features=3, out_features=4)
    assert not any(
        a.requires_grad for a in mt.FactorizedTensor.random("cp", rank=2, like=like, **sizes).arrays
    )


def test_repr() -> None:
    weight = mt.FactorizedTensor.random("tt", experts=2, in_features=3, out_features=4, rank=(5, 6))
    assert repr(weight) == "FactorizedTensor('tt', shape=(2, 3, 4), rank=(5, 6), float64, numpy)"


def test_parameters_of_a_weight_are_its_factors() -> None:
    weight = mt.FactorizedTensor.random(
        "tucker", experts=(4, 3), in_features=6, out_features=5, rank=(2, 3, 4, 2)
    )
    counted = mt.cost("tucker", experts=(4, 3), in_features=6, out_features=5, rank=(2, 3, 4, 2)).parameters
    assert sum(prod(f.shape) for f in weight.arrays) == counted


def test_five_levels_of_experts() -> None:
    factors = [np.full((2, 3), 1.0) for _ in range(7)]
    assert mt.FactorizedTensor("cp", factors).experts == (2,) * 5


def test_up_to_sixteen_levels_are_read() -> None:
    assert mt.FactorizedTensor("cp", [np.ones((1, 2))] * 18).num_levels == 16
    with pytest.raises(ValueError, match="the factors of format 'cp' must be"):
        mt.FactorizedTensor("cp", [np.ones((1, 2))] * 19)


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
    y, same, doubled = (
        mt.multilinear_moe(weight, np.ones((7, 5)), [np.ones((7, 4))]) for weight in (none, ones, twice)
    )
    np.testing.assert_allclose(same, y, atol=1e-13)
    np.testing.assert_allclose(doubled, 2 * y, atol=1e-13)


def test_none_that_leaves_a_bond_with_one_end_is_refused() -> None:
    factors = [np.ones((4, 2)), np.ones((5, 3)), np.ones((6, 2))]
    with pytest.raises(ValueError, match=r"None only if other factors have its modes.*factor\[0\].*'r_n1'"):
        mt.FactorizedTensor("tucker", [None, *factors])


def test_bias_needs_a_row_besides_it() -> None:
    weight = mt.FactorizedTensor("hadamard", [np.ones((4, 2)), np.ones((1, 2))])
    with pytest.raises(ValueError, match="one row besides the bias, got size 1"):
        mt.multilinear_moe(weight, np.ones((5, 0)), [np.ones((5, 4))], bias=True)


@given(weights(backend="numpy", dtype="float64"))
def test_a_weight_comes_back_from_the_leaves_of_its_tree(weight: mt.FactorizedTensor) -> None:
    pytest.importorskip("mumoe_tensor.jax")
    import jax

    leaves, tree = jax.tree.flatten(weight)
    again = jax.tree.unflatten(tree, leaves)
    for name in ("format", "shape", "rank", "missing", "asked"):
        assert getattr(again, name) == getattr(weight, name)
    assert len(leaves) == len(weight.arrays)
    assert all(one is other for one, other in zip(again.arrays, leaves, strict=True))


# ---- TensorLy's containers ---------------------------------------------------------------------------

CONTAINERS = {
    "cp": (lambda shape: random_cp(shape, 3, normalise_factors=False), tl.cp_to_tensor),
    "tucker": (lambda shape: random_tucker(shape, (2,) * len(shape)), tl.tucker_to_tensor),
    "tr": (lambda shape: random_tr(shape, [2, *range(3, 2 + len(shape)), 2]), tl.tr_to_tensor),
    "tt": (lambda shape: random_tt(shape, [1, *range(2, 1 + len(shape)), 1]), tl.tt_to_tensor),
}


@pytest.mark.filterwarnings("ignore:Determining the TR-rank for the trivial case")
@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        (backend, shape)
        for backend in installed_backends()
        for shape in [(4, 3), (5, 4, 3), (2, 5, 4, 3)]
        if backend != "jax" or len(shape) == 3  # JAX compiles each operation for each shape
    ],
)
@pytest.mark.parametrize("format", CONTAINERS)
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
