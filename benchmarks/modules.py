"""The torch layers: inference and training step, in time and in memory."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import Benchmark, finish, layer, need_device, need_memory, profile, settings


class Module(Benchmark):
    """`MuMoE` and `MuMoEMLP`, with the parameters of the dense layer or block."""

    param_names = [*Benchmark.param_names, "module", "dtype", "device"]
    params = [*Benchmark.params, ["MuMoE", "MuMoEMLP"], list(profile().dtypes), list(profile().devices)]

    def prepare(self, format: str, experts: int, levels: int, module: str, dtype: str, device: str) -> None:
        need_device(device)
        from mumoe_tensor import nn

        features, batch = profile().features, profile().batch
        spec = layer(format, experts, levels, hidden=4 * features if module == "MuMoEMLP" else None)
        need_memory(spec)
        options = {"device": device, "dtype": getattr(torch, dtype)}
        torch.manual_seed(0)
        self.module = getattr(nn, module).from_spec(spec, batch_hint=batch, **options)
        # Random gate weights: the initial zeros would give all experts the same coefficient.
        torch.nn.init.normal_(self.module.gate.weight, std=features**-0.5)
        self.x = torch.randn(batch, features, **options, requires_grad=True)
        self.gradient = torch.randn(batch, features, **options)
        self.device = device


class Inference(Module):
    """Forward pass in evaluation mode, without gradients."""

    def prepare(self, *args: Any, **values: Any) -> None:
        super().prepare(*args, **values)
        self.module.eval()
        self.forward()

    def forward(self) -> None:
        """One call, until the device has finished."""
        with torch.no_grad():
            self.module(self.x)
        finish(self.device)

    def time_forward(self, *_: Any) -> None:
        self.forward()


class Step(Module):
    """zero_grad, forward and backward, with a gradient of the input, as inside a network."""

    def prepare(self, *args: Any, **values: Any) -> None:
        super().prepare(*args, **values)
        self.step()

    def step(self) -> None:
        """One step, until the device has finished."""
        self.module.zero_grad()
        self.x.grad = None
        self.module(self.x).backward(self.gradient)
        finish(self.device)

    def time_step(self, *_: Any) -> None:
        self.step()

    @settings(params=[*Module.params[:-1], ["cpu"]])
    def peakmem_step(self, *_: Any) -> None:
        self.step()

    @settings(params=[*Module.params[:-1], ["cpu"]], unit="bytes")
    def track_saved_bytes(self, *_: Any) -> int:
        from benchmarks.probes import kept_bytes

        return kept_bytes(self.module, self.x)

    @settings(params=[*Module.params[:-1], ["cuda"]], unit="bytes")
    def track_cuda_peak_bytes(self, *_: Any) -> int:
        """Peak of allocated bytes during a step, with parameters and input."""
        # asv runs each case in a separate process, so nothing else has used the device's memory.
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated()
