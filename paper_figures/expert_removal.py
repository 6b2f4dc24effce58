"""Change in the accuracy of each class when an expert is removed, for 32 and 256 experts.

Oldfield et al. (2024), intervention on experts: the coefficient of one expert is set to zero, without
renormalization, and the accuracy of each class is compared with that of the intact model.

Settings: single layers 320 → 10, CP of rank 64, entmax15 on batch-normed logits, seed 0, features of
EfficientNet-Lite0, Fashion-MNIST, 6,000 validation images; all experts that change an accuracy, sorted by the
class they change most; see ``docs/experiments/heads.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import new_figure
from paper_figures.experiments.heads import LOOKED_AT
from paper_figures.experiments.removal import TABLE
from paper_figures.experiments.tables import grouped, table
from paper_figures.top_inputs import CLASSES


def rows(quick: bool) -> list[Row]:
    """One row per expert: the change of every class in points."""
    return [
        {"experts": n, "expert": expert} | {CLASSES[row["label"]]: 100 * row["change"] for row in group}
        for (n, expert), group in grouped(table(TABLE), "experts", "expert").items()
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """A column per class and a line per expert: red where the class is worse without the expert."""
    figure, axes = new_figure(len(LOOKED_AT), height=3.6)
    tables = []
    for n in LOOKED_AT:
        changes = np.array([[row[name] for name in CLASSES] for row in rows if row["experts"] == n])
        changes = changes[np.abs(changes).any(1)]
        most = np.abs(changes).argmax(1)
        tables.append(changes[np.lexsort((-np.abs(changes).max(1), most))])
    # (Logarithmic beyond one point, as there are a few large and many small changes.)
    end = max(np.abs(changes).max() for changes in tables)
    norm = SymLogNorm(linthresh=1, vmin=-end, vmax=end)
    for ax, n, changes in zip(axes, LOOKED_AT, tables, strict=True):
        drawn = ax.imshow(changes, aspect="auto", cmap="RdBu", norm=norm, interpolation="nearest")
        for k in range(1, len(CLASSES)):
            ax.axvline(k - 0.5, color="#DDDDDD", linewidth=0.4)
        ax.set_xticks(range(len(CLASSES)), CLASSES, rotation=90)
        ax.set_yticks([])
        ax.tick_params(length=0)
        ax.set(title=f"{len(changes)} of {n} experts", ylabel="experts, by the class they change most")
    ticks = [-30, -10, -3, -1, 0, 1, 3, 10, 30]
    bar = figure.colorbar(drawn, ax=axes, aspect=40, ticks=ticks, format="%d")
    bar.ax.minorticks_off()
    bar.ax.axhline(0, color="black", linewidth=0.6)
    bar.ax.set_title("points")
    return figure
