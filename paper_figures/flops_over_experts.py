"""FLOPs of one input over the number of experts, for every format and for mixtures of dense experts.

Oldfield et al. (2024), cost of the forward pass: a factorized layer uses all experts for about what one dense
layer costs; a dense mixture pays for every expert; a sparse mixture for those it picks, and the gate.

Settings: as parameters_over_experts; the planned forward pass of one input, multiplications and additions
counted apart, the product of the gate counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

import mumoe_tensor as mt
from paper_figures.common import Row, draw_lines, new_figure
from paper_figures.parameters_over_experts import SIZES, ranks

TOP_K = 2


def rows(quick: bool) -> list[Row]:
    """One row a format and number of experts."""
    counts = [2**k for k in range(1, 21, 4 if quick else 1)]
    found: list[Row] = []
    for name, rank in ranks().items():
        for n in counts:
            cost = mt.cost(name, experts=n, rank=rank or None, gate=True, **SIZES)
            found.append({"name": name, "experts": n, "flops": cost.flops})
    one = 2 * 768 * 768
    for n in counts:
        gate = 2 * 768 * n
        found.append({"name": "dense moe", "experts": n, "flops": n * (one + 2 * 768) + gate})
        found.append({"name": "sparse moe", "experts": n, "flops": TOP_K * (one + 2 * 768) + gate})
        found.append({"name": "linear", "experts": n, "flops": one})
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """FLOPs over experts, both logarithmic."""
    figure, (ax,) = new_figure(height=2.9)
    draw_lines(ax, rows, "experts", "flops")
    ax.set(xscale="log", yscale="log", xlabel="experts N", ylabel="FLOPs of one input")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
