"""Gates: from logits to coefficients."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.common import BACKENDS, Benchmark, finish, inputs, profile


class Gate(Benchmark):
    """A gate over the experts of one level, float32."""

    param_names = ["gate", "experts", "backend", "device"]
    params = [
        ["entmax15", "sparsemax", "softmax", "top_k"],
        [*profile().experts, 16 * max(profile().experts)],
        list(BACKENDS),
        list(profile().devices),
    ]

    def prepare(self, gate: str, experts: int, backend: str, device: str) -> None:
        from mumoe_tensor import gates

        (self.logits,) = inputs(backend, (profile().batch, experts), device=device)
        self.gate = partial(gates.top_k, k=4) if gate == "top_k" else getattr(gates, gate)
        self.device = device
        self.time_gate()

    def time_gate(self, *_: Any) -> None:
        self.gate(self.logits)
        finish(self.device)
