"""Structured layers compared with `nn.Linear`, their bare products, and layers of tensorly-torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Report, threads
from benchmarks.layers import Call, limit
from benchmarks.probes import kept_bytes
from mumoe_tensor.formats.splits import balanced
from mumoe_tensor.measure.passes import forward, step
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn import Experts, MuMoE
from mumoe_tensor.nn.size import num_parameters

IN, OUT = 768, 3072
#: Format, experts, rank.
LAYERS: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("btt", (), (1,)),
    ("btt", (), (4,)),
    ("btt", (16,), (4,)),
    ("btt", (64,), (4,)),
    ("kron", (), (1,)),
    ("kron", (), (4,)),
    ("monarch", (), ()),
    ("tt-matrix", (), (4,)),
    ("tt-matrix", (), (43,)),
    ("cp-matrix", (), (805,)),
    ("tucker-matrix", (), (16, 16, 16, 16)),
    ("lowrank", (), (64,)),
    # Similar parameters and FLOPs as btt with the same number of experts; dense experts have no rank to fit.
    ("cp", (16,), (115,)),
    ("tr", (16,), (4, 4, 28)),
    ("dense", (16,), ()),
    ("cp", (64,), (113,)),
    ("tr", (64,), (4, 4, 28)),
    ("dense", (64,), ()),
)
#: Layers that are also compiled.
COMPILED = (("btt", (), (1,)), ("btt", (), (4,)), ("kron", (), (1,)))
#: Names and ranks of tensorly-torch's layers, with the parameters of those in `LAYERS` and of btt of rank 1.
TLTORCH: tuple[tuple[str, int | tuple[int, ...]], ...] = (
    ("blocktt", 43),
    ("cp", 805),
    ("tucker", (16, 16, 16, 16)),
)


def bare_products(experts: Experts, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Operands of the matrix products, in the layout of the steps."""
    pairs = []
    for plan in experts.plan.terms:
        sizes = plan.program.network.sizes_at(rows)
        for made in plan.program.steps:
            if made.kind != "mul":
                views = []
                for operand in (made.left, made.right):
                    view = torch.randn([prod(sizes[x] for x in group) for group in operand.groups])
                    views.append(view if operand.axes is None else view.permute(operand.axes))
                left, right = views
                if made.kind == "bmm":  # (one matrix may be multiplied with each of a stack)
                    count = max(len(left), len(right))
                    left, right = (x.expand(count, -1, -1) for x in (left, right))
                pairs.append((left, right))
    return pairs


def structured(quick: bool, device: str) -> Report:
    """Structured layers of 768 inputs and 3,072 outputs vs. `nn.Linear` and their bare products."""
    with threads(1):
        return _structured(quick, device)


def _structured(quick: bool, device: str) -> Report:
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for format, experts, rank in LAYERS[:1] if quick else LAYERS:
        for count in (32,) if quick else (1024, 1):
            options: dict[str, Any] = {"bias": not experts, "gate_norm": "layer", "batch_hint": count}
            layer = MuMoE(IN, OUT, experts, format, rank, device=device, **options)
            dense = nn.Linear(IN, OUT, device=device)
            x = torch.randn(count, IN, device=device, requires_grad=True)
            gradient = torch.randn(count, OUT, device=device)
            pairs = bare_products(layer.experts, count)
            is_compiled = (format, experts, rank) in COMPILED
            for run in ("eager", "compiled") if is_compiled else ("eager",):
                torch._dynamo.reset()
                made = torch.compile(layer) if run == "compiled" else layer
                for kind in ("forward", "step"):
                    backward = kind == "step"
                    calls: dict[str, Call] = {"limit": limit(pairs, backward)}
                    for name, module in (("dense", dense), ("layer", made)):
                        calls[name] = step(module, x, gradient) if backward else forward(module, x)
                    timings = compare(calls, "dense", rounds=3 if quick else 9, limit=1.0, device=device)
                    ratio, bare = timings.ratio("layer"), timings.ratio("limit")
                    rows.append(
                        {
                            "format": format,
                            "experts": "x".join(map(str, experts)) or "none",
                            "rank": ", ".join(map(str, rank)) or "-",
                            "parameters": num_parameters(layer.experts),
                            "FLOPs": layer.experts.plan.flops // count,
                            "inputs": count,
                            "run": run,
                            "pass": kind,
                            "to nn.Linear": ratio.median,
                            "low": ratio.low,
                            "high": ratio.high,
                            "products": bare.median,
                            "kept MiB": kept_bytes(layer, x) / 2**20,
                        }
                    )
    if not quick and device == "cpu" and find_spec("tltorch"):
        command = [sys.executable, "-m", "benchmarks.structured"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows += [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    columns = dict.fromkeys(("format", "experts", "rank"), "") | dict.fromkeys(
        ("parameters", "FLOPs", "inputs"), ",d"
    )
    columns |= dict.fromkeys(("run", "pass"), "") | dict.fromkeys(("to nn.Linear", "low", "high"), ".3f")
    notes = [
        "to nn.Linear: time over that of nn.Linear of the same sizes, median over rounds, with quartiles;",
        "layers with experts include the gate, and layers without have a bias. products: the matrix products",
        "alone, into preallocated results, over nn.Linear. FLOPs: experts only, per input. kept: saved for",
        "the backward pass. tltorch: in a separate process.",
    ]
    title = f"Structured layers, {IN} -> {OUT}, one thread"
    return Report("structured", title, columns | {"products": ".3f", "kept MiB": ".1f"}, rows, notes)


def tensorly_torch() -> None:
    """Print a JSON line per layer of tensorly-torch, whose import sets TensorLy's global backend."""
    import tltorch

    inner, outer = (balanced("m", size, 2, "tltorch") for size in (IN, OUT))
    dense, x = nn.Linear(IN, OUT), torch.randn(1024, IN, requires_grad=True)
    gradient = torch.randn(1024, OUT)
    for name, rank in TLTORCH:
        for implementation in ("factorized", "reconstructed"):
            layer = tltorch.FactorizedLinear(
                inner, outer, factorization=name, rank=rank, implementation=implementation
            )
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.1)
            for kind in ("forward", "step"):
                modules = (("dense", dense), ("layer", layer))
                calls = {n: step(m, x, gradient) if kind == "step" else forward(m, x) for n, m in modules}
                ratio = compare(calls, "dense", rounds=9, limit=1.0).ratio("layer")
                row = {"format": f"tltorch {name} {implementation}", "experts": "none", "rank": str(rank)}
                row |= {"parameters": num_parameters(layer.weight)}
                row |= {"inputs": 1024, "run": "eager", "pass": kind, "to nn.Linear": ratio.median}
                print(json.dumps(row | {"low": ratio.low, "high": ratio.high}))


if __name__ == "__main__":
    with threads(1):
        tensorly_torch()
