"""Layers at published sizes compared with dense layers: time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

import mumoe_tensor as mt
from benchmarks.devices import PRECISIONS, precision
from benchmarks.gpu import BRIEF
from benchmarks.harness import MIB, Row
from benchmarks.layers import WORKLOADS, Beside, Workload, beside_dense, gpt2_block
from benchmarks.probes import kept_bytes
from mumoe_tensor.measure.memory import growth
from mumoe_tensor.measure.passes import step
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.spec import LayerSpec

BLOCKS = (
    gpt2_block("cp", (256,), (556,)),
    gpt2_block("tr", (256,), (4, 4, 149)),
    gpt2_block("cp", (4096, 4096), (256,)),
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


def layers(device: str, toy: bool, runs: tuple[str, ...] = ("eager", "graph")) -> Iterator[Row]:
    """Times relative to the dense layer, and to the bare products."""
    workloads, counts = (TOY, (32,)) if toy else (BLOCKS, TOKENS)
    compiler = partial(torch.compile, backend="aot_eager") if toy else None
    for tokens, run, name, workload in product(counts, runs, reversed(PRECISIONS), workloads):
        if workload.gate_norm == "batch" and tokens < 2:
            continue
        workload = replace(workload, rows=tokens)
        place = workload.columns | {"tokens": tokens, "precision": name, "run": run}
        flops = mt.cost(workload.spec, gate=True, batch=tokens).flops
        torch._dynamo.reset()
        try:
            with precision(name) as dtype:
                pair = Beside(workload, device, dtype)
                for kind, factor in (("forward", 1), ("step", 3)):
                    calls = pair.calls(kind, run=run, compiler=compiler)
                    row = beside_dense(compare(calls, "dense", **BRIEF, device=device))
                    speed = 1e-9 * factor * flops / row["layer ms"]
                    yield place | {"pass": kind, **row, "TFLOP/s": speed}
        except torch.OutOfMemoryError:
            yield place | {"note": "out of memory"}


def memory(device: str, toy: bool) -> Iterator[Row]:
    """Peak memory of a step, and bytes saved for its backward pass."""
    tokens = 32 if toy else 8192
    for workload, recompute in product(TOY if toy else BLOCKS, (False, True)):
        pair = Beside(replace(workload, rows=tokens), device, recompute=recompute)
        row = workload.columns | {"tokens": tokens, "recompute": "yes" if recompute else "no"}
        for name, module in (("dense", pair.dense), ("layer", pair.layer)):
            call = step(module, pair.x, pair.gradient)
            call()
            module.zero_grad()
            pair.x.grad = None
            row[f"{name} peak MiB"] = growth(call, device) / MIB
        yield row | {"layer kept MiB": kept_bytes(pair.layer, pair.x) / MIB}
