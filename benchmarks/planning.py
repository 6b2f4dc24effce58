"""Planning and rank fitting, which a layer does once."""

from __future__ import annotations

from itertools import count
from typing import Any

import mumoe_tensor as mt
from benchmarks.common import Benchmark, profile


class Planning(Benchmark):
    """Search of a plan that no cache holds: no two calls are for the same sizes."""

    param_names = [*Benchmark.param_names, "minimize"]
    params = [*Benchmark.params, list(profile().minimize)]

    def prepare(self, layer: dict[str, Any], minimize: str) -> None:
        self.layer = layer | {"batch": profile().batch, "minimize": minimize}
        self.sizes = count(layer["in_features"])

    def time_cold_search(self, *_: Any) -> None:
        mt.plan(**self.layer | {"in_features": next(self.sizes)})


class FitRank(Benchmark):
    """Rank of a layer for the parameters of the dense one."""

    def prepare(self, layer: dict[str, Any]) -> None:
        if layer.pop("rank") is None:
            raise NotImplementedError("the format has no rank")
        self.layer = layer

    def time_fit_rank(self, *_: Any) -> None:
        mt.fit_rank(**self.layer, rounding="down")
