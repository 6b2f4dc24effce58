"""What a weight stands for: the matrix of an expert is its slice of the whole tensor."""

from __future__ import annotations

import numpy as np
import pytest

import mumoe_tensor as mt

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
