"""The forward pass of the functional core, in time and in memory."""

from __future__ import annotations

from typing import Any

import mumoe_tensor as mt
from benchmarks.common import BACKENDS, Benchmark, finish, inputs, layer, need_memory, profile, settings


class Forward(Benchmark):
    """`multilinear_moe` with a cached plan."""

    param_names = [*Benchmark.param_names, "backend", "dtype", "device"]
    params = [*Benchmark.params, list(BACKENDS), list(profile().dtypes), list(profile().devices)]

    def prepare(self, format: str, experts: int, levels: int, backend: str, dtype: str, device: str) -> None:
        spec = layer(format, experts, levels)
        need_memory(spec)
        shapes = [(profile().batch, n) for n in (*spec.experts, spec.in_features)]
        *self.coefficients, self.z = inputs(backend, *shapes, dtype=dtype, device=device)
        self.weight = mt.FactorizedTensor.random(spec, like=self.z, seed=0)
        self.device = device
        self.forward()

    def forward(self) -> None:
        """One call, until the device has finished."""
        mt.multilinear_moe(self.weight, self.z, self.coefficients, bias=True)
        finish(self.device)

    def time_forward(self, *_: Any) -> None:
        self.forward()

    @settings(params=[*params[:-1], ["cpu"]])  # the memory of the process, not of a device
    def peakmem_forward(self, *_: Any) -> None:
        self.forward()
