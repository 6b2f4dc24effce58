"""Softmax and entmax15 gates with different norms: accuracy, sparsity, polysemanticity and balance.

Oldfield et al. (2024), ablation of the gate: entmax15 and softmax, with and without normalized logits.

Settings: single layers 320 → 10, CP of rank 64, 128 experts, features of EfficientNet-Lite0, Fashion-MNIST, 5
seeds, means and 95 % intervals on test images; see ``docs/experiments/heads.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import colour_of, draw_interval, legend_below, new_figure
from paper_figures.experiments.heads import GATE_AT
from paper_figures.experiments.tables import over_seeds, table

NORMS = ("none", "layer", "batch")
GATES = {"entmax15": (colour_of("cp"), "o", -0.12), "softmax": (colour_of("tr"), "s", 0.12)}
COLUMNS = ("accuracy", "active", "dead", "entropy", "polysemanticity", "polysemanticity_random")
#: Column, label, unit.
PANELS = (
    ("accuracy", "test accuracy, %", 0.01),
    ("active", "used by an image, %", 0.01),
    ("polysemanticity", "polysemanticity", 1),
    ("entropy", "entropy of use / log N", 1),
)


def rows(quick: bool) -> list[Row]:
    """One row per gate and norm."""
    records = []
    for gate in GATES:
        for norm in NORMS:
            group = table("heads").of(kind="single", experts=GATE_AT, gate=gate, gate_norm=norm)
            row = {"gate": gate, "gate_norm": norm, "seeds": len(group)}
            for column in COLUMNS:
                row |= over_seeds(group, column)
            records.append(row)
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """One panel per metric; hollow markers show the polysemanticity of a random gate."""
    figure, axes = new_figure(len(PANELS), height=2.6)
    for ax, (column, title, unit) in zip(axes, PANELS, strict=True):
        for row in rows:
            colour, marker, shift = GATES[row["gate"]]
            x = NORMS.index(row["gate_norm"]) + shift
            label = row["gate"] if row["gate_norm"] == NORMS[0] else None
            draw_interval(ax, x, row, column, unit, fmt=marker, color=colour, label=label)
            if column == "polysemanticity":
                ax.plot(
                    x, row[f"{column}_random"], marker, color=colour, markersize=4, markerfacecolor="none",
                    label=label and f"{label}, random gate",
                )  # fmt: skip
        ax.set_xticks(range(len(NORMS)), NORMS)
        ax.set(xlim=(-0.5, len(NORMS) - 0.5), xlabel="norm of the logits", title=title)
        ax.title.set_fontweight("normal")
        ax.title.set_fontsize(8)
    legend_below(figure, axes[2], 4)
    return figure
