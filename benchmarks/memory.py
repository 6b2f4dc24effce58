"""Memory of a training step: saved for the backward pass, and the peak in a new process."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from benchmarks.harness import Report
from benchmarks.layers import GPT2, gpt2_block
from benchmarks.probes import kept_bytes
from mumoe_tensor.measure.memory import growth, in_fresh_process
from mumoe_tensor.measure.passes import step
from mumoe_tensor.measure.timing import compare

MIB = 2**20
ROWS = 1024
CASES = {
    "cp": gpt2_block("cp", 256, 556, ROWS),
    "tr": gpt2_block("tr", 256, (4, 4, 149), ROWS),
}


def made(case: str, recompute: bool, device: str) -> Any:
    """The module of a case; "dense" is an MLP of the block's sizes."""
    torch.manual_seed(0)
    if case in CASES:
        return CASES[case].layer(recompute=recompute, device=device)
    return gpt2_block("dense", (), (), ROWS).dense(GPT2.dense_parameters).to(device)


def tensors(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An input, and a gradient of the output."""
    x = torch.randn(ROWS, GPT2.in_features, device=device, requires_grad=True)
    return x, torch.randn(ROWS, GPT2.out_features, device=device)


def peak_of_a_step(case: str, recompute: bool, device: str) -> int:
    """Peak growth of memory in a step, in bytes, on top of the model and its input."""
    module = made(case, recompute, device)
    x, gradient = tensors(device)
    # First make a small step, so that libraries allocate their buffers.
    module(x[:2]).sum().backward()
    module.zero_grad()
    x.grad = None
    return growth(lambda: module(x).backward(gradient), device)


def memory(quick: bool, device: str) -> Report:
    """Bytes saved for the backward pass, and the peak of a step in new processes, vs. a dense MLP."""
    cases = [("dense", False), *((case, recompute) for case in CASES for recompute in (False, True))]
    x, gradient = tensors(device)
    peaks: dict[tuple[str, bool], list[int]] = {case: [] for case in cases}
    for _ in range(1 if quick else 5):
        for case in cases[: 2 if quick else None]:
            peaks[case].append(in_fresh_process("benchmarks.memory:peak_of_a_step", *case, device))
    dense = peaks["dense", False]
    times: dict[tuple[str, bool], float] = {}
    for case in () if quick else CASES:
        calls = {
            str(recompute): step(made(case, recompute, device), x, gradient) for recompute in (False, True)
        }
        times[case, True] = compare(calls, "False", limit=20.0, device=device).ratio("True").median
    rows = [
        {
            "module": case,
            "recompute": "yes" if recompute else "no",
            "kept MiB": kept_bytes(made(case, recompute, device), x) / MIB,
            "peak MiB": median(values) / MIB,
            "to dense": median(value / reference for value, reference in zip(values, dense, strict=True)),
            "step": times.get((case, recompute)),
        }
        for (case, recompute), values in peaks.items()
        if values
    ]
    columns = {"module": "", "recompute": "", "kept MiB": ".1f", "peak MiB": ".1f"}
    columns |= {"to dense": ".2f", "step": ".2f"}
    title = f"Memory of a step of the GPT-2 block, 256 experts, {ROWS:,} tokens, float32"
    notes = [
        "kept: saved for the backward pass, without parameters. peak: growth in a step of the resident set,",
        "or of the memory allocated on the device.",
        "step: time of a step over that of the same module without recompute.",
    ]
    return Report("memory", title, columns, rows, notes)
