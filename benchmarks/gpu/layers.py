"""Layers in published places beside dense ones: time, kernels launched, memory."""

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
from benchmarks.layers import GPT2, SHAPES, Beside, Shape, over_limit
from benchmarks.probes import kept_bytes
from mumoe_tensor.study.memory import growth
from mumoe_tensor.study.timing import compare

BLOCKS = (
    *(s for s in SHAPES if s.name == "GPT-2 block" and s.experts == (256,) and s.format in ("cp", "tr")),
    Shape("GPT-2 block", 1024, GPT2, (4096, 4096), "cp", (256,), "layer"),
    *(s for s in SHAPES if s.name == "Mixer channel block"),
    Shape("Mixer token block", 512, (196, 256, 196), (64,), "cp", None),
    *(s for s in SHAPES if s.name == "CLIP head"),
)
TOY = (Shape("toy block", 32, (8, 16, 8), (4, 4), "cp", (3,), "layer"),)
TOKENS = (1024, 1, 65_536, 8192)


def beside(shape: Shape, tokens: int, device: str, dtype: torch.dtype = torch.float32) -> Beside:
    """A layer and a dense one for so many tokens."""
    return Beside(replace(shape, rows=tokens), tokens, device, dtype)


def described(shape: Shape) -> Row:
    """The columns that tell shapes apart."""
    return {"shape": shape.name, "experts": "x".join(map(str, shape.experts)), "format": shape.format}


def flops_of(layer: Any, tokens: int) -> int:
    """FLOPs of a forward pass, the gate's product included."""
    sizes = ("format", "experts", "in_features", "out_features", "hidden", "rank", "bias")
    config = {name: value for name, value in layer.config.items() if name in sizes}
    return mt.cost(**config, gate=True, batch=tokens).flops


def layers(device: str, toy: bool, runs: tuple[str, ...] = ("eager", "graph")) -> Iterator[Row]:
    """Times over the dense layer's, and over those of the bare products."""
    shapes, counts = (TOY, (32,)) if toy else (BLOCKS, TOKENS)
    for tokens, run, name, shape in product(counts, runs, reversed(PRECISIONS), shapes):
        if shape.gate_norm == "batch" and tokens < 2:
            continue
        place = described(shape) | {"tokens": tokens, "precision": name, "run": run}
        compiler = partial(torch.compile, backend="aot_eager") if toy else torch.compile
        torch._dynamo.reset()
        try:
            with precision(name) as dtype:
                for row in times(beside(shape, tokens, device, dtype), run, compiler):
                    yield place | row
        except torch.OutOfMemoryError:
            yield place | {"note": "out of memory"}


def times(pair: Beside, run: str, compiler: Callable[[Any], Any]) -> Iterator[Row]:
    """Those of a forward pass, and of a step."""
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
            "TFLOP/s": 1e-12 * passes * flops_of(pair.layer, pair.rows) / seconds,
        }


def kernels(device: str, toy: bool) -> Iterator[Row]:
    """Kernels that eager passes launch."""
    for shape in TOY if toy else BLOCKS:
        pair = beside(shape, shape.rows, device)
        for kind in ("forward", "step"):
            calls = pair.calls(kind)
            count = {name: launches(calls[name], device) for name in ("dense", "layer", "elementwise")}
            yield described(shape) | {"pass": kind} | count


def memory(device: str, toy: bool) -> Iterator[Row]:
    """Peak memory of a step, and what is kept for its backward pass."""
    tokens = 32 if toy else 8192
    for shape, recompute in product(TOY if toy else BLOCKS, (False, True)):
        pair = beside(replace(shape, options={"recompute": recompute}), tokens, device)
        calls, peaks = pair.calls("step"), {}
        for name, module in (("dense", pair.dense), ("layer", pair.layer)):
            calls[name]()
            module.zero_grad()
            pair.x.grad = None
            peaks[f"{name} peak MiB"] = growth(calls[name], device) / MIB
        row = described(shape) | {"tokens": tokens, "recompute": "yes" if recompute else "no"} | peaks
        yield row | {"layer kept MiB": kept_bytes(pair.layer, pair.x) / MIB}
