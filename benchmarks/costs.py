"""Counted figures, which change only when the library does; see `guard`."""

from __future__ import annotations

from typing import Any

import mumoe_tensor as mt
from benchmarks.common import PROFILES, Benchmark, layer, settings

#: No layer is run, so all profiles use full sizes.
FULL = PROFILES["regular"]


class Cost(Benchmark):
    """Cost of a float32 layer whose rank is chosen to match the parameter count of the dense layer."""

    def prepare(self, format: str, experts: int, levels: int) -> None:
        spec = layer(format, experts, levels, FULL.features)
        self.cost = mt.cost(spec, batch=FULL.batch, dtype="float32")

    @settings(unit="FLOPs")
    def track_flops(self, *_: Any) -> int:
        return self.cost.flops

    @settings(unit="parameters")
    def track_parameters(self, *_: Any) -> int:
        return self.cost.parameters

    @settings(unit="bytes")
    def track_largest_intermediate(self, *_: Any) -> int:
        return self.cost.size

    @settings(unit="bytes")
    def track_saved_bytes(self, *_: Any) -> int:
        return self.cost.saved
