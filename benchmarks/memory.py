"""Memory of a training step: what is kept for the backward pass, and the peak in a fresh process."""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

import torch

from benchmarks.harness import Report
from benchmarks.layers import GPT2, Shape, step
from benchmarks.probes import in_a_fresh_process, kept_bytes
from mumoe_tensor.nn import MuMoEMLP
from mumoe_tensor.study.memory import growth
from mumoe_tensor.study.timing import compare

MIB = 2**20
ROWS = 1024
CASES = {
    "cp": Shape("GPT-2 block", ROWS, GPT2, (256,), "cp", (556,), "layer"),
    "tr": Shape("GPT-2 block", ROWS, GPT2, (256,), "tr", (4, 4, 149), "layer"),
}


def made(case: str, recompute: bool) -> Any:
    """The module of a case; "dense" is an MLP of the block's sizes."""
    torch.manual_seed(0)
    shape = CASES.get(case)
    if shape is None:
        first, hidden, last = GPT2
        return torch.nn.Sequential(
            torch.nn.Linear(first, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, last)
        )
    layer = shape.layer(recompute=recompute)
    assert isinstance(layer, MuMoEMLP)
    return layer


def peak_of_a_step(case: str, recompute: bool) -> int:
    """Bytes by which the resident set grows at most in a step, over the built model and its input."""
    module = made(case, recompute)
    x, gradient = torch.randn(ROWS, GPT2[0], requires_grad=True), torch.randn(ROWS, GPT2[-1])
    # The libraries' own buffers are there after a small step.
    module(x[:2]).sum().backward()
    module.zero_grad()
    x.grad = None
    return growth(lambda: module(x).backward(gradient))


def memory(quick: bool) -> Report:
    """Kept for the backward pass, and the peak of a step in fresh processes, against a dense MLP."""
    cases = [("dense", False), *((case, recompute) for case in CASES for recompute in (False, True))]
    x = torch.randn(ROWS, GPT2[0], requires_grad=True)
    peaks: dict[tuple[str, bool], list[int]] = {case: [] for case in cases}
    for _ in range(1 if quick else 5):
        for case in cases[: 2 if quick else None]:
            peaks[case].append(in_a_fresh_process("benchmarks.memory", *case))
    dense = peaks["dense", False]
    gradient = torch.randn(ROWS, GPT2[-1])
    times: dict[tuple[str, bool], float] = {}
    for case in () if quick else CASES:
        calls = {str(recompute): step(made(case, recompute), x, gradient) for recompute in (False, True)}
        times[case, True] = compare(calls, "False", limit=20.0).ratio("True").median
    rows = [
        {
            "module": case,
            "recompute": "yes" if recompute else "no",
            "kept MiB": kept_bytes(made(case, recompute), x) / MIB,
            "peak MiB": median(found) / MIB,
            "to dense": median(mine / theirs for mine, theirs in zip(found, dense, strict=True)),
            "step": times.get((case, recompute)),
        }
        for (case, recompute), found in peaks.items()
        if found
    ]
    columns = {"module": "", "recompute": "", "kept MiB": ".1f", "peak MiB": ".1f"}
    columns |= {"to dense": ".2f", "step": ".2f"}
    title = f"Memory of a step of the GPT-2 block, 256 experts, {ROWS:,} tokens, float32"
    notes = [
        "kept: for the backward pass, besides the parameters. peak: growth of the resident set in a step.",
        "step: time of a step over the same module's without recompute.",
    ]
    return Report("memory", title, columns, rows, notes)


if __name__ == "__main__":
    print(peak_of_a_step(*json.loads(sys.argv[1])))
