"""The forward pass, in time and in memory."""

from __future__ import annotations

from typing import Any

import mumoe_tensor as mt
from benchmarks.common import BACKENDS, MOST_ELEMENTS, Benchmark, inputs, profile


class Forward(Benchmark):
    """`multilinear_moe` in float32, its plan known."""

    param_names = [*Benchmark.param_names, "backend"]
    params = [*Benchmark.params, list(BACKENDS)]

    def prepare(self, layer: dict[str, Any], backend: str) -> None:
        if mt.cost(**layer).parameters > MOST_ELEMENTS:
            raise NotImplementedError(f"more than {MOST_ELEMENTS:,} parameters")
        batch, sizes = profile().batch, (*layer["experts"], layer["in_features"])
        *self.coefficients, self.z = inputs(backend, *((batch, n) for n in sizes))
        self.weight = mt.FactorizedTensor.random(**layer, like=self.z, seed=0)
        self.forward()

    def forward(self) -> Any:
        """One call."""
        return mt.multilinear_moe(self.weight, self.z, self.coefficients, bias=True)

    def time_forward(self, *_: Any) -> None:
        self.forward()

    def peakmem_forward(self, *_: Any) -> None:
        self.forward()
