"""Torch layers compared with dense layers, their bare matrix products, and their equations as written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn

from benchmarks.devices import graphed
from benchmarks.harness import Report, Row, effort, quartiles, times
from mumoe_tensor.formats.base import BATCH
from mumoe_tensor.formats.registry import get_format
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

    @property
    def columns(self) -> Row:
        """The columns of a table that identify it."""
        experts = "x".join(map(str, self.spec.experts))
        return {"shape": self.name, "experts": experts, "format": self.spec.format.name}

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
    format: str, experts: tuple[int, ...], rank: tuple[int, ...] | None, rows: int = 1024
) -> Workload:
    """The MLP block of GPT-2 as an expert block; with a rank of None it has as many parameters."""
    spec = replace(GPT2, format=get_format(format), experts=experts, rank=rank)
    return Workload("GPT-2 block", spec.fitted() if spec.rank is None else spec, rows, "layer")


WORKLOADS = (
    gpt2_block("cp", (256,), (556,)),
    gpt2_block("tr", (256,), (4, 4, 149)),
    gpt2_block("tucker", (256,), (8, 346, 341)),
    gpt2_block("hadamard", (256,), ()),
    gpt2_block("cp", (4096,), (556,)),
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


def experts_of(layer: Any) -> list[Experts]:
    """The experts of a layer, or of the two layers of a block."""
    return [child for child in layer.children() if isinstance(child, Experts)]


def products(experts: Experts, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of the matrix products of a forward pass, in the layout of the steps."""
    place: dict[str, Any] = {"device": experts.factors[0].device, "dtype": experts.factors[0].dtype}
    pairs = []
    for plan in experts.plan.terms:
        sizes = plan.program.network.sizes_at(rows)
        for made in plan.program.steps:
            if made.kind != "mul":
                views = []
                for operand in (made.left, made.right):
                    view = torch.randn([prod(sizes[x] for x in group) for group in operand.groups], **place)
                    views.append(view if operand.axes is None else view.permute(operand.axes))
                if made.kind == "bmm":  # (one matrix may be multiplied with each of a stack)
                    count = max(map(len, views))
                    views = [view.expand(count, -1, -1) for view in views]
                pairs.append((views[0], views[1]))
    return pairs


