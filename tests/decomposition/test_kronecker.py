"""Kronecker and TT-matrix: the rearrangement of Van Loan and Pitsianis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.decomposition.kronecker import pair_parts


@given(parts=st.tuples(*[st.integers(1, 4)] * 4), seed=st.integers(0, 99))
def test_a_kronecker_product_is_rearranged_into_an_outer_product(
    parts: tuple[int, int, int, int], seed: int
) -> None:
    i1, i2, o1, o2 = parts
    generator = np.random.default_rng(seed)
    a, b = generator.standard_normal((i1, o1)), generator.standard_normal((i2, o2))
    format = mt.get_format({"name": "kron", "splits": {"i": (i1, i2), "o": (o1, o2)}})
    np.testing.assert_allclose(pair_parts(format, np.kron(a, b)), np.outer(a, b))


@given(k=st.integers(1, 5), seed=st.integers(0, 99), name=st.sampled_from(["kron", "tt-matrix"]))
def test_the_fit_of_a_matrix_is_the_truncated_svd_of_the_rearranged_one(name: str, k: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((6, 8))
    rearranged = matrix.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3).reshape(4, 12)
    values = np.linalg.svd(rearranged, compute_uv=False)
    expected = np.linalg.norm(values[k:]) / np.linalg.norm(values)
    assert mt.decompose(matrix, name, k)[1] == pytest.approx(expected, abs=1e-12)


def test_train_of_several_parts_is_within_the_bound_of_the_tails() -> None:
    dense = np.random.default_rng(0).standard_normal((3, 8, 8))
    format = mt.get_format({"name": "tt-matrix", "splits": {"i": 3, "o": 3}})
    paired = pair_parts(format, dense)
    rank, tails = (2, 5, 3), []
    for k, r in enumerate(rank, start=1):
        values = np.linalg.svd(paired.reshape(int(np.prod(paired.shape[:k])), -1), compute_uv=False)
        tails.append(np.linalg.norm(values[r:]) / np.linalg.norm(values))
    assert max(tails) <= mt.decompose(dense, format, rank)[1] <= np.linalg.norm(tails)


@pytest.mark.parametrize(("name", "experts"), [("kron", (3,)), ("tt-matrix", ()), ("tt-matrix", (3,))])
def test_of_one_part_each_expert_is_one_matrix(name: str, experts: tuple[int, ...]) -> None:
    dense = np.random.default_rng(0).standard_normal((*experts, 2, 3))
    format = mt.get_format(name).with_splits({"i": 1, "o": 1})
    rank = (6,) * len(format.bonds(len(experts)))
    assert mt.decompose(dense, format, rank)[1] == pytest.approx(0, abs=1e-12)
