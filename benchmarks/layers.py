"""Torch layers compared with dense layers, their bare matrix products, and their equations as written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from benchmarks.devices import graphed
from benchmarks.harness import Report
from mumoe_tensor.contraction.network import BATCH
from mumoe_tensor.gates import sparse_gradient
from mumoe_tensor.measure.passes import forward, step
from mumoe_tensor.measure.timing import Comparison, Spread, compare
from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP, entmax15
from mumoe_tensor.spec import LayerSpec

try:
    import entmax
except ImportError:  # comparisons with it are left out
    entmax = None

Call = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """A layer at a published size, and its number of rows per batch."""

    name: str
    spec: LayerSpec
    rows: int
    gate_norm: str = "batch"

    def layer(self, **options: Any) -> Any:
        """The layer, with a gate that distinguishes inputs; `options` are further arguments."""
        defaults = {"gate_norm": self.gate_norm, "batch_hint": self.rows}
        make = MuMoE if self.spec.hidden is None else MuMoEMLP
        module = make.from_spec(self.spec, **defaults | options)
        nn.init.normal_(module.gate.weight, std=self.spec.in_features**-0.5)
        return module

    def dense(self, parameters: int) -> Any:
        """The dense layer it replaces, or a block whose hidden size gives as many parameters."""
        i, o = self.spec.in_features, self.spec.out_features
        if self.spec.hidden is None:
            return nn.Linear(i, o)
        hidden = round((parameters - o) / (i + 1 + o))
        return nn.Sequential(nn.Linear(i, hidden), nn.GELU(), nn.Linear(hidden, o))


GPT2 = LayerSpec("dense", experts=(), in_features=768, hidden=3072, out_features=768, bias=True)


def gpt2_block(
    format: str, experts: int | Sequence[int], rank: int | Sequence[int] | None, rows: int = 1024
) -> Workload:
    """The MLP block of GPT-2 as an expert block; with a rank of None it has as many parameters."""
    spec = replace(GPT2, format=format, experts=experts, rank=rank)
    return Workload("GPT-2 block", spec.fitted() if spec.rank is None else spec, rows, "layer")


WORKLOADS = (
    gpt2_block("cp", 256, 556),
    gpt2_block("tr", 256, (4, 4, 149)),
    gpt2_block("tucker", 256, (8, 346, 341)),
    gpt2_block("hadamard", 256, ()),
    gpt2_block("cp", 4096, 556),
    gpt2_block("cp", (1024, 1024), None),
    gpt2_block("cp", (128, 128, 128), None),
    gpt2_block("cp", (64, 64, 64, 64), None),
    Workload(
        "Mixer channel block",
        LayerSpec("cp", experts=64, in_features=512, hidden=2048, out_features=512, rank=384, bias=True),
        rows=784,
    ),
    Workload(
        "CLIP head",
        LayerSpec("cp", experts=128, in_features=768, out_features=1000, rank=354, bias=True),
        rows=256,
    ),
)


def products(layer: Any, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of every matrix product in a forward pass, including the gate."""
    weight = layer.gate.weight.detach()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=weight.device, dtype=weight.dtype)

    pairs = [(random(rows, layer.gate.in_features), weight.T)]
    for experts in layer.children():
        if isinstance(experts, Experts):
            sizes = experts.plan.program.network.sizes_at(rows)
            for made in experts.plan.steps:
                left, right, result = (set(axes) for axes in made.axes)
                if made.kind != "mul":
                    shared, summed = left & right & result, (left & right) - result
                    batch, m, k, n = (
                        prod(sizes[x] for x in axes) for axes in (shared, left - right, summed, right - left)
                    )
                    stack = [batch] if shared else []
                    pairs.append((random(*stack, m, k), random(*stack, k, n)))
    return pairs


def limit(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], backward: bool) -> Call:
    """The matrix products alone, into preallocated results; `backward` adds those of both gradients."""
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


