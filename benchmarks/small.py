"""Small layers on a CPU: times relative to a dense layer, and to the same operations written by hand."""

from __future__ import annotations

from time import perf_counter, thread_time
from typing import Any

import torch

from benchmarks.harness import Report, threads
from benchmarks.layers import WORKLOADS, Beside, Workload, by_hand
from mumoe_tensor.measure.passes import forward
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.spec import LayerSpec


def layer(size: int, experts: int, rows: int) -> Workload:
    """A square CP layer with a dense layer's parameters."""
    spec = LayerSpec("cp", experts=experts, in_features=size, out_features=size, bias=True)
    return Workload(f"{size} -> {size}", spec.fitted(), rows)


#: Layers, how they run, number of threads, and goals: time relative to the dense layer; extra microseconds
#: over hand-written operations.
CASES = (
    (layer(256, 64, 32), "eager", 1, 4.2, None),
    (layer(256, 64, 32), "compiled", 1, 3.0, None),
    (layer(256, 64, 1024), "eager", 1, 1.5, None),
    (layer(256, 64, 1024), "eager", 2, 1.8, None),
    (layer(64, 16, 32), "eager", 1, None, 60.0),
    (WORKLOADS[-1], "eager", 2, 1.25, None),
)


def small(quick: bool, device: str) -> Report:
    """Forward passes of small layers in evaluation mode, vs. dense layers and hand-written operations."""
    rows: list[dict[str, Any]] = []
    for workload, run, count, most, excess in CASES[:1] if quick else CASES:
        beside = Beside(workload, device)
        module = beside.layer.eval()
        hand = by_hand(module)
        torch._dynamo.reset()
        compiled = torch.compile(module) if run == "compiled" else module
        calls = {"dense": beside.dense, "layer": compiled, "by hand": hand}
        with threads(count):
            timings = compare(
                {name: forward(call, beside.x) for name, call in calls.items()},
                "dense",
                rounds=3 if quick else 101,
                limit=1.0 if quick else 10.0,
                device=device,
                clock=thread_time if count == 1 else perf_counter,
            )
        more = [a - b for a, b in zip(timings.seconds["layer"], timings.seconds["by hand"], strict=True)]
        rows.append(
            {
                "shape": workload.name,
                "experts": "x".join(map(str, workload.spec.experts)),
                "rows": workload.rows,
                "run": run,
                "threads": count,
                "dense us": 1e6 * timings.spread("dense").median,
                "layer us": 1e6 * timings.spread("layer").median,
                "to dense": timings.ratio("layer").median,
                "goal": most,
                "more than by hand us": 1e6 * sorted(more)[len(more) // 2],
                "goal us": excess,
            }
        )
    columns = {"shape": "", "experts": "", "rows": ",d", "run": "", "threads": "d"}
    columns |= {"dense us": ".0f", "layer us": ".0f", "to dense": ".2f", "goal": ".2f"}
    columns |= {"more than by hand us": ".0f", "goal us": ".0f"}
    notes = [
        "by hand: eager torch operations without modules and checks, with the entmax15 of the library.",
        "Times on one thread are CPU times: waiting for other processes does not count.",
    ]
    return Report("small", "Small CP layers, forward pass in evaluation mode", columns, rows, notes)
