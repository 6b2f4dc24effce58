"""The oracle is as precise as the dtype."""

from __future__ import annotations

import numpy as np
import pytest

from mumoe_tensor.testing import assert_close, to_numpy


def test_assert_close_is_as_tight_as_the_dtype() -> None:
    x = np.linspace(1, 2, 5, dtype=np.float32)
    assert_close(x * np.float32(1 + 1e-6), x, x)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(x * np.float32(1 + 1e-4), x, x)
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(to_numpy(x) * (1 + 1e-10), x, x)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(x, x[:, None], 1)
