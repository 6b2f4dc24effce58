"""Structured layers compared with `nn.Linear`, their bare products, and layers of tensorly-torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from itertools import product

import torch
from torch import nn

from benchmarks.harness import MIB, Report, Row, effort, quartiles, threads
from benchmarks.layers import limit, passes, products
from benchmarks.probes import kept_bytes
from mumoe_tensor.formats.splits import balanced
from mumoe_tensor.measure.memory import in_fresh_process
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn import MuMoE
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


def structured(quick: bool, device: str) -> Report:
    """Structured layers of 768 inputs and 3,072 outputs vs. `nn.Linear` and their bare products."""
    rows: list[Row] = []
    torch.manual_seed(0)
    with threads(1):
        for case, count in product(LAYERS[:1] if quick else LAYERS, (32,) if quick else (1024, 1)):
            rows += rows_of(*case, count, quick, device)
    if not quick and device == "cpu" and find_spec("tltorch"):
        rows += in_fresh_process("benchmarks.structured:tensorly_torch")
    columns = dict.fromkeys(("format", "experts", "rank"), "")
    columns |= dict.fromkeys(("parameters", "FLOPs", "inputs"), ",d") | dict.fromkeys(("run", "pass"), "")
    columns |= dict.fromkeys(("to nn.Linear", "low", "high", "products"), ".3f") | {"kept MiB": ".1f"}
    notes = [
        "to nn.Linear: time over that of nn.Linear of the same sizes, median over rounds, with quartiles;",
        "layers with experts include the gate, and layers without have a bias. products: the matrix products",
        "alone, into preallocated results, over nn.Linear. FLOPs: experts only, per input. kept: saved for",
        "the backward pass. tltorch: in a separate process.",
    ]
    return Report("structured", f"Structured layers, {IN} -> {OUT}, one thread", columns, rows, notes)


def rows_of(
    format: str, experts: tuple[int, ...], rank: tuple[int, ...], count: int, quick: bool, device: str
) -> Iterator[Row]:
    """The rows of a layer on a number of inputs."""
    layer = MuMoE(
        IN, OUT, experts, format, rank, bias=not experts, gate_norm="layer", batch_hint=count, device=device
    )
    dense, x = nn.Linear(IN, OUT, device=device), torch.randn(count, IN, device=device, requires_grad=True)
    gradient, pairs = torch.randn(count, OUT, device=device), products(layer.experts, count)
    is_compiled = (format, experts, rank) in COMPILED
    for run, kind in product(("eager", "compiled") if is_compiled else ("eager",), ("forward", "step")):
        torch._dynamo.reset()
        modules = {"dense": dense, "layer": torch.compile(layer) if run == "compiled" else layer}
        calls = {"limit": limit(pairs, kind == "step")} | passes(kind, modules, x, gradient)
        timings = compare(calls, "dense", **effort(quick, 9, 1.0), device=device)
        yield {
            "format": format,
            "experts": "x".join(map(str, experts)) or "none",
            "rank": ", ".join(map(str, rank)) or "-",
            "parameters": num_parameters(layer.experts),
            "FLOPs": layer.experts.plan.flops // count,
            "inputs": count,
            "run": run,
            "pass": kind,
            **quartiles(timings.ratio("layer"), "to nn.Linear"),
            "products": timings.ratio("limit").median,
            "kept MiB": kept_bytes(layer, x) / MIB,
        }


def tensorly_torch() -> list[Row]:
    """The rows of layers of tensorly-torch, whose import sets TensorLy's global backend."""
    with redirect_stdout(sys.stderr):
        import tltorch

    torch.set_num_threads(1)
    inner, outer = (balanced("m", size, 2, "tltorch") for size in (IN, OUT))
    dense, x = nn.Linear(IN, OUT), torch.randn(1024, IN, requires_grad=True)
    gradient = torch.randn(1024, OUT)
    rows = []
    for (name, rank), implementation in product(TLTORCH, ("factorized", "reconstructed")):
        layer = tltorch.FactorizedLinear(
            inner, outer, factorization=name, rank=rank, implementation=implementation
        )
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
        for kind in ("forward", "step"):
            calls = passes(kind, {"dense": dense, "layer": layer}, x, gradient)
            ratio = compare(calls, "dense", **effort(False, 9, 1.0)).ratio("layer")
            row: Row = {"format": f"tltorch {name} {implementation}", "experts": "none", "rank": str(rank)}
            row |= {"parameters": num_parameters(layer.weight), "inputs": 1024, "run": "eager", "pass": kind}
            rows.append(row | quartiles(ratio, "to nn.Linear"))
    return rows
