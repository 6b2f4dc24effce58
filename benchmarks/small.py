"""Small layers on a CPU: times relative to a dense layer, and to the same operations written by hand."""

from __future__ import annotations

from statistics import median
from time import perf_counter, thread_time

import torch

from benchmarks.harness import Report, Row, effort, threads, times
from benchmarks.layers import WORKLOADS, Beside, Workload, by_hand, passes
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.spec import LayerSpec


def layer(size: int, experts: int, rows: int) -> Workload:
    """A square CP layer with as many parameters as a dense layer."""
    spec = LayerSpec("cp", experts=experts, in_features=size, out_features=size, bias=True)
    return Workload(f"{size} -> {size}", spec.fitted(), rows)


#: Layers, how they run, and the number of threads.
CASES = (
    (layer(256, 64, 32), "eager", 1),
    (layer(256, 64, 32), "compiled", 1),
    (layer(256, 64, 1024), "eager", 1),
    (layer(256, 64, 1024), "eager", 2),
    (layer(64, 16, 32), "eager", 1),
    (WORKLOADS[-1], "eager", 2),
)


def small(quick: bool, device: str) -> Report:
    """Forward passes of small layers in evaluation mode, vs. dense layers and hand-written operations."""
    rows: list[Row] = []
    for workload, run, count in CASES[:1] if quick else CASES:
        beside = Beside(workload, device)
        module = beside.layer.eval()
        torch._dynamo.reset()
        modules = {"dense": beside.dense, "by hand": by_hand(module)}
        modules["layer"] = torch.compile(module) if run == "compiled" else module
        calls = passes("forward", modules, beside.x, beside.gradient)
        clock = thread_time if count == 1 else perf_counter
        with threads(count):
            timings = compare(calls, "dense", **effort(quick, 101, 10.0), device=device, clock=clock)
        pairs = zip(timings.seconds["layer"], timings.seconds["by hand"], strict=True)
        row = workload.columns | {"rows": workload.rows, "run": run, "threads": count}
        row |= times(timings, ("dense", "layer"), "us") | {"to dense": timings.ratio("layer").median}
        rows.append(row | {"more than by hand us": 1e6 * median(a - b for a, b in pairs)})
    columns = dict.fromkeys(("shape", "experts", "format"), "") | {"rows": ",d", "run": "", "threads": "d"}
    columns |= {"dense us": ".0f", "layer us": ".0f", "to dense": ".2f", "more than by hand us": ".0f"}
    notes = [
        "by hand: eager torch operations without modules and checks, with the entmax15 of the library.",
        "Times on one thread are CPU times: waiting for other processes does not count.",
    ]
    return Report("small", "Small CP layers, forward pass in evaluation mode", columns, rows, notes)
