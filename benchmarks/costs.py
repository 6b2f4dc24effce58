"""Figures that are counted, not measured: they change only when the library does."""

from __future__ import annotations

from typing import Any

import mumoe_tensor as mt
from benchmarks.common import Benchmark, profile


class Cost(Benchmark):
    """Cost of a layer whose rank is fitted to the dense layer's parameters."""

    def prepare(self, layer: dict[str, Any]) -> None:
        self.cost = mt.cost(**layer, batch=profile().batch, dtype="float32")

    def track_flops(self, *_: Any) -> int:
        return self.cost.flops

    track_flops.unit = "FLOPs"

    def track_parameters(self, *_: Any) -> int:
        return self.cost.parameters

    track_parameters.unit = "parameters"

    def track_largest_intermediate(self, *_: Any) -> int:
        return self.cost.size

    track_largest_intermediate.unit = "bytes"

    def track_saved(self, *_: Any) -> int:
        return self.cost.saved

    track_saved.unit = "bytes"
