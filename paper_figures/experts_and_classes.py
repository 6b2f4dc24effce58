"""Which classes of Tiny-ImageNet the experts of a head are active for: the mean coefficient of each pair.

Oldfield et al. (2024), expert specialization, for all experts at once.

Settings: CP with 128 experts, entmax15, seed 0; mean coefficients over the 50 test images of a class. The
experts and classes with the largest means are shown, in an order that puts large means on the diagonal. See
``docs/experiments/tiny-imagenet.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from mumoe_tensor.ledger import Row
from paper_figures.experiments.tables import TABLES

SHOWN = 40


def rows(quick: bool) -> list[Row]:
    """One row a pair of an expert and a class that are shown."""
    with np.load(TABLES / "tiny_imagenet_map.npz") as file:
        means, classes = file["coefficients"], file["classes"]  # (classes, experts)
    labels, experts = linear_sum_assignment(means, maximize=True)
    order = np.argsort(-means[labels, experts])[:SHOWN]
    return [
        {"expert": int(expert), "class": str(classes[label]), "coefficient": float(means[label, expert])}
        for expert in experts[order]
        for label in labels[order]
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """An image of the means."""
    experts, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("expert", "class"))
    values = np.reshape([row["coefficient"] for row in rows], (len(experts), len(classes)))
    figure = Figure(figsize=(7.0, 6.2), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    ax.set_xticks(range(len(classes)), classes, rotation=90)
    ax.set_yticks(range(len(experts)), experts)
    ax.tick_params(labelsize=6, length=0)
    ax.set(xlabel="class", ylabel="expert")
    figure.colorbar(image, label="mean coefficient", shrink=0.6)
    return figure
