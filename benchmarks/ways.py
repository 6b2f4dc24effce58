"""The algorithms for entmax15 on a CPU, compared with each other and with softmax."""

from __future__ import annotations

from time import thread_time

import torch

from benchmarks.harness import Report, Row, effort, threads
from benchmarks.layers import Call
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn import entmax

#: Rows and experts of a call.
SIZES = ((32, 64), (128, 64), (1024, 64), (1024, 256), (256, 2048), (256, 4096))


def ways(quick: bool, device: str) -> Report:
    """entmax15 on a CPU: by sorting, by Newton steps, from few entries; forward and backward."""
    rows: list[Row] = []
    for size in SIZES[:1] if quick else SIZES:
        torch.manual_seed(0)
        logits, gradient = torch.randn(size), torch.randn(size)
        p = entmax.coefficients_on_cpu(logits)
        calls: dict[str, Call] = {
            "softmax": lambda z=logits: z.softmax(-1),
            "sorted": lambda z=logits: entmax._sorted(z),
            "sorted by NumPy": lambda z=logits: entmax._by_numpy(z.numpy()),
            "Newton": lambda z=logits: entmax._newton(z),
            "few entries": lambda z=logits: entmax._of_few_entries(z),
            "chosen": lambda z=logits: entmax.coefficients_on_cpu(z),
            "backward, all entries": lambda p=p, dp=gradient: entmax.gradient(p, dp),
            "backward, few entries": lambda p=p, dp=gradient: entmax._gradient_of_few_entries(p, dp),
            "backward, chosen": lambda p=p, dp=gradient: entmax.gradient_on_cpu(p, dp),
        }
        names = [*calls]
        calls = {name: call for name, call in calls.items() if call() is not None}  # None: not applicable
        with threads(1):
            timings = compare(calls, "softmax", **effort(quick, 41, 5.0), clock=thread_time)
        times = {x: 1e6 * timings.spread(x).median if x in calls else None for x in names}
        rows.append({"logits": f"{size[0]} x {size[1]}"} | times)
    columns = {"logits": ""} | dict.fromkeys(list(rows[0])[1:], ",.0f")
    title = "entmax15 of normal logits on a CPU, microseconds of CPU time, one thread"
    notes = [
        "chosen: the algorithm that the library uses for the size.",
        "few entries: left out if too many entries are above the bound, so that it does not apply.",
    ]
    return Report("ways", title, columns, rows, notes)
