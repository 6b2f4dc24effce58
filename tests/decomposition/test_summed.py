"""Fits of sums are never worse than term by term, and exact where the terms are identifiable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor.decomposition import decompose, sums
from mumoe_tensor.dense import to_dense
from mumoe_tensor.formats import Bias

SUMS: list[mt.Format] = [
    mt.sum_of(mt.shared("dense"), "cp"),
    mt.sum_of(mt.shared("lowrank"), "kron"),
    mt.sum_of("lowrank", mt.shared("kron")),
    mt.sum_of(mt.sliced("cp", 0, 2), mt.sliced("lowrank", 2, 4)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", SUMS, ids=str)
def test_a_weight_of_the_format_is_recovered(format: mt.Format, bias: bool) -> None:
    rank = (2,) * len(format.bonds(1))
    truth = mt.FactorizedTensor.random(
        format, experts=4, in_features=6, out_features=6, rank=rank, bias=bias, seed=1
    )
    weight, error = decompose(to_dense(truth), format, rank, bias=bias, n_restarts=2)
    assert weight.format == truth.format
    assert error < 1e-6
    assert np.linalg.norm(to_dense(weight) - to_dense(truth)) < 1e-6 * np.linalg.norm(to_dense(truth))


@pytest.mark.parametrize(
    "format", [mt.sum_of(mt.shared("btt"), "cp"), mt.sum_of("monarch", mt.shared("dense"))], ids=str
)
def test_terms_that_share_what_they_fit_are_recovered(format: mt.Format) -> None:
    """Fitting one after the other, and in turn, gets stuck here."""
    rank = (2,) * len(format.bonds(1))
    truth = mt.FactorizedTensor.random(format, experts=4, in_features=6, out_features=6, rank=rank, seed=2)
    assert decompose(to_dense(truth), format, rank, n_restarts=4)[1] < 1e-6


@pytest.mark.parametrize("format", SUMS, ids=str)
def test_a_sum_is_fitted_no_worse_than_one_term_after_the_other(format: mt.Format) -> None:
    dense = np.random.default_rng(0).standard_normal((4, 6, 6))
    rank = (2,) * len(format.bonds(1))
    residual = dense.copy()
    for term in format.terms(dense.shape, rank):
        residual -= to_dense(decompose(residual, term.format, term.rank, n_restarts=1, n_iter=50)[0])
    in_turn = np.linalg.norm(residual) / np.linalg.norm(dense)
    error = decompose(dense, format, rank, n_restarts=1, n_iter=50)[1]
    assert error <= in_turn + 1e-12
    if format == SUMS[2]:  # whose first term takes a large share of the second
        assert error < in_turn - 1e-3


def test_a_shared_matrix_alone_is_the_mean_of_the_experts() -> None:
    dense = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    weight, error = decompose(dense, mt.sum_of(mt.shared("dense")))
    np.testing.assert_allclose(weight.arrays[0], dense.mean((0, 1)))
    assert error == pytest.approx(np.linalg.norm(dense - dense.mean((0, 1))) / np.linalg.norm(dense))


@pytest.mark.parametrize("same", [True, False])
def test_a_bias_beside_split_inputs_is_exact_where_all_experts_have_one(same: bool) -> None:
    sizes: dict[str, Any] = {"experts": 3, "in_features": 6, "out_features": 4, "rank": 2}
    dense = to_dense(mt.FactorizedTensor.random("kron", seed=0, **sizes))
    bias = np.random.default_rng(1).standard_normal((3, 4))
    bias[:] = bias[0] if same else bias
    weight, error = decompose(dense, "kron", 2, bias=bias)
    whole = np.concatenate([dense, bias[:, None]], 1)
    left = np.linalg.norm(bias - bias.mean(0)) / np.linalg.norm(whole)
    assert error == pytest.approx(left, abs=1e-6)
    np.testing.assert_allclose(to_dense(weight)[:, -1], np.tile(bias.mean(0), (3, 1)), atol=1e-12)


def test_the_first_start_is_the_fit_in_turn_and_the_others_are_random(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[Any] = []
    monkeypatch.setattr(sums, "improve", lambda _, __, start, *___: starts.append(start) or start)
    dense = np.random.default_rng(0).uniform(-1, 1, (4, 6, 6))  # which is not scaled
    format = mt.sum_of("lowrank", mt.shared("kron"))
    _, best = decompose(dense, format, (2, 2), n_restarts=3)
    errors = [
        np.linalg.norm(to_dense(mt.FactorizedTensor(format, start)) - dense) / np.linalg.norm(dense)
        for start in starts
    ]
    assert len(errors) == 3
    assert best == pytest.approx(errors[0])
    assert best < 1 < min(errors[1:])
    assert errors[1] != errors[2]


def test_the_best_fit_of_a_term_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the fits it is."""
    dense = np.random.default_rng(0).standard_normal((4, 6, 6))
    monkeypatch.setattr(sums, "improve", lambda _, __, start, *___: start)
    monkeypatch.setattr(
        sums, "scaled_fits", lambda _, seen, *__: [[scale * seen] for scale in (0.9, 1.0, 0.8)]
    )
    assert decompose(dense, mt.sum_of("dense"), n_restarts=1)[1] == 0


def test_slices_may_be_of_any_level() -> None:
    dense = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    format = mt.sum_of(*(mt.sliced("lowrank", start, stop, level=1) for start, stop in ((0, 1), (1, 3))))
    assert decompose(dense, format, (4, 4))[1] < 1e-12


def test_a_bias_begins_as_the_mean_row() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 2, 1, 5))
    np.testing.assert_allclose(sums.bias(Bias(), rows), [[rows.mean((0, 1, 2))]])
