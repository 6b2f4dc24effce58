"""Planning and rank fitting, which happen once per layer."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import mumoe_tensor as mt
from benchmarks.common import Benchmark, layer, profile

#: Output sizes, a new one for each setup, as asv calls the setup before every timed call.
SIZES = count(profile().features + 1)


class Planning(Benchmark):
    """Search of a plan that is not in the cache."""

    param_names = [*Benchmark.param_names, "minimize"]
    params = [*Benchmark.params, list(profile().minimize)]

    def prepare(self, format: str, experts: int, levels: int, minimize: str) -> None:
        spec = layer(format, experts, levels)
        self.options: dict[str, Any] = {"batch": profile().batch, "minimize": minimize}
        mt.plan(spec, **self.options)  # the first search of a process imports modules
        self.spec = replace(spec, out_features=next(SIZES))

    def time_cold_search(self, *_: Any) -> None:
        mt.plan(self.spec, **self.options)


class FitRank(Benchmark):
    """The rank of a layer for the parameters of the dense layer."""

    def prepare(self, format: str, experts: int, levels: int) -> None:
        spec = layer(format, experts, levels)
        if not spec.rank:
            raise NotImplementedError("the format has no rank")
        self.spec = replace(spec, rank=None)

    def time_fit_rank(self, *_: Any) -> None:
        self.spec.fitted(rounding="down", gate=False)
