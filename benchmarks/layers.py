"""The torch layers beside dense ones, and beside the bare matrix products of their plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import entmax
import torch
from torch import nn

from benchmarks.harness import Report, compare
from mumoe_tensor.contraction.network import BATCH
from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP, entmax15

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A published place for a layer: sizes, rows of a batch, and what stands there densely."""

    name: str
    rows: int
    sizes: tuple[int, ...]
    experts: tuple[int, ...]
    format: str
    rank: tuple[int, ...] | None
    gate_norm: str = "batch"

    def layer(self) -> Any:
        """The layer, with a gate that tells inputs apart."""
        make = MuMoE if len(self.sizes) == 2 else MuMoEMLP
        options: dict[str, Any] = {"gate_norm": self.gate_norm, "batch_hint": self.rows}
        made = make(*self.sizes, self.experts, self.format, self.rank, **options)
        nn.init.normal_(made.gate.weight, std=self.sizes[0] ** -0.5)
        return made

    def dense(self) -> Any:
        """The dense layer in its place."""
        first, *others = (nn.Linear(i, o) for i, o in zip(self.sizes, self.sizes[1:], strict=False))
        return nn.Sequential(first, nn.GELU(), *others) if others else first


GPT2 = (768, 3072, 768)
SHAPES = (
    Shape("GPT-2 block", 1024, GPT2, (256,), "cp", (556,), "layer"),
    Shape("GPT-2 block", 1024, GPT2, (256,), "tr", (4, 4, 149), "layer"),
    Shape("GPT-2 block", 1024, GPT2, (256,), "tucker", None, "layer"),
    Shape("GPT-2 block", 1024, GPT2, (256,), "hadamard", None, "layer"),
    Shape("GPT-2 block", 1024, GPT2, (4096,), "cp", (556,), "layer"),
    Shape("GPT-2 block", 1024, GPT2, (1024, 1024), "cp", None, "layer"),
    Shape("GPT-2 block", 1024, GPT2, (128, 128, 128), "cp", None, "layer"),
    Shape("GPT-2 block", 1024, GPT2, (64, 64, 64, 64), "cp", None, "layer"),
    Shape("Mixer channel block", 784, (512, 2048, 512), (64,), "cp", (384,)),
    Shape("CLIP head", 256, (768, 1000), (128,), "cp", (354,)),
)


def products(layer: Any, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of every matrix product of a forward pass, the gate's included."""
    pairs = [(torch.randn(rows, layer.gate.in_features), layer.gate.weight.detach().T)]
    for experts in layer.children():
        if isinstance(experts, Experts):
            sizes = {**dict(experts.plan.program.network.sizes), BATCH: rows}
            for step in experts.plan.steps:
                left, right, result = (set(axes) for axes in step.axes)
                if step.kind != "mul":
                    shared, summed = left & right & result, (left & right) - result
                    batch, m, k, n = (
                        prod(sizes[x] for x in axes) for axes in (shared, left - right, summed, right - left)
                    )
                    stack = [batch] if shared else []
                    pairs.append((torch.randn(*stack, m, k), torch.randn(*stack, k, n)))
    return pairs


def limit(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], backward: bool) -> Call:
    """The products alone with their results in place, in a backward pass also those of both gradients."""
    jobs = []
    for a, b in pairs:
        out = a @ b
        jobs.append((a, b, out))
        if backward:
            jobs.append((torch.randn_like(out), b.mT, torch.empty_like(a)))
            jobs.append(
                (a.mT, torch.randn_like(out), torch.empty_like(b, memory_format=torch.contiguous_format))
            )

    def run() -> None:
        for a, b, out in jobs:
            torch.matmul(a, b, out=out)

    return run


def forward(module: Any, x: torch.Tensor) -> Call:
    """A forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def step(module: Any, x: torch.Tensor, gradient: torch.Tensor) -> Call:
    """zero_grad, forward, backward, as in the middle of a network: the input has a gradient too."""

    def run() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(gradient)

    return run


def layers(quick: bool) -> Report:
    """Forward pass and step of a layer against the dense layer and the bare products, eager and compiled."""
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[:1] if quick else SHAPES:
        torch.manual_seed(0)
        layer, dense = shape.layer(), shape.dense()
        parameters = [sum(p.numel() for p in module.parameters()) for module in (layer, dense)]
        count = 32 if quick else shape.rows
        x = torch.randn(count, shape.sizes[0], requires_grad=True)
        gradient = torch.randn(count, shape.sizes[-1])
        pairs = products(layer, count)
        for compiled in (False,) if quick else (False, True):
            torch._dynamo.reset()
            mine, theirs = (torch.compile(m, fullgraph=True) if compiled else m for m in (layer, dense))
            for kind in ("forward", "step"):
                calls: dict[str, Call] = {"limit": limit(pairs, backward=kind == "step")}
                for name, module in (("dense", theirs), ("layer", mine)):
                    calls[name] = forward(module, x) if kind == "forward" else step(module, x, gradient)
                found = compare(calls, "dense", rounds=3 if quick else 15, limit=2.0 if quick else 12.0)
                ratio, bare = found.ratio("layer"), found.ratio("limit")
                rows.append(
                    {
                        "shape": shape.name,
                        "experts": "x".join(map(str, shape.experts)),
                        "format": shape.format,
                        "run": "compiled" if compiled else "eager",
                        "pass": kind,
                        "parameters": parameters[0] / parameters[1],
                        "dense ms": 1e3 * found.spread("dense").median,
                        "layer ms": 1e3 * found.spread("layer").median,
                        "to dense": ratio.median,
                        "low": ratio.low,
                        "high": ratio.high,
                        "to limit": ratio.median / bare.median,
                    }
                )
    columns = dict.fromkeys(("shape", "experts", "format", "run", "pass"), "")
    columns |= {"parameters": ".3f", "dense ms": ".1f", "layer ms": ".1f"}
    columns |= dict.fromkeys(("to dense", "low", "high", "to limit"), ".2f")
    notes = [
        "to dense: time over that of the dense layer, median of the turns, with quartiles.",
        "to limit: over the matrix products of the plan and the gate alone, with results in place.",
        "parameters: over those of the dense layer.",
    ]
    return Report("layers", "Torch layers beside dense ones", columns, rows, notes)


def gates(quick: bool) -> Report:
    """entmax15 against the `entmax` package, forward and backward, eager and compiled."""
    size = (32, 256) if quick else (256, 4096)
    logits, gradient = torch.randn(size, requires_grad=True), torch.randn(size)
    compiled = torch.compile(entmax15, fullgraph=True)

    def both(function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        def run() -> None:
            logits.grad = None
            function(logits).backward(gradient)

        return run

    calls = {"package": both(entmax.entmax15), "eager": both(entmax15)}
    if not quick:
        calls["compiled"] = both(compiled)
    found = compare(calls, "package", rounds=3 if quick else 15, limit=30)
    rows = [
        {"run": name, "ms": 1e3 * found.spread(name).median, "times as fast": 1 / found.ratio(name).median}
        for name in calls
    ]
    title = f"entmax15 of {size[0]} x {size[1]} logits, forward and backward, against the entmax package"
    return Report("gates", title, {"run": "", "ms": ".2f", "times as fast": ".1f"}, rows, [])
