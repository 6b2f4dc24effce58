"""Gates: from logits to coefficients."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.common import BACKENDS, inputs, profile


class Gate:
    """A gate over the experts of one level, float32."""

    param_names = ["gate", "experts", "backend"]
    params = [
        ["entmax15", "sparsemax", "softmax", "top_k"],
        [*profile().experts, 16 * max(profile().experts)],
        list(BACKENDS),
    ]

    def setup(self, gate: str, experts: int, backend: str) -> None:
        try:
            from mumoe_tensor import gates
        except ImportError as error:  # a commit before there were gates
            raise NotImplementedError(str(error)) from error
        (self.logits,) = inputs(backend, (profile().batch, experts))
        self.gate = partial(gates.top_k, k=4) if gate == "top_k" else getattr(gates, gate)
        self.gate(self.logits)

    def time_gate(self, *_: Any) -> None:
        self.gate(self.logits)
