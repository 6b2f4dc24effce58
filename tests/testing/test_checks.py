"""Checks fail where their property does not hold."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from somebody import Unregistered

import mumoe_tensor as mt
from mumoe_tensor.testing import check_declaration, check_equals_dense, check_one_hot, run_check


def test_a_default_rank_that_does_not_fit_fails_the_declaration() -> None:
    class Short(Unregistered):
        def default_rank(self, sizes: tuple[int, ...], t: int) -> tuple[int, ...]:
            return ()

    with pytest.raises(ValueError, match="one entry per bond"):
        check_declaration(Short())


def test_a_declaration_that_changes_fails() -> None:
    calls = count()

    class Moody(Unregistered):
        def factors(self, modes: tuple[str, ...]) -> list[mt.Factor]:
            call = next(calls)
            return [mt.Factor(f"{m} q{call}") for m in modes]

    with pytest.raises(AssertionError, match="declares other factors each time"):
        check_declaration(Moody())


@pytest.mark.parametrize("wrong", [0.0, 1.0, np.nan])
def test_a_constant_result_fails(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mumoe_tensor.testing.strategies.multilinear_moe",
        lambda weight, z, coefficients, **_: np.full((*z.shape[:-1], weight.shape[-1]), wrong, z.dtype),
    )
    for check in (check_equals_dense, check_one_hot):
        with pytest.raises(AssertionError, match="is off by"):
            run_check(check, "cp")
