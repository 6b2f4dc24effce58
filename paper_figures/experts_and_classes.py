"""Which classes of Tiny-ImageNet the experts of a head are active for: the mean coefficient of each pair.

Oldfield et al. (2024), expert specialization, for all experts at once.

Settings: CP with 128 experts, entmax15, seed 0; mean coefficients over the 50 test images of a class. The
experts and classes with the largest means are shown, in an order that puts large means on the diagonal;
other means below 0.01 are shown as zero. See ``docs/experiments/tiny-imagenet.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from mumoe_tensor.ledger import Row
from paper_figures.experiments.tables import TABLES

SHOWN, LEAST = 40, 0.01


def rows(quick: bool) -> list[Row]:
    """One row per pair of an expert and a class on the diagonal, then the other pairs of at least `LEAST`."""
    with np.load(TABLES / "tiny_imagenet_map.npz") as file:
        means, classes = file["coefficients"], file["classes"]  # (classes, experts)
    labels, experts = linear_sum_assignment(means, maximize=True)
    diagonal = sorted(zip(labels, experts, strict=True), key=lambda pair: -means[pair])[:SHOWN]
    others = product(*zip(*diagonal, strict=True))
    pairs = [*diagonal, *(pair for pair in others if pair not in diagonal and means[pair] >= LEAST)]
    return [
        {"expert": int(expert), "class": str(classes[label]), "coefficient": float(means[label, expert])}
        for label, expert in pairs
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """An image of the means."""
    experts, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("expert", "class"))
    values = np.zeros((len(experts), len(classes)))
    for row in rows:
        values[experts.index(row["expert"]), classes.index(row["class"])] = row["coefficient"]
    figure = Figure(figsize=(7.0, 6.2), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    ax.set_xticks(range(len(classes)), classes, rotation=90)
    ax.set_yticks(range(len(experts)), experts)
    ax.tick_params(labelsize=6, length=0)
    ax.set(xlabel="class", ylabel="expert")
    figure.colorbar(image, label="mean coefficient", shrink=0.6)
    return figure
