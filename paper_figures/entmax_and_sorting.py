"""Time of entmax15 against the number of experts: as in the layers, with sorting, and softmax.

Not in the paper, whose gate is entmax15: the exact solution by Newton steps takes a few passes over a row,
while the standard algorithm sorts it.

Settings: 256 rows of normal logits in float32, forward and backward, one thread, not compiled. With sorting:
`entmax.entmax15` of the entmax package. Medians over rounds in one process, with quartiles as a band.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import entmax
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn import entmax15
from paper_figures.common import Row, new_figure, set_experts_axis, spread

ROWS = 256
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sort": entmax.entmax15,
    "newton": entmax15,
    "softmax": lambda logits: logits.softmax(-1),
}
STYLES: dict[str, dict[str, Any]] = {
    "sort": {"label": "entmax15, sort", "color": "black", "linestyle": "--"},
    "newton": {"label": "entmax15, Newton", "color": "black", "linestyle": "-"},
    "softmax": {"label": "softmax", "color": "0.6", "linestyle": ":"},
}


def measure(quick: bool) -> list[Row]:
    """One row per gate and number of experts."""
    records = []
    for experts in (64, 1024) if quick else (16, 64, 256, 1024, 4096, 16_384):
        torch.manual_seed(0)
        logits, gradient = torch.randn(ROWS, experts, requires_grad=True), torch.randn(ROWS, experts)
        calls = {name: partial(both, gate, logits, gradient) for name, gate in GATES.items()}
        times = compare(calls, "sort", rounds=3 if quick else 25, limit=0.5 if quick else 10)
        for name in GATES:
            row = {"name": name, "experts": experts, **spread("ms", times.spread(name), 1e-3)}
            records.append(row | spread("to_sort", times.ratio(name)))
    return records


def both(gate: Callable[[Tensor], Tensor], logits: Tensor, gradient: Tensor) -> object:
    """Forward and backward."""
    return torch.autograd.grad(gate(logits), logits, gradient)


def draw(rows: Sequence[Row]) -> Figure:
    """Milliseconds against experts, with logarithmic axes."""
    figure, (ax,) = new_figure()
    for name, style in STYLES.items():
        group = [row for row in rows if row["name"] == name]
        places = [row["experts"] for row in group]
        ax.plot(places, [row["ms"] for row in group], marker="o", markersize=3, **style)
        low, high = ([row[column] for row in group] for column in ("ms_low", "ms_high"))
        ax.fill_between(places, low, high, color=style["color"], alpha=0.2, linewidth=0)
    ax.set_yscale("log")
    set_experts_axis(ax, rows)
    ax.set_ylabel("forward and backward, ms")
    ax.legend(frameon=False)
    return figure
