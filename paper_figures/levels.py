"""Cost of one to four levels at equal numbers of experts.

Oldfield et al. (2024), hierarchical μMoEs: with more levels, smaller gates select among as many experts.

Settings: 768 → 768 with biases, CP of rank 384, 4,096 to 16,777,216 experts in equal levels; parameters of
factors and gate, and FLOPs per input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

import mumoe_tensor as mt
from mumoe_tensor.ledger import Row
from paper_figures.common import colour_of, new_figure

TOTALS = (2**12, 2**24)
LAYER = mt.LayerSpec("cp", experts=(), in_features=768, out_features=768, rank=384, bias=True)


def rows(quick: bool) -> list[Row]:
    """One row per total number of experts and number of levels."""
    records = []
    for total in TOTALS[:1] if quick else TOTALS:
        for levels in (1, 2, 3, 4):
            experts = (round(total ** (1 / levels)),) * levels
            cost = mt.cost(replace(LAYER, experts=experts), gate=True)
            records.append(
                {
                    "experts": total,
                    "levels": levels,
                    "modes": "x".join(map(str, experts)),
                    "parameters": cost.parameters,
                    "gate_parameters": cost.gate_parameters,
                    "flops": cost.flops,
                }
            )
    return records


def power(row: Row) -> str:
    """The levels as a power, e.g. $64^2$."""
    size = int(row["modes"].split("x")[0])
    return f"${size}^{row['levels']}$" if row["levels"] > 1 else f"{size}"


def draw(rows: Sequence[Row]) -> Figure:
    """Parameters by number of levels, with the gate's part pale and the linear layer as a line."""
    totals = sorted({row["experts"] for row in rows})
    figure, axes = new_figure(2, height=2.5)
    for ax, total in zip(axes, totals, strict=False):
        group = [row for row in rows if row["experts"] == total]
        places = range(len(group))
        experts = [row["parameters"] - row["gate_parameters"] for row in group]
        ax.bar(
            places, [row["parameters"] for row in group], 0.6, color=colour_of("cp"), alpha=0.35, label="gate"
        )
        ax.bar(places, experts, 0.6, color=colour_of("cp"), label="factors")
        ax.axhline(LAYER.dense_parameters, color="black", linestyle="--", label="linear layer")
        ax.set_xticks(places, [power(row) for row in group])
        ax.set(yscale="log", title=f"{total:,} experts", xlabel="experts of the levels", ylabel="parameters")
        ax.set_ylim(1e5, 10 * max(row["parameters"] for row in group))
    for ax in axes[len(totals) :]:
        ax.remove()
    axes[0].legend(frameon=False, loc="upper right")
    return figure