def elementwise(layer: Any, rows: int, backward: bool) -> Call:
    """All operations except matrix products: gate, elementwise products, activation; with their gradients."""
    weight = layer.gate.weight

    def random(*shape: int, dtype: torch.dtype = weight.dtype) -> torch.Tensor:
        return torch.randn(shape, device=weight.device, dtype=dtype, requires_grad=backward)

    def coefficients(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        levels: tuple[torch.Tensor, ...] = layer.gate.coefficients_of(logits, weight.dtype)
        return levels

    logits = random(rows, len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))
    jobs: list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = [(coefficients, (logits,))]
    children = [child for child in layer.children() if isinstance(child, Experts)]
    for experts in children:
        sizes = experts.plan.program.network.sizes_at(rows)
        for made in experts.plan.steps:
            if made.kind == "mul":
                left, right, result = made.axes
                pair = (random(*(sizes[x] if x in axes else 1 for x in result)) for axes in (left, right))
                jobs.append((torch.mul, tuple(pair)))
    if len(children) == 2:
        jobs.append((layer.activation, (random(rows, children[0].out_features),)))

    def run() -> None:
        with torch.set_grad_enabled(backward):
            for function, operands in jobs:
                results = function(*operands)
                for result in results if isinstance(results, tuple) else (results,):
                    if backward:
                        torch.autograd.grad(result, operands, result, retain_graph=True)

    return run


class AsWritten(nn.Module):
    """A layer implemented literally: the `entmax` package, einsum over all factors, ones for the bias."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        logits = nn.functional.linear(x, layer.gate.weight)
        if layer.gate.norm is not None:
            logits = layer.gate.norm(logits)
        parts = logits.split(layer.gate.num_experts, -1)
        if layer.gate.gate_norm == "layer":
            parts = tuple(nn.functional.layer_norm(part, part.shape[-1:]) for part in parts)
        coefficients = [entmax.entmax15(part, dim=-1) for part in parts]
        *first, last = (child for child in layer.children() if isinstance(child, Experts))
        for experts in first:
            x = layer.activation(self.mixed(experts, x, coefficients))
        return self.mixed(last, x, coefficients)

    @staticmethod
    def mixed(experts: Experts, x: torch.Tensor, coefficients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Equation (1), with all factors in one einsum."""
        network = experts.plan.program.network
        letters = {BATCH: "Z"} | {x: chr(ord("a") + k) for k, (x, _) in enumerate(network.index_sizes)}
        terms = ["".join(letters[x] for x in axes) for axes in (*network.operands, network.output)]
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        equation = f"{','.join(terms[:-1])}->{terms[-1]}"
        return torch.einsum(equation, *experts.factors, *coefficients, x)


def over_limit(timings: Comparison, name: str) -> Spread:
    """The layer's time without its elementwise part, relative to the products in the same round."""
    seconds = zip(*(timings.seconds[x] for x in (name, "elementwise", "limit")), strict=True)
    return Spread.of((layer - rest) / bare for layer, rest, bare in seconds)


class Beside:
    """The layer of a workload with its inputs, and the dense layer it replaces."""

    def __init__(
        self, workload: Workload, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any
    ):
        torch.manual_seed(0)
        self.workload, self.device = workload, device
        spec, rows = workload.spec, workload.rows
        self.layer = workload.layer(device=device, dtype=dtype, **options)
        self.dense = workload.dense(spec.parameters).to(device, dtype)
        self.x = torch.randn(rows, spec.in_features, device=device, dtype=dtype, requires_grad=True)
        self.gradient = torch.randn(rows, spec.out_features, device=device, dtype=dtype)
        self.products = products(self.layer, rows)

    def calls(
        self, kind: str, run: str = "eager", compiler: Callable[[Any], Any] = torch.compile
    ) -> dict[str, Call]:
        """Calls to compare: a "forward" pass or a "step", "eager", "compiled" or captured as a "graph"."""
        backward = kind == "step"
        modules = {"dense": self.dense, "layer": self.layer}
        if entmax is not None and run != "graph":
            modules["as written"] = AsWritten(self.layer)
        calls: dict[str, Call] = {
            "limit": limit(self.products, backward),
            "elementwise": elementwise(self.layer, self.workload.rows, backward),
        }
        for name, module in modules.items():
            module = compiler(module) if run == "compiled" else module
            calls[name] = step(module, self.x, self.gradient) if backward else forward(module, self.x)
        return {name: graphed(call, self.device) for name, call in calls.items()} if run == "graph" else calls


