"""Layers at published sizes compared with dense layers: time, kernel launches, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

import mumoe_tensor as mt
from benchmarks.devices import PRECISIONS, launches, precision
from benchmarks.gpu.rows import BRIEF, MIB, Row
from benchmarks.layers import WORKLOADS, Beside, Workload, gpt2_block, over_limit
from benchmarks.probes import kept_bytes
from mumoe_tensor.measure.memory import growth
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.spec import LayerSpec

BLOCKS = (
    gpt2_block("cp", 256, 556),
    gpt2_block("tr", 256, (4, 4, 149)),
    gpt2_block("cp", (4096, 4096), 256),
    *(w for w in WORKLOADS if w.name == "Mixer channel block"),
    Workload(
        "Mixer token block",
        LayerSpec("cp", experts=64, in_features=196, hidden=256, out_features=196, bias=True).fitted(),
        rows=512,
    ),
    *(w for w in WORKLOADS if w.name == "CLIP head"),
)
TOY = (
    Workload(
        "toy block",
        LayerSpec("cp", experts=(4, 4), in_features=8, hidden=16, out_features=8, rank=3, bias=True),
        rows=32,
        gate_norm="layer",
    ),
)
TOKENS = (1024, 1, 65_536, 8192)


def described(workload: Workload) -> Row:
    """The columns that identify a workload."""
    spec = workload.spec
    experts = "x".join(map(str, spec.experts))
    return {"shape": workload.name, "experts": experts, "format": spec.format.name}


def layers(device: str, toy: bool, runs: tuple[str, ...] = ("eager", "graph")) -> Iterator[Row]:
    """Times relative to the dense layer, and to the bare products."""
    workloads, counts = (TOY, (32,)) if toy else (BLOCKS, TOKENS)
    for tokens, run, name, workload in product(counts, runs, reversed(PRECISIONS), workloads):
        if workload.gate_norm == "batch" and tokens < 2:
            continue
        place = described(workload) | {"tokens": tokens, "precision": name, "run": run}
        compiler = partial(torch.compile, backend="aot_eager") if toy else torch.compile
        torch._dynamo.reset()
        try:
            with precision(name) as dtype:
                for row in times(Beside(replace(workload, rows=tokens), device, dtype), run, compiler):
                    yield place | row
        except torch.OutOfMemoryError:
            yield place | {"note": "out of memory"}


def times(pair: Beside, run: str, compiler: Callable[[Any], Any]) -> Iterator[Row]:
    """Times of a forward pass, and of a step."""
    flops = mt.cost(pair.workload.spec, gate=True, batch=pair.workload.rows).flops
    for kind, passes in (("forward", 1), ("step", 3)):
        calls = pair.calls(kind, run, compiler)
        calls.pop("as written", None)
        timings = compare(calls, "dense", **BRIEF, device=pair.device)
        seconds, ratio = timings.spread("layer").median, timings.ratio("layer")
        yield {
            "pass": kind,
            "dense ms": 1e3 * timings.spread("dense").median,
            "layer ms": 1e3 * seconds,
            "to dense": ratio.median,
            "low": ratio.low,
            "high": ratio.high,
            "to limit": over_limit(timings, "layer").median,
            "TFLOP/s": 1e-12 * passes * flops / seconds,
        }


def kernels(device: str, toy: bool) -> Iterator[Row]:
    """Number of kernels that eager passes launch."""
    for workload in TOY if toy else BLOCKS:
        pair = Beside(workload, device)
        for kind in ("forward", "step"):
            calls = pair.calls(kind)
            count = {name: launches(calls[name], device) for name in ("dense", "layer", "elementwise")}
            yield described(workload) | {"pass": kind} | count


def memory(device: str, toy: bool) -> Iterator[Row]:
    """Peak memory of a step, and bytes saved for its backward pass."""
    tokens = 32 if toy else 8192
    for workload, recompute in product(TOY if toy else BLOCKS, (False, True)):
        pair = Beside(replace(workload, rows=tokens), device, recompute=recompute)
        calls, peaks = pair.calls("step"), {}
        for name, module in (("dense", pair.dense), ("layer", pair.layer)):
            calls[name]()
            module.zero_grad()
            pair.x.grad = None
            peaks[f"{name} peak MiB"] = growth(calls[name], device) / MIB
        row = described(workload) | {"tokens": tokens, "recompute": "yes" if recompute else "no"} | peaks
        yield row | {"layer kept MiB": kept_bytes(pair.layer, pair.x) / MIB}
