"""FLOPs of the forward pass: planned, and with the weight tensor formed first.

Oldfield et al. (2024), the fast forward pass: never forming the weight tensor saves orders of magnitude.

Settings: 512 experts, 768 → 768 with biases, one input. Ranks as in parameters_over_experts. 'Naive' forms
the weight tensor in the cheapest order and contracts it with the coefficients and the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

import mumoe_tensor as mt
from mumoe_tensor.ledger import Row
from paper_figures.common import colour_of, matched_layers, new_figure, title_of

EXPERTS = 512


def rows(quick: bool) -> list[Row]:
    """One row per format."""
    rows = []
    for name, layer in matched_layers().items():
        layer = replace(layer, experts=(EXPERTS,))
        naive = mt.plan(layer, implementation="reconstructed").flops
        planned = mt.plan(layer, implementation="factorized").flops
        rows.append({"name": name, "naive": naive, "planned": planned, "ratio": naive / planned})
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """Two bars per format, the naive one pale, with their ratio."""
    figure, (ax,) = new_figure(height=2.6)
    for place, row in enumerate(rows):
        colour = colour_of(row["name"])
        ax.barh(place - 0.2, row["naive"], 0.36, color=colour, alpha=0.35)
        ax.barh(place + 0.2, row["planned"], 0.36, color=colour)
        ax.annotate(
            f"{row['ratio']:,.0f} times", (row["naive"], place - 0.2), xytext=(4, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [title_of(row["name"]) for row in rows])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="FLOPs of one input (pale: naive)")
    ax.set_xlim(1e5, 1000 * max(row["naive"] for row in rows))
    ax.tick_params(axis="y", length=0)
    return figure
