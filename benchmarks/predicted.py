"""Predicted and measured times of torch layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import mumoe_tensor as mt
from benchmarks.harness import Report, threads
from benchmarks.layers import WORKLOADS
from benchmarks.machine import calls, clock_of, machine_of
from mumoe_tensor.measure.passes import forward
from mumoe_tensor.measure.timing import compare

DTYPE = "float32"
#: Goal for the ratio of the longer to the shorter time.
GOAL_FACTOR = 1.5


def predicted(quick: bool, device: str) -> Report:
    """Forward pass of a layer with its gate: predicted and measured time on this machine."""
    with threads(1):  # so that CPU time can be used, which does not depend on other processes
        return _predicted(quick, device)


def _predicted(quick: bool, device: str) -> Report:
    rows: list[dict[str, Any]] = []
    for workload in [replace(WORKLOADS[0], rows=256)] if quick else WORKLOADS:
        torch.manual_seed(0)
        layer, spec = workload.layer(device=device), workload.spec
        x = torch.randn(workload.rows, spec.in_features, device=device)
        timings = compare(
            {"layer": forward(layer, x), **calls(device, DTYPE)}, "layer", rounds=3 if quick else 15,
            turn=2e-3 if quick else 2e-2,  # long enough that the layer's data is mostly in the caches
            limit=2.0 if quick else 20.0, device=device, clock=clock_of(device, 1),
        )  # fmt: skip
        machine = machine_of(timings, device, DTYPE)
        seconds = mt.cost(spec, gate=True, batch=workload.rows, machine=machine).seconds
        measured = timings.spread("layer")
        factor = max(seconds / measured.median, measured.median / seconds)
        rows.append(
            {
                "shape": workload.name,
                "experts": "x".join(map(str, spec.experts)),
                "format": spec.format.name,
                "GFLOP/s": machine.flops / 1e9,
                "GB/s": machine.bandwidth / 1e9,
                "predicted ms": 1e3 * seconds,
                "measured ms": 1e3 * measured.median,
                "low": 1e3 * measured.low,
                "high": 1e3 * measured.high,
                "factor": factor,
                "within": "yes" if factor <= GOAL_FACTOR else "NO",
            }
        )
    columns = dict.fromkeys(("shape", "experts", "format"), "") | {"GFLOP/s": ".0f", "GB/s": ".0f"}
    columns |= dict.fromkeys(("predicted ms", "measured ms", "low", "high"), ".1f")
    columns |= {"factor": ".2f", "within": ""}
    worst = max(row["factor"] for row in rows)
    notes = [
        "predicted: cost(spec, gate=True, machine=...).seconds, for the machine measured in the same rounds.",
        "On a CPU both are CPU time of one thread.",
        f"factor: the longer time over the shorter; worst {worst:.2f}, goal {GOAL_FACTOR}.",
    ]
    title = f"Predicted and measured forward pass, eager, {DTYPE}"
    return Report("predicted", title, columns, rows, notes)