def layers(quick: bool, device: str) -> Report:
    """Forward pass and step of a layer compared with a dense layer, the bare products, and the equations."""
    rows: list[dict[str, Any]] = []
    for workload in [replace(WORKLOADS[0], rows=32)] if quick else WORKLOADS:
        beside, spec = Beside(workload, device), workload.spec
        for run in ("eager",) if quick else ("eager", "compiled"):
            torch._dynamo.reset()
            for kind in ("forward", "step"):
                calls = beside.calls(kind, run)
                timings = compare(
                    calls, "dense", rounds=3 if quick else 15, limit=2.0 if quick else 20.0, device=device
                )
                ratio = timings.ratio("layer")
                rows.append(
                    {
                        "shape": workload.name,
                        "experts": "x".join(map(str, spec.experts)),
                        "format": spec.format.name,
                        "run": run,
                        "pass": kind,
                        "dense ms": 1e3 * timings.spread("dense").median,
                        "layer ms": 1e3 * timings.spread("layer").median,
                        "elementwise ms": 1e3 * timings.spread("elementwise").median,
                        "to dense": ratio.median,
                        "low": ratio.low,
                        "high": ratio.high,
                        "to limit": over_limit(timings, "layer").median,
                        "as written": timings.ratio("as written").median / ratio.median
                        if "as written" in calls
                        else None,
                    }
                )
    columns = dict.fromkeys(("shape", "experts", "format", "run", "pass"), "")
    columns |= dict.fromkeys(("dense ms", "layer ms", "elementwise ms"), ".1f")
    columns |= dict.fromkeys(("to dense", "low", "high", "to limit", "as written"), ".2f")
    notes = [
        "to dense: time over that of a dense layer of equal parameters, median over rounds, with quartiles.",
        "to limit: time without the elementwise part, over the products of plan and gate in place.",
        "elementwise: gate, elementwise products, activation; always eager, even if the layer is compiled.",
        "as written: time of the equations (entmax package, einsum, ones for the bias) over the layer's.",
    ]
    return Report("layers", "Torch layers compared with dense layers", columns, rows, notes)


def sharpened(gate_of: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, density: float) -> float:
    """The factor of the logits for a given share of nonzero coefficients, by bisection."""
    low, high = 1e-4, 1e4
    for _ in range(40):
        middle = (low * high) ** 0.5
        share = float((gate_of(middle * logits) > 0).float().mean())
        low, high = (middle, high) if share > density else (low, middle)
    return low


