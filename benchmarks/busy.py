"""Slowdown of layers while other processes keep the cores busy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.harness import Report
from benchmarks.layers import WORKLOADS, Beside, entmax15
from mumoe_tensor.measure.passes import forward, step
from mumoe_tensor.measure.timing import compare


@contextmanager
def company() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that compute endlessly, one for each core but one; initially stopped."""
    count = max(1, (os.cpu_count() or 2) - 1)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        for other in others:
            other.send_signal(signal.SIGSTOP)
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def busy(quick: bool, device: str) -> Report:
    """Times with all cores but one busy, relative to an idle machine."""
    beside = Beside(replace(WORKLOADS[0], rows=32) if quick else WORKLOADS[0], device)
    logits = torch.randn((32, 256) if quick else (256, 4096), device=device)
    calls = {
        "dense MLP, forward": forward(beside.dense, beside.x),
        "dense MLP, step": step(beside.dense, beside.x, beside.gradient),
        "GPT-2 block, forward": forward(beside.layer, beside.x),
        "GPT-2 block, step": step(beside.layer, beside.x, beside.gradient),
        f"entmax15 of {logits.shape[0]} x {logits.shape[1]}": forward(entmax15, logits),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in calls}
    with company() as others:
        for _ in range(1 if quick else 5):
            for state, asked in (("idle", signal.SIGSTOP), ("busy", signal.SIGCONT)):
                for other in others:
                    other.send_signal(asked)
                timings = compare(
                    calls,
                    "dense MLP, forward",
                    rounds=3 if quick else 5,
                    limit=1.0 if quick else 20.0,
                    device=device,
                )
                for name, values in timings.seconds.items():
                    seconds[name][state] += values
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        idle, beside_others = (1e3 * median(times[state]) for state in ("idle", "busy"))
        rows.append({"call": name, "idle ms": idle, "busy ms": beside_others, "slower": beside_others / idle})
    for row in rows:
        dense = rows[1 if row["call"].endswith("step") else 0]
        row["over the dense MLP's"] = row["slower"] / dense["slower"]
    columns = {"call": "", "idle ms": ".1f", "busy ms": ".1f"}
    columns |= {"slower": ".2f", "over the dense MLP's": ".2f"}
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    waiting = ", ".join(f"{name}: {os.environ.get(name, 'not set')}" for name in names)
    notes = [f"{waiting}. Other processes: {len(others)}, each with one thread."]
    return Report("busy", "Times with other busy processes", columns, rows, notes)
