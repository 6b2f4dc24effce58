"""Error of trained linear layers over the share of singular values that is kept.

Oldfield et al. (2024), tolerance of linear layers to a truncated SVD: trained layers keep their accuracy
without many of their singular values, so experts of low rank may do. Here: the relative error of the weight.
The accuracy takes the models.

Settings: the expanding 1×1 convolutions of blocks 6, 7 and 8 of EfficientNet-Lite0, trained on ImageNet,
80 → 480. For comparison a matrix of that shape with normal entries, seed 0. The error is in the Frobenius
norm; its square is the share of the energy that is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from paper_figures.common import Row, new_figure, pretrained

BLOCKS = ("6", "7", "8")
STYLES = {"6": "-", "7": "--", "8": ":", "normal": "-"}


def rows(quick: bool) -> list[Row]:
    """One row a layer and number of singular values kept."""
    weights = dict(zip(BLOCKS, pretrained(), strict=True))
    weights["normal"] = np.random.default_rng(0).standard_normal(weights["6"].shape)
    found = []
    for layer, weight in weights.items():
        squares = np.linalg.svd(weight, compute_uv=False) ** 2
        count = len(squares)
        for kept in range(0, count + 1, count // 4 if quick else count // 20):
            energy = float(squares[:kept].sum() / squares.sum())
            found.append(
                {
                    "layer": layer,
                    "kept": kept,
                    "share_kept": kept / count,
                    "energy": energy,
                    "relative_error": float((squares[kept:].sum() / squares.sum()) ** 0.5),
                }
            )
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Relative error over the share kept, one line a layer."""
    figure, (ax,) = new_figure()
    for layer, style in STYLES.items():
        mine = [row for row in rows if str(row["layer"]) == layer]
        trained = layer != "normal"
        ax.plot(
            [100 * row["share_kept"] for row in mine],
            [row["relative_error"] for row in mine],
            linestyle=style,
            color="black" if trained else "0.65",
            label=f"trained, block {layer}" if trained else "normal entries",
        )
    ax.set(xlabel="singular values kept, %", ylabel="relative error", xlim=(0, 100), ylim=(0, 1.02))
    ax.legend(frameon=False, loc="lower left")
    return figure
