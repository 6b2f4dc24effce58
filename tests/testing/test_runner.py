"""Checks run on any format, under any profile of Hypothesis, and print how to run them again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from somebody import Unregistered

import mumoe_tensor as mt
from mumoe_tensor.testing import (
    Problem,
    check_equals_dense,
    check_format,
    check_plan,
    installed_backends,
    problems,
    run_check,
)


def test_check_format_takes_what_is_not_registered() -> None:
    assert "somebody's own" not in mt.formats()
    run_check(check_equals_dense, Unregistered(), share=5)
    with pytest.raises(ValueError, match="unknown format"):
        check_format("somebody's own")


@contextmanager
def profile(parent: str = "default", **options: Any) -> Iterator[None]:
    """Hypothesis with a profile, as a project may have it."""
    before = settings.get_current_profile_name()
    settings.register_profile("of a test", settings.get_profile(parent), **options)
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
        patch.setattr("mumoe_tensor.testing.runner.problems", slow_strategy)
        run_check(check_equals_dense, "cp")


class Boasting(Unregistered):
    """Its closed form is better than any plan."""

    def reference_flops(self, sizes: tuple[int, ...], rank: tuple[int, ...]) -> int:
        return 0


@pytest.mark.parametrize("backend", installed_backends())
@pytest.mark.parametrize("format", ["tucker", Unregistered(), Boasting()], ids=repr)
def test_lines_of_a_failing_check_can_be_pasted_back(
    format: str | mt.Format, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_plan if isinstance(format, Boasting) else check_equals_dense
    if check is check_equals_dense:

        def wrong(problem: Problem, *_: Any, **__: Any) -> Any:
            return problem.array(np.full((*problem.leading, problem.layer.out_features), 7.0))

        monkeypatch.setattr(Problem, "output", wrong)
    # The first problem that fails does as well as the smallest.
    with profile("fault"), pytest.raises(AssertionError) as failed:
        run_check(check, format, backend=backend)
    _, _, lines = "\n".join(failed.value.__notes__).partition("To see it again:\n\n")
    lines = lines[: lines.index(")\n\n") + 1]
    names: dict[str, Any] = {}
    with pytest.raises(AssertionError) as again:
        exec(lines, names)
    assert str(again.value) == str(failed.value)
    assert check.__name__ in names
