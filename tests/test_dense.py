"""What a weight stands for: the matrix of an expert is its slice of the whole tensor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

import mumoe_tensor as mt
from mumoe_tensor.dense import mixed_matrix
from mumoe_tensor.testing import Problem, problems

CP = mt.formats()["cp"]


@pytest.mark.parametrize(
    "format",
    [
        CP.with_splits({"n1": (2, 3)}),
        CP.with_splits({"n1": (3, 3), "o": (2, 2)}),
        mt.sum_of(CP.with_splits({"n1": 2}), mt.shared("dense"), mt.sliced("tr", 1, 4)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_matrix_of_each_expert_is_its_slice(format: mt.Format, bias: bool) -> None:
    rank = (2,) * len(format.bonds(1))
    sizes = dict(experts=6, in_features=3, out_features=4, rank=rank, bias=bias)
    weight = mt.FactorizedTensor.random(format, seed=0, **sizes)
    dense = mt.to_dense(weight)
    for n in range(6):
        np.testing.assert_allclose(mt.expert_matrix(weight, n), dense[n], atol=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_expert_outside_of_a_slice_is_zero(dtype: str) -> None:
    like = np.zeros(0, dtype)
    weight = mt.FactorizedTensor.random(
        mt.sliced("dense", 1, 2), experts=(3, 2), in_features=3, out_features=4, like=like
    )
    for index in np.ndindex(3, 2):
        matrix = mt.expert_matrix(weight, index)
        assert (matrix.shape, matrix.dtype) == ((3, 4), like.dtype)
        assert matrix.any() == (index[0] == 1)


@given(problems(leading=(), backend="numpy", dtype="float64"))
def test_a_mixture_is_that_of_the_slices(problem: Problem) -> None:
    expected = mt.to_dense(problem.weight)
    for a in problem.coefficients:
        expected = np.tensordot(a, expected, 1)
    np.testing.assert_allclose(mixed_matrix(problem.weight, problem.coefficients), expected, atol=1e-9)
