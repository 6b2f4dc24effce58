"""What `torch.compile` must not trace."""

from __future__ import annotations

import pytest

from mumoe_tensor.compiling import constant_under_compile

torch = pytest.importorskip("torch")


def test_the_mark_is_that_of_torch() -> None:
    ours, theirs = constant_under_compile(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) and vars(ours)
