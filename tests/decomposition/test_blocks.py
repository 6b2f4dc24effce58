"""Monarch, Block Tensor Train and low rank: what the singular values say is what the fit leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.decomposition import blocks


def left_out(matrices: Any, r: int) -> float:
    """Relative error of the best matrices of rank r."""
    values = np.linalg.svd(matrices, compute_uv=False)
    return float(np.linalg.norm(values[..., r:]) / np.linalg.norm(values))


@given(r=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_matrix_is_fitted_block_by_block(r: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((6, 12))
    of_matrix = matrix.reshape(2, 3, 3, 4).transpose(0, 2, 1, 3)
    assert mt.decompose(matrix, "btt", r)[1] == pytest.approx(left_out(of_matrix, r), abs=1e-12)
    assert mt.decompose(matrix, "monarch")[1] == pytest.approx(left_out(of_matrix, 1), abs=1e-12)


@given(
    r=st.integers(1, 4),
    experts=st.lists(st.integers(1, 3), max_size=2),
    splits=st.dictionaries(st.sampled_from("io"), st.integers(1, 2)),
    seed=st.integers(0, 99),
)
def test_low_rank_is_the_best_of_each_expert(
    r: int, experts: list[int], splits: dict[str, int], seed: int
) -> None:
    """Parts of the modes, which stay together, make no difference."""
    dense = np.random.default_rng(seed).standard_normal((*experts, 4, 6))
    format = mt.get_format("lowrank").with_splits(splits)
    assert mt.decompose(dense, format, r)[1] == pytest.approx(left_out(dense, r), abs=1e-12)


@pytest.mark.parametrize("format, rank", [("monarch", None), ("btt", 1), ("btt", 3)])
@pytest.mark.parametrize("experts", [(5,), (2, 3)])
def test_experts_begin_with_singular_vectors(format: str, rank: Any, experts: tuple[int, ...]) -> None:
    """From which a weight of the format needs few sweeps."""
    sizes: dict[str, Any] = {"experts": experts, "in_features": 6, "out_features": 8, "rank": rank}
    for seed in range(3):
        truth = mt.to_dense(mt.FactorizedTensor.random(format, seed=seed, **sizes))
        if format == "monarch":
            assert mt.decompose(truth, format, rank, n_restarts=1, n_iter=2)[1] < 1e-12
        assert mt.decompose(truth, format, rank, n_restarts=1)[1] < 1e-6


@pytest.mark.parametrize("format, rank", [("monarch", None), ("btt", 1)])
@pytest.mark.parametrize("experts", [(5,), (2, 3)])
def test_of_rank_one_the_first_start_has_the_blocks_but_for_their_scale(
    format: str, rank: Any, experts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = mt.FactorizedTensor.random(
        format, experts=experts, in_features=6, out_features=8, rank=rank, seed=0
    )
    starts: list[Any] = []
    monkeypatch.setattr(blocks, "alternate", lambda _, __, start, *___: starts.append(start) or start)
    mt.decompose(mt.to_dense(truth), format, rank, n_restarts=1)

    def directions(factors: Any) -> Any:
        dense = mt.to_dense(mt.FactorizedTensor(format, factors)).reshape(-1, 2, 3, 2, 4)
        each = dense.transpose(1, 3, 0, 2, 4).reshape(4, -1)
        each /= np.linalg.norm(each, axis=1, keepdims=True)
        return each * np.sign(each[:, :1])

    np.testing.assert_allclose(directions(starts[0]), directions(truth.factors), atol=1e-9)
