"""What a term takes of a tensor, and where it puts its part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.decomposition.terms import split, views
from mumoe_tensor.formats import Bias

PADDED = {"i": (2, 3), "o": (3, 2)}
FORMATS = [
    mt.get_format("cp"),
    mt.sum_of(mt.shared("dense"), mt.sliced("lowrank", 1, 3)),
    mt.sum_of(mt.get_format("btt").with_splits(PADDED), "cp"),
    mt.sum_of(mt.shared(mt.get_format("kron").with_splits(PADDED)), Bias()),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@given(experts=st.lists(st.integers(3, 4), min_size=1, max_size=2), seed=st.integers(0, 99))
def test_a_term_is_the_nearest_tensor_of_its_shape(format: mt.Format, experts: list[int], seed: int) -> None:
    """``put`` after ``take`` is an orthogonal projection onto the tensors that the term can be."""
    generator = np.random.default_rng(seed)
    shape = (*experts, 6 if format.has_bias_term else 5, 5)
    tensor = generator.standard_normal(shape)
    for view in views(format, shape):
        nearest = view.put(view.take(tensor))
        np.testing.assert_allclose(view.put(view.take(nearest)), nearest, atol=1e-12)
        other = view.put(generator.standard_normal(view.shape))
        assert np.vdot(tensor - nearest, other) == pytest.approx(0, abs=1e-9)


def test_a_view_is_a_term_of_the_dense_tensor() -> None:
    for format in FORMATS:
        sizes: dict[str, Any] = {"in_features": 5, "out_features": 5, "experts": (3, 4)}
        rank = (2,) * len(format.bonds(2))
        weight = mt.FactorizedTensor.random(format, rank=rank, bias=format.has_bias_term, seed=0, **sizes)
        total = np.zeros(weight.shape)
        for view, term in zip(views(format, weight.shape), weight.terms, strict=True):
            total[..., view.rows, :] += mt.to_dense(term)
        np.testing.assert_allclose(total, mt.to_dense(weight))


def test_split_is_row_major_and_padded_with_zeros() -> None:
    format = mt.get_format("kron").with_splits({"i": (2, 3), "o": (2, 2)})
    matrix = np.arange(1.0, 21).reshape(5, 4)
    parts = split(format, matrix)
    assert parts.shape == (2, 3, 2, 2)
    assert parts[1, 1, 1, 0] == matrix[4, 2]
    assert not parts[1, 2].any()
