"""Memory of a training step: saved for the backward pass, and the peak in a new process."""

from __future__ import annotations

from itertools import product
from statistics import median

import torch

from benchmarks.harness import MIB, Report, Row, effort
from benchmarks.layers import GPT2, gpt2_block
from benchmarks.probes import kept_bytes
from mumoe_tensor.measure.memory import growth, in_fresh_process
from mumoe_tensor.measure.passes import step
from mumoe_tensor.measure.timing import compare

ROWS = 1024
CASES = {
    "cp": gpt2_block("cp", (256,), (556,), ROWS),
    "tr": gpt2_block("tr", (256,), (4, 4, 149), ROWS),
}


def made(case: str, recompute: bool, device: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The module of a case, its input and a gradient of its output; "dense" is an MLP of its sizes."""
    torch.manual_seed(0)
    if case == "dense":
        module = gpt2_block("dense", (), (), ROWS).dense(GPT2.dense_parameters).to(device)
    else:
        module = CASES[case].layer(recompute=recompute, device=device)
    x = torch.randn(ROWS, GPT2.in_features, device=device, requires_grad=True)
    return module, x, torch.randn(ROWS, GPT2.out_features, device=device)


def peak_of_a_step(case: str, recompute: bool, device: str) -> int:
    """Peak growth of memory in a step, in bytes, on top of the model and its input."""
    module, x, gradient = made(case, recompute, device)
    # First make a small step, so that libraries allocate their buffers.
    module(x[:2]).sum().backward()
    module.zero_grad()
    x.grad = None
    return growth(lambda: module(x).backward(gradient), device)


def memory(quick: bool, device: str) -> Report:
    """Bytes saved for the backward pass, and the peak of a step in new processes, vs. a dense MLP."""
    cases = [("dense", False), *product(CASES, (False, True))][: 2 if quick else None]
    peaks: dict[tuple[str, bool], list[int]] = {case: [] for case in cases}
    for _ in range(1 if quick else 5):
        for key, of_case in peaks.items():
            of_case.append(in_fresh_process("benchmarks.memory:peak_of_a_step", *key, device))
    rows: list[Row] = []
    for (case, recompute), values in peaks.items():
        module, x, _ = made(case, recompute, device)
        ratios = (value / dense for value, dense in zip(values, peaks["dense", False], strict=True))
        row: Row = {"module": case, "recompute": "yes" if recompute else "no"}
        row |= {"kept MiB": kept_bytes(module, x) / MIB, "peak MiB": median(values) / MIB}
        row["to dense"] = median(ratios)
        if recompute:
            calls = {name: step(*made(case, name == "yes", device)) for name in ("no", "yes")}
            row["step"] = compare(calls, "no", **effort(quick), device=device).ratio("yes").median
        rows.append(row)
    columns = {"module": "", "recompute": "", "kept MiB": ".1f", "peak MiB": ".1f"}
    columns |= {"to dense": ".2f", "step": ".2f"}
    title = f"Memory of a step of the GPT-2 block, 256 experts, {ROWS:,} tokens, float32"
    notes = [
        "kept: saved for the backward pass, without parameters. peak: growth in a step of the resident set,",
        "or of the memory allocated on the device.",
        "step: time of a step over that of the same module without recompute.",
    ]
    return Report("memory", title, columns, rows, notes)
