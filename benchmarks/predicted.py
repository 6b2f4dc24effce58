"""Predicted and measured times of torch layers."""

from __future__ import annotations

from dataclasses import replace

import torch

import mumoe_tensor as mt
from benchmarks.harness import Report, Row, effort, quartiles, threads
from benchmarks.layers import WORKLOADS
from benchmarks.machine import calls, clock_of, machine_of
from mumoe_tensor.measure.passes import forward
from mumoe_tensor.measure.timing import compare

DTYPE = "float32"


def predicted(quick: bool, device: str) -> Report:
    """Forward pass of a layer with its gate: predicted and measured time on this machine."""
    rows: list[Row] = []
    for workload in [replace(WORKLOADS[0], rows=256)] if quick else WORKLOADS:
        torch.manual_seed(0)
        layer, spec = workload.layer(device=device), workload.spec
        x = torch.randn(workload.rows, spec.in_features, device=device)
        with threads(1):  # so that CPU time can be used, which does not depend on other processes
            timings = compare(
                {"layer": forward(layer, x), **calls(device, DTYPE)}, "layer", **effort(quick),
                turn=2e-3 if quick else 2e-2,  # long enough that the layer's data is mostly in the caches
                device=device, clock=clock_of(device, 1),
            )  # fmt: skip
        machine, measured = machine_of(timings, device, DTYPE), timings.spread("layer")
        seconds = mt.cost(spec, gate=True, batch=workload.rows, machine=machine).seconds
        row = workload.columns | {"GFLOP/s": machine.flops / 1e9, "GB/s": machine.bandwidth / 1e9}
        row |= {"predicted ms": 1e3 * seconds, **quartiles(measured, "measured ms", scale=1e3)}
        rows.append(row | {"factor": max(seconds / measured.median, measured.median / seconds)})
    columns = dict.fromkeys(("shape", "experts", "format"), "") | {"GFLOP/s": ".0f", "GB/s": ".0f"}
    columns |= dict.fromkeys(("predicted ms", "measured ms", "low", "high"), ".1f") | {"factor": ".2f"}
    notes = [
        "predicted: cost(spec, gate=True, machine=...).seconds, for the machine measured in the same rounds.",
        "On a CPU both are CPU time of one thread.",
        f"factor: the longer time over the shorter; worst {max(row['factor'] for row in rows):.2f}.",
    ]
    title = f"Predicted and measured forward pass, eager, {DTYPE}"
    return Report("predicted", title, columns, rows, notes)
