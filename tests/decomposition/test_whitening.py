"""Fits weighted by the covariance of the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor import decomposition
from mumoe_tensor.decomposition import decompose

WEIGHTED: list[mt.Format] = [
    *mt.formats().values(),
    mt.sum_of("lowrank", mt.shared("kron")),
    mt.sum_of("tt", mt.shared("lowrank")),
    mt.get_format("btt").with_splits({"i": (2, 4), "o": (2, 4)}),
]


def inputs(size: int, seed: int, bias: bool = False) -> Any:
    """Correlated inputs of unequal size; with a bias a column of ones is the last."""
    generator = np.random.default_rng(seed)
    z = generator.standard_normal((40, size)) @ (
        generator.standard_normal((size, size)) * 2.0 ** -np.arange(size)
    )
    return np.concatenate([z + 1, np.ones((40, 1))], 1) if bias else z


def output_error(weight: Any, dense: Any, z: Any) -> float:
    return float(np.linalg.norm(z @ (mt.to_dense(weight) - dense)) / np.linalg.norm(z @ dense))


@given(
    format=st.sampled_from(WEIGHTED), levels=st.integers(0, 2), bias=st.booleans(), seed=st.integers(0, 99)
)
def test_outputs_are_no_worse_than_of_the_fit_without_weights(
    format: mt.Format, levels: int, bias: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    dense = generator.standard_normal((*(3, 2)[:levels], 6 + bias, 6))
    rank, effort = (2,) * len(format.bonds(levels)), dict(bias=bias, n_restarts=1, n_iter=10)
    z = inputs(6, seed, bias)
    plain, _ = decompose(dense, format, rank, **effort)
    weight, error = decompose(dense, format, rank, input_covariance=z.T @ z / len(z), **effort)
    assert error == pytest.approx(output_error(weight, dense, z), abs=1e-7)
    assert error <= output_error(plain, dense, z) + 1e-7


@given(format=st.sampled_from(WEIGHTED), levels=st.integers(0, 1), seed=st.integers(0, 99))
def test_uncorrelated_inputs_are_no_weights(format: mt.Format, levels: int, seed: int) -> None:
    """The error is that of the plain fit, or lower: it goes on from there."""
    dense = np.random.default_rng(seed).standard_normal((*(3,)[:levels], 6, 6))
    rank, effort = (2,) * len(format.bonds(levels)), dict(n_restarts=1, n_iter=10)
    expected = decompose(dense, format, rank, **effort)[1]
    weight, error = decompose(dense, format, rank, input_covariance=3 * np.eye(6), **effort)
    assert error <= expected + 1e-12
    assert error == pytest.approx(np.linalg.norm(mt.to_dense(weight) - dense) / np.linalg.norm(dense))
    if levels == 0 and not format.splits.keys() and len(format.summands(0)) == 1:
        assert error == pytest.approx(expected, abs=1e-9)


@given(r=st.integers(1, 4), seed=st.integers(0, 99))
def test_low_rank_is_the_best_for_the_outputs(r: int, seed: int) -> None:
    """The truncated SVD of the outputs, also where the inputs do not span the space."""
    dense, z = np.random.default_rng(seed).standard_normal((6, 5)), inputs(6, seed)
    z[:, 5] = z[:, 4] - z[:, 3]
    values = np.linalg.svd(z @ dense, compute_uv=False)
    expected = np.linalg.norm(values[r:]) / np.linalg.norm(values)
    assert decompose(dense, "lowrank", r, input_covariance=z.T @ z)[1] == pytest.approx(expected, abs=1e-6)


def test_conjugate_gradients_reach_what_whitening_gives() -> None:
    """A sum with a term of split parts of size one: fitted by alternation, and the same set of matrices."""
    z = inputs(6, 0)
    dense = np.random.default_rng(0).standard_normal((6, 5))
    whole = decompose(dense, "lowrank", 2, input_covariance=z.T @ z)[1]
    split = mt.get_format("lowrank").with_splits({"i": (2, 3)})
    effort: dict[str, Any] = {"n_iter": 3000, "tolerance": 1e-9}
    assert decompose(dense, split, 2, input_covariance=z.T @ z, **effort)[1] == pytest.approx(whole, abs=1e-5)


@given(format=st.sampled_from(WEIGHTED), seed=st.integers(0, 99))
def test_each_expert_may_have_inputs_of_its_own(format: mt.Format, seed: int) -> None:
    """The error is that of all outputs, and no larger than that of the unweighted fit."""
    dense = np.random.default_rng(seed).standard_normal((3, 6, 6))
    rank, effort = (2,) * len(format.bonds(1)), dict(n_restarts=1, n_iter=10)
    z = np.stack([inputs(6, seed + n) for n in range(3)])
    covariance = np.swapaxes(z, 1, 2) @ z / 120
    plain, _ = decompose(dense, format, rank, **effort)
    weight, error = decompose(dense, format, rank, input_covariance=covariance, **effort)
    assert error == pytest.approx(output_error(weight, dense, z), abs=1e-7)
    assert error <= output_error(plain, dense, z) + 1e-7


def test_low_rank_is_the_best_for_each_expert() -> None:
    """One without inputs does not matter."""
    generator = np.random.default_rng(1)
    dense, z = generator.standard_normal((3, 6, 5)), np.stack([inputs(6, n) for n in range(3)])
    z[2] = 0
    values = np.linalg.svd(z @ dense, compute_uv=False)
    expected = np.linalg.norm(values[:, 2:]) / np.linalg.norm(values)
    error = decompose(dense, "lowrank", 2, input_covariance=np.swapaxes(z, 1, 2) @ z)[1]
    assert error == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("format", ["tucker", mt.sum_of(mt.shared("dense"), "lowrank")])
def test_covariances_of_each_expert_say_more_than_their_mean(format: Any) -> None:
    """Also in formats that are not whitened by them."""
    generator = np.random.default_rng(0)
    dense, scales = (
        generator.standard_normal((3, 6, 6)),
        4.0 ** -np.array([np.roll(range(6), n) for n in (0, 2, 4)]),
    )
    z = generator.standard_normal((3, 40, 6)) * scales[:, None]
    covariance = np.swapaxes(z, 1, 2) @ z
    rank, effort = (2,) * len(mt.get_format(format).bonds(1)), dict(n_restarts=1, n_iter=20)
    fits = (
        decompose(dense, format, rank, input_covariance=each, **effort)[0]
        for each in (covariance.mean(0), covariance)
    )
    by_mean, by_expert = (output_error(weight, dense, z) for weight in fits)
    assert by_expert < 0.8 * by_mean


def test_the_covariance_may_be_of_any_backend_and_dtype() -> None:
    torch = pytest.importorskip("torch")
    dense = torch.randn(6, 4, generator=torch.manual_seed(0))
    z = torch.from_numpy(inputs(6, 0)).float()
    weight, error = decompose(dense, "lowrank", 2, input_covariance=z.T @ z)
    assert weight.arrays[0].dtype == dense.dtype
    assert error == pytest.approx(output_error(weight, dense, z), rel=1e-4)


@pytest.mark.parametrize(
    "covariance, error, message",
    [
        (
            np.eye(5),
            ValueError,
            r"per row of the input mode \(including a bias row\), shape \(6, 6\), got \(5, 5\)",
        ),
        (np.eye(6)[0], ValueError, r"got \(6,\)"),
        (np.eye(6, dtype=int), TypeError, "floating dtype, .* got input_covariance: int64"),
        ([[1.0]], TypeError, "must be plain NumPy, PyTorch or JAX arrays, got list"),
        (np.tri(6), ValueError, "must be symmetric"),
        (np.zeros((6, 6)), ValueError, "not zero"),
        (np.full((6, 6), np.nan), ValueError, "must be finite"),
        (np.diag([1.0, 1, 1, 1, 1, -2]), ValueError, "positive semi-definite, got eigenvalues from -2 to 1"),
    ],
)
def test_bad_covariances(covariance: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decompose(np.ones((5, 4)), "cp", 1, bias=np.ones(4), input_covariance=covariance)


def test_the_fit_without_weights_is_a_candidate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that in the coordinates without correlations is worse."""
    dense, z = np.random.default_rng(0).standard_normal((6, 5)), inputs(6, 0)
    monkeypatch.setattr(decomposition, "whitened_fits", lambda *_: [[np.zeros((6, 2)), np.zeros((2, 5))]])
    plain = decompose(dense, "lowrank", 2)[0]
    error = decompose(dense, "lowrank", 2, input_covariance=z.T @ z, n_iter=1)[1]
    assert error <= output_error(plain, dense, z) + 1e-7


def test_slices_of_experts_with_covariances_of_their_own() -> None:
    generator = np.random.default_rng(0)
    dense, z = generator.standard_normal((4, 6, 5)), np.stack([inputs(6, seed) for seed in range(4)])
    format = mt.sum_of(mt.sliced("lowrank", 0, 1), mt.sliced("lowrank", 1, 4))
    covariances = np.swapaxes(z, 1, 2) @ z
    plain = decompose(dense, format, (2, 2), n_restarts=1)[0]
    weight, error = decompose(dense, format, (2, 2), input_covariance=covariances, n_restarts=1)
    assert error == pytest.approx(output_error(weight, dense, z), abs=1e-7)
    assert error <= output_error(plain, dense, z) + 1e-7
