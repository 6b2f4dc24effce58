"""Load of experts: the fraction of images for which an expert has a coefficient of at least 0.5.

Oldfield et al. (2024), load of the experts.

Settings: single layers 320 → 10, CP of rank 64, 32 and 256 experts, entmax15 on batch-normed logits, features
of EfficientNet-Lite0, Fashion-MNIST, 10,000 test images, 5 seeds; see ``docs/experiments/heads.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import colour_of, draw_line, new_figure
from paper_figures.experiments.heads import LOOKED_AT
from paper_figures.experiments.tables import grouped, table


def rows(quick: bool) -> list[Row]:
    """One row per number of experts and rank by load."""
    groups = grouped(table("heads_load"), "experts", "place")
    records = []
    for n, place in sorted(groups):
        values = [row["load"] for row in groups[n, place]]
        ends = {"load_low": min(values), "load_high": max(values)}
        records.append({"experts": n, "place": place, "load": float(np.mean(values)), **ends})
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """Experts sorted by load: the mean over seeds, with the range over seeds as a band."""
    figure, axes = new_figure(len(LOOKED_AT), height=2.4)
    for ax, n in zip(axes, LOOKED_AT, strict=True):
        group = [row for row in rows if row["experts"] == n]
        draw_line(ax, group, "place", "load", 0.01, color=colour_of("cp"))
        ax.set(title=f"{n} experts", xlabel="experts, by load", ylabel="load, % of images", ylim=(0, None))
    return figure
