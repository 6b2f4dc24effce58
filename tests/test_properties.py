"""Every property of `mumoe_tensor.testing` for every registered format, and identities between formats."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

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
    check_equals_dense,
    check_format,
    check_one_hot,
    check_plan,
    installed_backends,
    magnitude,
    problems,
    run_check,
    to_numpy,
)

HERE = installed_backends()
FORMATS = list(mt.formats())
FEW = max(2, settings().max_examples // 2)


@pytest.mark.parametrize("backend", [b for b in HERE if b != "jax"])
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("format", FORMATS)
def test_property(format: str, check, backend: str) -> None:
    run_check(check, format, backend=backend, share=3)


@pytest.mark.skipif("jax" not in HERE, reason="JAX is not installed")
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_property_on_jax(check) -> None:
    run_check(check, backend="jax")


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


def with_level_of_one(weight: mt.FactorizedTensor, level: int) -> mt.FactorizedTensor:
    """The same weight in the same format with a level more, which has one expert."""
    factors, format, size = list(weight.factors), weight.format.name, weight.rank
    one = np.ones((1, 1), weight.arrays[0].dtype)
    if format == "dense":
        factors = [np.expand_dims(factors[0], level)]
    elif format == "hadamard":
        factors.insert(level, one * np.ones(weight.shape[-1], one.dtype))
    elif format == "cp":
        factors.insert(1 + level, one * np.ones(size[0], one.dtype))
    elif format == "tucker":
        factors[0] = np.expand_dims(factors[0], level)
        factors.insert(1 + level, one)
    elif format == "tr":
        factors.insert(level, np.eye(size[level], dtype=one.dtype)[:, None])
    elif format == "tt" and level == 0:
        factors[0] = factors[0][None]
        factors.insert(0, one)
    elif format == "tt":
        factors.insert(level, np.eye(size[level - 1], dtype=one.dtype)[:, None])
    else:
        pytest.fail(f"say how a level of one expert is added in format {format!r}")
    return mt.FactorizedTensor(weight.format, factors)


@pytest.mark.parametrize("format", FORMATS)
def test_a_level_of_one_expert_changes_nothing(format: str) -> None:
    @settings(max_examples=FEW)
    @given(st.integers(0, 2).flatmap(lambda levels: problems(format, levels, backend="numpy")), st.data())
    def run(problem: Problem, data: st.DataObject) -> None:
        level = data.draw(st.integers(0, problem.weight.num_levels))
        more = with_level_of_one(problem.weight, level)
        assert more.num_levels == problem.weight.num_levels + 1
        coefficients = list(problem.coefficients)
        coefficients.insert(level, np.ones((*problem.leading, 1), problem.z.dtype))
        same(problem, more, coefficients)

    run()


# ---- the checks themselves bite ------------------------------------------------------------------------


class Unregistered(mt.Format):
    """A CP format of somebody's own, which is in no registry."""

    name = "somebody's own"
    title = "Somebody's own"

    def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
        return [mt.Factor(f"{m} q") for m in modes]


def test_check_format_takes_what_is_not_registered() -> None:
    assert "somebody's own" not in mt.formats()
    run_check(check_equals_dense, Unregistered(), share=5)
    with pytest.raises(ValueError, match="unknown format"):
        check_format("somebody's own")


def test_a_default_rank_that_does_not_fit_fails_the_declaration() -> None:
    class Short(Unregistered):
        def default_rank(self, sizes: tuple[int, ...], t: int) -> tuple[int, ...]:
            return ()

    with pytest.raises(ValueError, match="has 1 entries"):
        check_declaration(Short())


def test_a_declaration_that_changes_fails() -> None:
    calls = count()

    class Moody(Unregistered):
        def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
            call = next(calls)
            return [mt.Factor(f"{m} q{call}") for m in modes]

    with pytest.raises(AssertionError, match="declares other factors each time"):
        check_declaration(Moody())


@contextmanager
def profile(**options: Any) -> Iterator[None]:
    """Hypothesis with a profile, as a project may have it."""
    before = settings.get_current_profile_name()
    settings.register_profile("of a test", settings.get_profile("default"), **options)
    settings.load_profile("of a test")
    yield
    settings.load_profile(before)


def test_checks_have_no_deadline_and_no_health_check() -> None:
    def slow(problem: Problem) -> None:
        time.sleep(0.01)

    def slow_strategy(*_: Any, **options: Any) -> Any:
        return problems("cp", **options).filter(lambda problem: problem.seed % 50 == 1)

    with profile(deadline=1, suppress_health_check=(), max_examples=2), pytest.MonkeyPatch.context() as patch:
        run_check(slow, "cp")
        patch.setattr("mumoe_tensor.testing.run.problems", slow_strategy)
        run_check(check_equals_dense, "cp")


@given(st.data())
def test_a_problem_can_be_pasted_back(data: st.DataObject) -> None:
    problem = data.draw(problems(data.draw(st.sampled_from([None, Unregistered()])), dtype="float32"))
    again = eval(repr(problem), globals() | {"LayerSpec": mt.LayerSpec})
    assert again == problem
    arrays = [(*x.weight.factors, x.z, *x.coefficients) for x in (problem, again)]
    for mine, theirs in zip(*arrays, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))


class Boasting(Unregistered):
    """Its closed form is better than any plan."""

    def reference_flops(self, sizes: tuple[int, ...], rank: tuple[int, ...]) -> int:
        return 0


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("format", ["tucker", Unregistered(), Boasting()], ids=repr)
def test_lines_of_a_failing_check_can_be_pasted_back(
    format: str | mt.Format, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_plan if isinstance(format, Boasting) else check_equals_dense
    if check is check_equals_dense:

        def wrong(problem: Problem, *_: Any, **__: Any) -> Any:
            return problem.array(np.full((*problem.leading, problem.layer.out_features), 7.0))

        monkeypatch.setattr(Problem, "output", wrong)
    with pytest.raises(AssertionError) as failed:
        run_check(check, format, backend=backend)
    _, _, lines = "\n".join(failed.value.__notes__).partition("To see it again:\n\n")
    lines = lines[: lines.index(")\n\n") + 1]
    names: dict[str, Any] = {}
    with pytest.raises(AssertionError) as again:
        exec(lines, names)
    assert str(again.value) == str(failed.value)
    assert check.__name__ in names


@pytest.mark.parametrize("wrong", [0.0, 1.0, np.nan])
def test_a_constant_result_fails(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mumoe_tensor.testing.strategies.multilinear_moe",
        lambda weight, z, coefficients, **_: np.full((*z.shape[:-1], weight.shape[-1]), wrong, z.dtype),
    )
    for check in (check_equals_dense, check_one_hot):
        with pytest.raises(AssertionError, match="is off by"):
            run_check(check, "cp")


def test_assert_close_is_as_tight_as_the_dtype() -> None:
    x = np.linspace(1, 2, 5, dtype=np.float32)
    assert_close(x * np.float32(1 + 1e-6), x, x)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(x * np.float32(1 + 1e-4), x, x)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(to_numpy(x) * (1 + 1e-10), x, x)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(x, x[:, None], 1)
