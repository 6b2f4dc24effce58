"""Hypothesis strategies and checks for formats, including users' own formats.

`check_format` runs every check on a format, registered or not. Each check is a function of one `Problem` and
can be used separately::

    from hypothesis import given
    from mumoe_tensor.testing import check_equals_dense, problems

    @given(problems("cp", dtype="float32"))
    def test_equals_dense(problem):
        check_equals_dense(problem)

This module requires Hypothesis. Checks with PyTorch and JAX run if these are installed.
"""

from mumoe_tensor.testing.checks import (
    CHECKS,
    check_declaration,
    check_equals_dense,
    check_equals_tensorly,
    check_expert_permutation,
    check_gauge,
    check_level_of_one,
    check_linear_in_coefficients,
    check_linear_in_factors,
    check_linear_in_input,
    check_one_hot,
    check_paths,
    check_plan,
    check_result_kind,
)
from mumoe_tensor.testing.gradients import check_gradients
from mumoe_tensor.testing.oracle import TOLERANCE, assert_close, dense_moe, dense_weight, magnitude, to_numpy
from mumoe_tensor.testing.runner import check_format, run_check
from mumoe_tensor.testing.strategies import (
    Problem,
    backends,
    dtypes,
    formats,
    installed_backends,
    jax_float64,
    leading_shapes,
    levels,
    make_array,
    problems,
    ranks,
    sizes,
    specs,
    weights,
)

__all__ = [
    "CHECKS",
    "TOLERANCE",
    "Problem",
    "assert_close",
    "backends",
    "check_declaration",
    "check_equals_dense",
    "check_equals_tensorly",
    "check_expert_permutation",
    "check_format",
    "check_gauge",
    "check_gradients",
    "check_level_of_one",
    "check_linear_in_coefficients",
    "check_linear_in_factors",
    "check_linear_in_input",
    "check_one_hot",
    "check_paths",
    "check_plan",
    "check_result_kind",
    "dense_moe",
    "dense_weight",
    "dtypes",
    "formats",
    "installed_backends",
    "jax_float64",
    "leading_shapes",
    "levels",
    "magnitude",
    "make_array",
    "problems",
    "ranks",
    "run_check",
    "sizes",
    "specs",
    "to_numpy",
    "weights",
]
