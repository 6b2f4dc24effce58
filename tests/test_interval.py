"""Intervals of means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mumoe_tensor.interval import interval, proportion


def test_intervals() -> None:
    assert interval([2.0]) == (2.0, None)
    # Student's t for two degrees of freedom: 4.30 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4841), abs=1e-4)
    # Eleven values have ten degrees of freedom: 2.2281, not the 1.96 of many.
    assert interval(range(11)) == pytest.approx((5.0, 2.2281), abs=1e-3)


def test_one_run_has_the_interval_of_wilson() -> None:
    # Of 8 successes in 10 trials; see Brown, Cai and DasGupta (2001), equation 4.
    assert proportion([0.8], 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert proportion([1.0], 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(1, 1000))
def test_proportions_stay_between_none_and_all(shares: list[float], trials: int) -> None:
    middle, low, high = proportion(shares, trials)
    assert 0 <= low <= middle + 1e-12 and middle - 1e-12 <= high <= 1
    _, _, few = proportion([middle], max(trials // 2, 1))
    assert few >= proportion([middle], trials)[2] - 1e-12


def test_runs_that_differ_tell_less() -> None:
    same, other = proportion([0.8, 0.8], 50), proportion([0.7, 0.9], 50)
    assert same == proportion([0.8], 50) and other[0] == same[0]
    assert other[1] < same[1] - 0.1 and other[2] > same[2] + 0.05
