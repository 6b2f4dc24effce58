"""The images for which experts are most active: the first ten experts of 32 and of 256.

Oldfield et al. (2024), top-activating inputs. The experts are the first ten by index, not selected.

Settings: single layers 320 → 10, CP of rank 64, entmax15 on batch-normed logits, seed 0, features of
EfficientNet-Lite0; test images of Fashion-MNIST (MIT licence), most active first; see
``docs/experiments/heads.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import new_figure
from paper_figures.experiments.heads import LOOKED_AT
from paper_figures.experiments.tables import TABLES

KEPT = TABLES / "heads_top_inputs.npz"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def rows(quick: bool) -> list[Row]:
    """One row per image; fewer images if an expert has fewer coefficients above zero."""
    records = []
    with np.load(KEPT) as kept:
        for n in LOOKED_AT:
            for expert, (indices, labels) in enumerate(
                zip(kept[f"indices_{n}"].tolist(), kept[f"labels_{n}"].tolist(), strict=True)
            ):
                records += [
                    {"experts": n, "expert": expert, "place": place, "image": index, "label": CLASSES[label]}
                    for place, (index, label) in enumerate(zip(indices, labels, strict=True), 1)
                    if index >= 0
                ]
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """One row per expert: its images, and the number of classes that they show."""
    figure, axes = new_figure(len(LOOKED_AT), height=4.4)
    with np.load(KEPT) as kept:
        for ax, n in zip(axes, LOOKED_AT, strict=True):
            pixels = kept[f"images_{n}"]
            experts, places, height, width = pixels.shape
            ax.imshow(
                pixels.transpose(0, 2, 1, 3).reshape(experts * height, places * width), cmap="gray_r",
                aspect="equal",
            )  # fmt: skip
            for k in range(1, experts):
                ax.axhline(k * height - 0.5, color="#BBBBBB", linewidth=0.6)
            ax.set_yticks(height * (np.arange(experts) + 0.5), [str(k) for k in range(experts)])
            ax.set_xticks([])
            ax.tick_params(length=0)
            ax.set(title=f"{n} experts", ylabel="expert")
            for expert in range(experts):
                group = [row for row in rows if (row["experts"], row["expert"]) == (n, expert)]
                if not group:
                    ax.text(0, height * (expert + 0.5), "no image uses it", va="center")
    return figure
