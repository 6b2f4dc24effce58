"""Every property of `mumoe_tensor.testing` for every registered format, and identities between formats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mumoe_tensor as mt
from mumoe_tensor.testing import (
    CHECKS,
    Problem,
    assert_close,
    check_declaration,
    installed_backends,
    magnitude,
    problems,
    run_check,
)

HERE = installed_backends()
FORMATS = list(mt.formats())
FEW = max(2, settings().max_examples // 2)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("format", [*FORMATS, None])
def test_property(format: str | None, check) -> None:
    """None is for any, and for sums of them, shared and sliced."""
    run_check(check, format, share=3)


@pytest.mark.parametrize("backend", [b for b in HERE if b != "numpy"])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_property_on_other_backends(check, backend: str) -> None:
    run_check(check, backend=backend)


@pytest.mark.parametrize("format", FORMATS)
def test_declaration(format: str) -> None:
    check_declaration(format)


# ---- identities between formats ----------------------------------------------------------------------


def same(problem: Problem, other: mt.FactorizedTensor, coefficients: list | None = None) -> None:
    """Assert that another weight gives the problem's result."""
    given_coefficients = problem.coefficients if coefficients is None else coefficients
    scale = magnitude(problem.weight, problem.z, problem.coefficients, bias=problem.layer.bias)
    result = problem.output(other, coefficients=given_coefficients)
    assert_close(result, problem.output(), scale, f"the result of {other}")


@settings(max_examples=FEW)
@given(problems("tt", backend="numpy"))
def test_train_is_the_ring_with_first_bond_one(problem: Problem) -> None:
    first, *inner, last = problem.weight.factors
    ring = mt.FactorizedTensor("tr", [first[None], *inner, last[:, :, None]])
    assert ring.rank == (1, *problem.weight.rank)
    same(problem, ring)


@settings(max_examples=FEW)
@given(problems("cp", backend="numpy"))
def test_cp_is_tucker_with_a_superdiagonal_core(problem: Problem) -> None:
    weights, *factors = problem.weight.factors
    (rank,) = problem.weight.rank
    core = np.zeros((rank,) * len(factors), factors[0].dtype)
    core[(np.arange(rank),) * len(factors)] = 1 if weights is None else weights
    same(problem, mt.FactorizedTensor("tucker", [core, *factors]))


@settings(max_examples=FEW)
@given(problems("hadamard", backend="numpy"))
def test_hadamard_is_cp_with_the_identity_as_output_factor(problem: Problem) -> None:
    identity = np.eye(problem.weight.shape[-1], dtype=problem.z.dtype)
    same(problem, mt.FactorizedTensor("cp", [*problem.weight.factors, identity]))


@settings(max_examples=FEW)
@given(problems(backend="numpy"))
def test_every_format_is_dense_of_its_tensor(problem: Problem) -> None:
    same(problem, mt.FactorizedTensor("dense", [mt.to_dense(problem.weight)]))


def with_level_of_one(weight: mt.FactorizedTensor, level: int, format: str) -> mt.FactorizedTensor:
    """The same weight in the same format with a level more, which has one expert."""
    factors, size = list(weight.factors), weight.rank
    dtype, shape = weight.arrays[0].dtype, (*weight.shape[:level], 1, *weight.shape[level:])
    first = {"cp": 1, "cp-matrix": 1, "shared-expert": 2}.get(format, 0)  # factors before the experts'
    if format in ("dense", "lowrank"):
        factors = [np.expand_dims(factor, level) for factor in factors]
    elif format in ("hadamard", "cp", "cp-matrix", "kron", "btt", "monarch", "shared-expert"):
        ones = weight.format.shapes(shape, size)[first + level]
        factors.insert(first + level, np.ones(ones, dtype))
    elif format in ("tucker", "tucker-matrix"):
        factors[0] = np.expand_dims(factors[0], level)
        factors.insert(1 + level, np.ones((1, 1), dtype))
    elif format == "tr":
        factors.insert(level, np.eye(size[level], dtype=dtype)[:, None])
    elif format in ("tt", "tt-matrix") and level == 0:
        factors[0] = factors[0][None]
        factors.insert(0, np.ones((1, 1), dtype))
    elif format in ("tt", "tt-matrix"):
        factors.insert(level, np.eye(size[level - 1], dtype=dtype)[:, None])
    else:
        pytest.fail(f"say how a level of one expert is added in format {format!r}")
    return mt.FactorizedTensor(weight.format, factors, shape)


@pytest.mark.parametrize("format", FORMATS)
def test_a_level_of_one_expert_changes_nothing(format: str) -> None:
    @settings(max_examples=FEW)
    @given(st.integers(0, 2).flatmap(lambda levels: problems(format, levels, backend="numpy")), st.data())
    def run(problem: Problem, data: st.DataObject) -> None:
        level = data.draw(st.integers(0, problem.weight.num_levels))
        more = with_level_of_one(problem.weight, level, format)
        assert more.num_levels == problem.weight.num_levels + 1
        coefficients = list(problem.coefficients)
        coefficients.insert(level, np.ones((*problem.leading, 1), problem.z.dtype))
        same(problem, more, coefficients)

    run()
