"""The way of a call through the package."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import mumoe_tensor  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402

PACKAGE = str(Path(mumoe_tensor.__file__).parent)


def modules_called(layer: Any, x: Any) -> list[str]:
    """Files of this package in which a function starts during a call, in order.

    Every frame that `sys.setprofile` reports as called counts, also those of comprehensions (before Python
    3.12) and each step of a generator. Calls within torch do not.
    """
    files: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_call_takes_a_short_way(training: bool, gradients: bool) -> None:
    layer, x = MuMoE(64, 32, (8, 4), "tr").train(training), torch.randn(16, 64)
    with torch.set_grad_enabled(gradients):
        layer(x)  # what is prepared once
        files = modules_called(layer, x)
    assert len(files) <= 40
    assert sum(one != other for one, other in pairwise(files)) <= 10
    rooms = {Path(file).stem for file in files}
    assert {"layers", "gate", "experts", "contraction", "execute"} <= rooms
