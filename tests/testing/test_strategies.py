"""A problem is its arguments."""

from __future__ import annotations

from importlib import import_module

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from somebody import Unregistered

from mumoe_tensor import LayerSpec
from mumoe_tensor.testing import Problem, problems, to_numpy


@given(st.data())
def test_a_problem_can_be_pasted_back(data: st.DataObject) -> None:
    problem = data.draw(problems(data.draw(st.sampled_from([None, Unregistered()])), dtype="float32"))
    names = {
        "Problem": Problem,
        "LayerSpec": LayerSpec,
        "Unregistered": Unregistered,
        **vars(import_module("mumoe_tensor.formats")),
    }
    again = eval(repr(problem), names)
    assert again == problem
    arrays = [(*x.weight.factors, x.z, *x.coefficients) for x in (problem, again)]
    for one, other in zip(*arrays, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