def limit(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], backward: bool) -> Call:
    """The matrix products alone, into preallocated results; `backward` adds those of both gradients."""
    jobs = []
    for a, b in pairs:
        out = a @ b
        jobs.append((a, b, out))
        if backward:
            gradient = torch.randn_like(out)
            jobs.append((gradient, b.mT, torch.empty_like(a)))
            jobs.append((a.mT, gradient, torch.empty_like(b, memory_format=torch.contiguous_format)))

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
    children = experts_of(layer)
    for experts in children:
        for plan in experts.plan.terms:
            sizes = plan.program.network.sizes_at(rows)
            for made in plan.steps:
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
        *first, last = experts_of(layer)
        for experts in first:
            x = layer.activation(self.mixed(experts, x, coefficients))
        return self.mixed(last, x, coefficients)

    @staticmethod
    def mixed(experts: Experts, x: torch.Tensor, coefficients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Equation (1), with all factors in one einsum."""
        (plan,) = experts.plan.terms
        network = plan.program.network
        letters = {BATCH: "Z"} | {x: chr(ord("a") + k) for k, (x, _) in enumerate(network.index_sizes)}
        terms = ["".join(letters[x] for x in axes) for axes in (*network.operands, network.output)]
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        equation = f"{','.join(terms[:-1])}->{terms[-1]}"
        return torch.einsum(equation, *experts.factors, *coefficients, x)


def over_limit(timings: Comparison, name: str) -> Spread:
    """The layer's time without its elementwise part, relative to the products in the same round."""
    seconds = zip(*(timings.seconds[x] for x in (name, "elementwise", "limit")), strict=True)
    return Spread.of((layer - rest) / bare for layer, rest, bare in seconds)


def passes(kind: str, modules: Mapping[str, Any], x: torch.Tensor, gradient: torch.Tensor) -> dict[str, Call]:
    """Calls of modules: a "forward" pass or a "step"."""
    if kind == "step":
        return {name: step(module, x, gradient) for name, module in modules.items()}
    return {name: forward(module, x) for name, module in modules.items()}


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
        self.products = [(self.x.detach(), self.layer.gate.weight.detach().T)]
        for experts in experts_of(self.layer):
            self.products += products(experts, rows)

    def calls(
        self, kind: str, modules: Mapping[str, Any] | None = None, run: str = "eager", compiler: Any = None
    ) -> dict[str, Call]:
        """Calls to compare: the bare products, the elementwise part, and modules.

        They are a "forward" pass or a "step", "eager", "compiled" or captured as a "graph". By default the
        modules are the dense layer and this one.
        """
        modules = modules or {"dense": self.dense, "layer": self.layer}
        if run == "compiled":
            modules = {name: (compiler or torch.compile)(module) for name, module in modules.items()}
        calls = {
            "limit": limit(self.products, kind == "step"),
            "elementwise": elementwise(self.layer, self.workload.rows, kind == "step"),
            **passes(kind, modules, self.x, self.gradient),
        }
        return {name: graphed(call, self.device) for name, call in calls.items()} if run == "graph" else calls


def beside_dense(timings: Comparison) -> Row:
    """Columns that compare a layer with a dense layer and with its bare products."""
    row = times(timings, ("dense", "layer", "elementwise")) | quartiles(timings.ratio("layer"), "to dense")
    return row | {"to limit": over_limit(timings, "layer").median}


def layers(quick: bool, device: str) -> Report:
    """Forward pass and step of a layer compared with a dense layer, the bare products, and the equations."""
    rows: list[Row] = []
    for workload in [replace(WORKLOADS[0], rows=32)] if quick else WORKLOADS:
        beside = Beside(workload, device)
        modules = {"dense": beside.dense, "layer": beside.layer}
        if entmax is not None:
            modules["as written"] = AsWritten(beside.layer)
        for run, kind in product(("eager",) if quick else ("eager", "compiled"), ("forward", "step")):
            torch._dynamo.reset()
            timings = compare(beside.calls(kind, modules, run), "dense", **effort(quick), device=device)
            row = workload.columns | {"run": run, "pass": kind} | beside_dense(timings)
            if entmax is not None:
                row["as written"] = timings.ratio("as written").median / timings.ratio("layer").median
            rows.append(row)
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


class DenseRoute(nn.Module):
    """A layer that computes with all coefficients, also those that are zero."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x, return_coefficients=True)[0]
        return y


def sparse(quick: bool, device: str) -> Report:
    """The sparse route at several shares of nonzero coefficients, compared with the dense products."""
    experts, count = (1024, 32) if quick else (4096, 1024)
    rows: list[Row] = []
    gates: dict[str, Any] = {"topk, k = 8": {"name": "topk", "k": 8}}
    torch.manual_seed(0)
    logits = nn.functional.layer_norm(torch.randn(64, experts), (experts,))
    for density in (0.005,) if quick else (0.005, 0.05, 1.0):
        factor = sharpened(entmax15, logits, density)
        gates[f"entmax15, {density:.1%}"] = scaled_entmax15(factor)
    for name, gate in gates.items():
        beside = Beside(gpt2_block("cp", (experts,), (556,), count), device, gate=gate)
        measured = float((beside.layer.gate(beside.x)[0] > 0).float().mean())
        modules = {"dense route": DenseRoute(beside.layer), "layer": beside.layer}
        for kind in ("forward", "step"):
            timings = compare(beside.calls(kind, modules), "limit", **effort(quick), device=device)
            row = {"gate": name, "not zero": measured, "pass": kind}
            row |= times(timings, ("limit", "layer", "elementwise"))
            for column, module in (("to limit", "layer"), ("dense route to limit", "dense route")):
                row[column] = over_limit(timings, module).median
            rows.append(row)
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
    weights = [[f.detach() for f in experts.factors] for experts in experts_of(layer)]
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
    rows: list[Row] = []
    for workload in (WORKLOADS[0], WORKLOADS[-1]):
        layer = workload.layer(device=device).eval()
        x = torch.randn(1, workload.spec.in_features, device=device)
        calls = {"by hand": forward(by_hand(layer), x), "layer": forward(layer, x)}
        if not quick:
            calls["compiled"] = forward(torch.compile(layer, fullgraph=True), x)
        for name in calls:
            torch.testing.assert_close(calls[name](), calls["by hand"](), rtol=1e-4, atol=1e-5)
        timings = compare(calls, "by hand", **effort(quick, 101), turn=1e-3, device=device)
        row = {"shape": workload.name, **times(timings, calls, "us")}
        row["more us"] = 1e6 * timings.excess("layer").median
        if not quick:
            row["more than by hand us"] = 1e6 * timings.excess("compiled").median
        rows.append(row)
    names = ("by hand us", "layer us", "more us", "compiled us", "more than by hand us")
    columns = {"shape": ""} | dict.fromkeys(names, ".0f")
    notes = ["by hand: eager torch operations, without modules and checks."]
    return Report("one-token", "Inference on one token, CP", columns, rows, notes)


def gates(quick: bool, device: str) -> Report:
    """entmax15 compared with the `entmax` package, forward and backward, eager and compiled."""
    size = (32, 256) if quick else (256, 4096)
    logits, gradient = torch.randn(size, device=device, requires_grad=True), torch.randn(size, device=device)
    functions = {"package": entmax.entmax15, "eager": entmax15}
    if not quick:
        functions["compiled"] = torch.compile(entmax15, fullgraph=True)
    calls = {
        name: lambda gate=gate: torch.autograd.grad(gate(logits), logits, gradient)
        for name, gate in functions.items()
    }
    timings = compare(calls, "package", **effort(quick, limit=30), device=device)
    rows = [
        {
            "run": name,
            "ms": 1e3 * timings.spread(name).median,
            "times as fast": 1 / timings.ratio(name).median,
        }
        for name in calls
    ]
    title = f"entmax15 of {size[0]} x {size[1]} logits, forward and backward, vs. the entmax package"
    return Report("gates", title, {"run": "", "ms": ".2f", "times as fast": ".1f"}, rows)
