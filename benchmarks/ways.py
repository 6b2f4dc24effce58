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
    rows = [row_of(size, quick) for size in (SIZES[:1] if quick else SIZES)]
    columns = {"logits": ""} | dict.fromkeys(list(rows[0])[1:], ",.0f")
    title = "entmax15 of normal logits on a CPU, microseconds of CPU time, one thread"
    notes = [
        "chosen: the algorithm that the library uses for the size.",
        "few entries: left out if too many entries are above the bound, so that it does not apply.",
    ]
    return Report("ways", title, columns, rows, notes)


def row_of(size: tuple[int, int], quick: bool) -> Row:
    """The time of each algorithm in microseconds, None for those that do not apply."""
    torch.manual_seed(0)
    logits, gradient = torch.randn(size), torch.randn(size)
    p = entmax.coefficients_on_cpu(logits)
    calls: dict[str, Call] = {
        "softmax": lambda: logits.softmax(-1),
        "sorted": lambda: entmax._sorted(logits),
        "sorted by NumPy": lambda: entmax._by_numpy(logits.numpy()),
        "Newton": lambda: entmax._newton(logits),
        "few entries": lambda: entmax._of_few_entries(logits),
        "chosen": lambda: entmax.coefficients_on_cpu(logits),
        "backward, all entries": lambda: entmax.gradient(p, gradient),
        "backward, few entries": lambda: entmax._gradient_of_few_entries(p, gradient),
        "backward, chosen": lambda: entmax.gradient_on_cpu(p, gradient),
    }
    names = [*calls]
    calls = {name: call for name, call in calls.items() if call() is not None}  # None: not applicable
    with threads(1):
        timings = compare(calls, "softmax", **effort(quick, 41, 5.0), clock=thread_time)
    times = {x: 1e6 * timings.spread(x).median if x in calls else None for x in names}
    return {"logits": f"{size[0]} x {size[1]}"} | times
