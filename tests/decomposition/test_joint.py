"""Steps of all factors at once: their derivatives, and that no step raises the error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.decomposition.alternating import random_factors
from mumoe_tensor.decomposition.joint import _Term, improve, weighted_norm
from mumoe_tensor.decomposition.terms import views

FORMATS = [
    mt.get_format("cp"),
    mt.get_format("monarch").with_splits({"i": (2, 3), "o": (2, 3)}),
    mt.sum_of(mt.shared("btt"), mt.sliced("lowrank", 1, 3)),
]
SHAPE = (3, 4, 6)


def drawn(format: mt.Format, generator: np.random.Generator) -> list[Any]:
    return random_factors(format, SHAPE, (2,) * len(format.bonds(1)), generator)


@given(format=st.sampled_from(FORMATS), seed=st.integers(0, 99))
def test_the_gradient_is_the_adjoint_of_the_change(format: mt.Format, seed: int) -> None:
    generator = np.random.default_rng(seed)
    factors, step = drawn(format, generator), dict(enumerate(drawn(format, generator)))
    tensor = generator.standard_normal(SHAPE)
    for term in (_Term(view, factors) for view in views(format, SHAPE)):
        gradient = term.gradient(factors, tensor)
        inner = sum(np.vdot(step[k], part) for k, part in gradient.items())
        assert inner == pytest.approx(np.vdot(term.change(factors, step), tensor), abs=1e-9)


@given(format=st.sampled_from(FORMATS), seed=st.integers(0, 99))
def test_the_change_is_the_derivative_of_the_product(format: mt.Format, seed: int) -> None:
    generator = np.random.default_rng(seed)
    factors, step = drawn(format, generator), drawn(format, generator)
    for term in (_Term(view, factors) for view in views(format, SHAPE)):
        ahead, behind = (
            term.product([f if f is None else f + h * d for f, d in zip(factors, step, strict=True)])
            for h in (1e-4, -1e-4)
        )
        change = term.change(factors, dict(enumerate(step)))
        np.testing.assert_allclose((ahead - behind) / 2e-4, change, atol=1e-4)


@given(format=st.sampled_from(FORMATS), seed=st.integers(0, 99), weighted=st.booleans())
def test_no_step_raises_the_error(format: mt.Format, seed: int, weighted: bool) -> None:
    generator = np.random.default_rng(seed)
    dense, start = generator.standard_normal(SHAPE), drawn(format, generator)
    root = generator.standard_normal((4, 4))
    covariance = root @ root.T if weighted else None
    errors = []
    for n_iter in range(6):
        factors = improve(format, dense, start, n_iter, 0.0, covariance)
        terms = [_Term(view, factors) for view in views(format, SHAPE)]
        errors.append(weighted_norm(dense - sum(term.product(factors) for term in terms), covariance))
    assert (np.diff(errors) <= 1e-9).all()
    assert errors[-1] < errors[0]
