"""Mean and spread do not depend on the batches, nor on how far from zero the rows are."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mumoe_tensor.replace.moments import Moments  # noqa: E402


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), offset=st.sampled_from([0.0, 1.0, 1e4]))
def test_moments_are_those_of_all_rows(sizes: list[int], offset: float) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    rows = torch.randn(sum(sizes), 3, generator=generator) + offset
    moments = Moments()
    for batch in rows.split(sizes):
        moments.update(batch)
    exact = rows.double()
    assert moments.rows == len(rows)
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    spread = float((exact - exact.mean(0)).square().sum())
    assert moments.spread == pytest.approx(spread, rel=1e-2 if offset > 1 else 1e-5, abs=1e-6)
