"""Accuracy of heads against the number of experts, with the parameters of a dense MLP; one and two levels.

Oldfield et al. (2024), fine-tuned heads: expert layers are no worse than the matched linear layer.

Settings: blocks 320 → 512 → 10 on features of EfficientNet-Lite0, Fashion-MNIST, 169,482 parameters with gate
and biases, 5 seeds, means and 95 % intervals on test images; see ``docs/experiments/heads.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import (
    FORMATS,
    colour_of,
    draw_interval,
    draw_lines,
    legend_below,
    new_figure,
    set_experts_axis,
)
from paper_figures.experiments.tables import grouped, over_seeds, table


def rows(quick: bool) -> list[Row]:
    """One row per format and numbers of experts; the MLP first."""
    records = []
    matched = table("heads").of(kind="matched")
    for (name, modes), group in grouped(matched, "format", "experts").items():
        levels = [] if modes == "none" else [int(n) for n in str(modes).split("x")]
        row = {"name": "mlp" if name == "linear" else name, "levels": len(levels), "modes": str(modes)}
        row |= {"experts": prod(levels), "parameters": group[0]["parameters"], "seeds": len(group)}
        records.append(row | over_seeds(group, "accuracy"))
    order = ("mlp", *FORMATS)
    return sorted(records, key=lambda row: (order.index(row["name"]), row["levels"], row["experts"]))


def draw(rows: Sequence[Row]) -> Figure:
    """Accuracy against experts with one level; with two levels, points with intervals."""
    figure, axes = new_figure(2, height=3.0)
    scaled = [{**row, **{key: 100 * row[key] for key in row if key.startswith("accuracy")}} for row in rows]
    dense = scaled[0]
    one = [row for row in scaled if row["levels"] == 1]
    draw_lines(axes[0], one, "experts", "accuracy", marker="o", markersize=3)
    set_experts_axis(axes[0], one)
    axes[0].set_title("one level")
    names = sorted({row["name"] for row in scaled if row["levels"] == 2})
    others = [row for row in scaled if row["levels"] == 2 or (row["modes"] == "256" and row["name"] in names)]
    places = list(dict.fromkeys(row["modes"] for row in others))
    for row in others:
        place = places.index(row["modes"]) + (0.12 if names.index(row["name"]) else -0.12)
        draw_interval(axes[1], place, row, "accuracy", fmt="o", color=colour_of(row["name"]))
    axes[1].set_xticks(range(len(places)), [mode.replace("x", " × ") for mode in places])
    axes[1].set(xlim=(-0.5, len(places) - 0.5), xlabel="experts of the levels", title="levels")
    for ax in axes:
        ax.axhline(dense["accuracy"], color="black", linestyle="--", label="dense MLP")
        ax.axhspan(dense["accuracy_low"], dense["accuracy_high"], color="black", alpha=0.12, linewidth=0)
        ax.set_ylabel("test accuracy, %")
    lowest, highest = min(row["accuracy_low"] for row in scaled), max(row["accuracy_high"] for row in scaled)
    for ax in axes:
        ax.set_ylim(lowest - 0.2, highest + 0.2)
    legend_below(figure, axes[0], 5)
    return figure