def scaled_entmax15(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """`entmax15` of logits times a factor."""

    @sparse_gradient
    def gate(logits: torch.Tensor) -> torch.Tensor:
        return entmax15(factor * logits)

    return gate


def sparse(quick: bool, device: str) -> Report:
    """The sparse route at several shares of nonzero coefficients, compared with the dense products."""
    experts, count = (1024, 32) if quick else (4096, 1024)
    rows: list[dict[str, Any]] = []
    gates: dict[str, Any] = {"topk, k = 8": {"name": "topk", "k": 8}}
    torch.manual_seed(0)
    logits = nn.functional.layer_norm(torch.randn(64, experts), (experts,))
    for density in (0.005,) if quick else (0.005, 0.05, 1.0):
        factor = sharpened(entmax15, logits, density)
        gates[f"entmax15, {density:.1%}"] = scaled_entmax15(factor)
    for name, gate in gates.items():
        layer = gpt2_block("cp", experts, 556, count).layer(gate=gate, device=device)
        x = torch.randn(count, GPT2.in_features, device=device, requires_grad=True)
        gradient, pairs = torch.randn(count, GPT2.out_features, device=device), products(layer, count)
        measured = float((layer.gate(x)[0] > 0).float().mean())

        def dense_route(x: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            y: torch.Tensor = layer(x, return_coefficients=True)[0]
            return y

        route = torch.nn.Module()
        route.forward = dense_route  # type: ignore[method-assign]
        route.zero_grad = layer.zero_grad  # type: ignore[method-assign]
        for kind in ("forward", "step"):
            backward = kind == "step"
            calls: dict[str, Call] = {
                "limit": limit(pairs, backward),
                "elementwise": elementwise(layer, count, backward),
            }
            for name, module in (("dense route", route), ("layer", layer)):
                calls[name] = step(module, x, gradient) if backward else forward(module, x)
            timings = compare(
                calls, "limit", rounds=3 if quick else 15, limit=2.0 if quick else 20.0, device=device
            )
            rows.append(
                {
                    "gate": name,
                    "not zero": measured,
                    "pass": kind,
                    "limit ms": 1e3 * timings.spread("limit").median,
                    "layer ms": 1e3 * timings.spread("layer").median,
                    "elementwise ms": 1e3 * timings.spread("elementwise").median,
                    "to limit": over_limit(timings, "layer").median,
                    "dense route to limit": over_limit(timings, "dense route").median,
                }
            )
    columns = {"gate": "", "not zero": ".2%", "pass": ""}
    columns |= dict.fromkeys(("limit ms", "layer ms", "elementwise ms"), ".1f")
    columns |= dict.fromkeys(("to limit", "dense route to limit"), ".2f")
    title = f"GPT-2 block, CP of rank 556, {experts:,} experts: the sparse route, eager"
    notes = [
        "to limit: time without the elementwise part, over the dense products of plan and gate in place."
    ]
    return Report("sparse", title, columns, rows, notes)


def by_hand(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A CP layer of one level in evaluation mode, written as torch operations without modules and checks."""
    weights = [[f.detach() for f in e.factors] for e in layer.children() if isinstance(e, Experts)]
    gate, norm = layer.gate.weight.detach(), layer.gate.norm

    def run(x: torch.Tensor) -> torch.Tensor:
        logits = torch.mm(x, gate.T)
        if norm is None:
            logits = nn.functional.layer_norm(logits, logits.shape[-1:])
        else:
            logits = (logits - norm.running_mean) * torch.rsqrt(norm.running_var + norm.eps)
        a = entmax15(logits)
        for k, (u1, u2, u3) in enumerate(weights):
            x = nn.functional.gelu(x) if k else x
            x = torch.mm(torch.mm(a, u1) * torch.addmm(u2[-1], x, u2[:-1]), u3.T)
        return x

    return run


def one_token(quick: bool, device: str) -> Report:
    """Inference on one token compared with hand-written torch operations, eager and compiled."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for workload in (WORKLOADS[0], WORKLOADS[-1]):
        layer = workload.layer(device=device).eval()
        x = torch.randn(1, workload.spec.in_features, device=device)
        calls = {"by hand": forward(by_hand(layer), x), "layer": forward(layer, x)}
        if not quick:
            calls["compiled"] = forward(torch.compile(layer, fullgraph=True), x)
        for name in calls:
            torch.testing.assert_close(calls[name](), calls["by hand"](), rtol=1e-4, atol=1e-5)
        timings = compare(
            calls,
            "by hand",
            rounds=3 if quick else 101,
            turn=1e-3,
            limit=2.0 if quick else 20.0,
            device=device,
        )
        rows.append(
            {
                "shape": workload.name,
                "by hand us": 1e6 * timings.spread("by hand").median,
                "layer us": 1e6 * timings.spread("layer").median,
                "more us": 1e6 * timings.excess("layer").median,
                "compiled us": None if quick else 1e6 * timings.spread("compiled").median,
                "more than by hand us": None if quick else 1e6 * timings.excess("compiled").median,
            }
        )
    columns = {"shape": ""} | dict.fromkeys(list(rows[0])[1:], ".0f")
    notes = ["by hand: eager torch operations, without modules and checks."]
    return Report("one-token", "Inference on one token, CP", columns, rows, notes)


def gates(quick: bool, device: str) -> Report:
    """entmax15 compared with the `entmax` package, forward and backward, eager and compiled."""
    size = (32, 256) if quick else (256, 4096)
    logits, gradient = torch.randn(size, device=device, requires_grad=True), torch.randn(size, device=device)
    compiled = torch.compile(entmax15, fullgraph=True)

    def both(function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        def run() -> None:
            logits.grad = None
            function(logits).backward(gradient)

        return run

    calls = {"package": both(entmax.entmax15), "eager": both(entmax15)}
    if not quick:
        calls["compiled"] = both(compiled)
    timings = compare(calls, "package", rounds=3 if quick else 15, limit=30, device=device)
    rows = [
        {
            "run": name,
            "ms": 1e3 * timings.spread(name).median,
            "times as fast": 1 / timings.ratio(name).median,
        }
        for name in calls
    ]
    title = f"entmax15 of {size[0]} x {size[1]} logits, forward and backward, vs. the entmax package"
    return Report("gates", title, {"run": "", "ms": ".2f", "times as fast": ".1f"}, rows, [])
