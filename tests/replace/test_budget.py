"""Layers of any class get one number of parameters."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.replace import MixtureOfDecoders, MixtureOfTransforms, Transcoder  # noqa: E402
from mumoe_tensor.replace.budget import num_parameters  # noqa: E402

ARMS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "transcoder": (Transcoder, {"k": 4}, 16 + 16 + 1),
    "skip transcoder": (Transcoder, {"k": 4, "skip": True}, 16 + 16 + 1),
    "decoders": (MixtureOfDecoders, {"k": 4}, 16 + 16 + 1),
    "decoders, cp": (MixtureOfDecoders, {"k": 4, "experts": 32, "format": "cp"}, 32 + 24 + 16),
    "no experts": (MixtureOfDecoders, {"experts": ()}, 16 + 16 + 1),
    "transforms": (MixtureOfTransforms, {"ranks": [8, 4, 4, 2]}, 32 * 4),
}


@pytest.mark.parametrize("arm", ARMS)
def test_the_nearest_size_is_taken(arm: str) -> None:
    kind, options, step = ARMS[arm]
    block = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    counts = {
        rounding: num_parameters(kind.like(block, parameters=6000, rounding=rounding, **options))
        for rounding in ("down", "nearest", "up")
    }
    assert counts["down"] <= 6000 <= counts["up"] <= counts["down"] + step
    assert counts["nearest"] == min(counts["down"], counts["up"], key=lambda count: abs(count - 6000))
