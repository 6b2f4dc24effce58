"""Intervals of means."""

from __future__ import annotations

import pytest

from mumoe_tensor.interval import interval


def test_intervals() -> None:
    assert interval([2.0]) == (2.0, None)
    # Student's t for two degrees of freedom: 4.30 / sqrt(3).
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4841), abs=1e-4)
    # Eleven values have ten degrees of freedom: 2.2281, not the 1.96 of many.
    assert interval(range(11)) == pytest.approx((5.0, 2.2281), abs=1e-3)
