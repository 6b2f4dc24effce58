"""Polysemanticity of experts over their number, compared with a random gate of the same sparsity.

Oldfield et al. (2024), expert specialization: with more experts, each responds to fewer classes. As fewer
images use each expert, polysemanticity falls for any gate, hence the comparison with a random gate.

Settings: single layers 320 → 10, CP of rank 64 (not matched in parameters), features of EfficientNet-Lite0,
Fashion-MNIST, at most 128 experts removed one by one, 5 seeds, means and 95 % intervals on test images; see
``docs/experiments/heads.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import colour_of, draw_line, new_figure, set_experts_axis
from paper_figures.experiments.tables import grouped, over_seeds, table

#: Column, label, style.
LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("polysemanticity", "trained gate", {"marker": "o", "color": colour_of("cp")}),
    ("polysemanticity_random", "random gate", {"marker": "s", "color": "#7F7F7F", "linestyle": "--"}),
)


def rows(quick: bool) -> list[Row]:
    """One row per number of experts."""
    single = table("heads").of(kind="single", format="cp", gate="entmax15", gate_norm="batch")
    records = []
    for n, seeds in sorted(grouped(single, "experts").items()):
        row = {"experts": n, "seeds": len(seeds)}
        for column in ("polysemanticity", "polysemanticity_random", "active", "dead", "accuracy"):
            row |= over_seeds(seeds, column)
        records.append(row)
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """Polysemanticity, and the fractions of experts used by an image and by none."""
    figure, axes = new_figure(2, height=2.8)
    for column, label, style in LINES:
        draw_line(axes[0], rows, "experts", column, label=label, markersize=3, **style)
    axes[0].set(ylabel="polysemanticity")
    axes[0].legend(frameon=False)
    for column, label, line in (("active", "used by an image", "o-"), ("dead", "used by none", "s:")):
        shares = [100 * row[column] for row in rows]
        places = [row["experts"] for row in rows]
        axes[1].plot(places, shares, line, color=colour_of("cp"), label=label, markersize=3)
    axes[1].set(ylabel="% of the experts")
    axes[1].legend(frameon=False)
    for ax in axes:
        set_experts_axis(ax, rows)
        ax.tick_params(axis="x", rotation=45)
    return figure
