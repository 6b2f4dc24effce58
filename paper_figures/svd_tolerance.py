"""Trained linear layers without their smallest singular values: error, accuracy and loss.

Oldfield et al. (2024), tolerance of linear layers to a truncated SVD: trained layers keep their accuracy
without many of their singular values, so experts of low rank may suffice.

Settings: the relative error in the weight, in the Frobenius norm, is shown for the expanding 1×1 convolutions
of blocks 6, 7 and 8 of EfficientNet-Lite0, trained on ImageNet, 80 → 480, and for a matrix of that shape with
normal entries, seed 0. Its square is the fraction of energy lost. Accuracy and loss are those of the
dense Mixer and GPT-2 of ``docs/experiments`` on validation rows, with all linear layers of their MLPs
truncated together; means and 95 % intervals over seeds. They are left out if their tables are missing, which
``python -m paper_figures.experiments.pretraining mixer svd`` (and ``gpt2 svd``) writes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import new_figure, pretrained
from paper_figures.experiments.tables import grouped, over_seeds, table

BLOCKS = ("6", "7", "8")
STYLES = {"6": "-", "7": "--", "8": ":", "normal": "-"}
#: Table of each network: the column to draw, its scale and its label.
NETWORKS = {
    "mixer": ("accuracy", 100, "validation accuracy, %"),
    "gpt2": ("loss", 1, "validation loss, nats"),
}
VALUES = ("value", "value_low", "value_high")
TITLES = {"mixer": "Mixer", "gpt2": "GPT-2"}


def rows(quick: bool) -> list[Row]:
    """One row per layer or network and number of singular values kept."""
    weights = dict(zip(BLOCKS, pretrained(), strict=True))
    weights["normal"] = np.random.default_rng(0).standard_normal(weights["6"].shape)
    records: list[Row] = []
    for layer, weight in weights.items():
        squares = np.linalg.svd(weight, compute_uv=False) ** 2
        count = len(squares)
        for kept in range(0, count + 1, count // 4 if quick else count // 20):
            energy = float(squares[:kept].sum() / squares.sum())
            error = float((squares[kept:].sum() / squares.sum()) ** 0.5)
            row = {"layer": layer, "kept": kept, "share_kept": kept / count, "energy": energy}
            records.append(row | {"relative_error": error} | dict.fromkeys(VALUES))
    for network, (column, unit, _) in NETWORKS.items():
        for share, group in sorted(grouped(table(f"{network}_svd"), "share").items()):
            figures = over_seeds(group, column)
            row = dict.fromkeys(records[0]) | {"layer": network, "share_kept": share}
            for name, end in zip(VALUES, ("", "_low", "_high"), strict=True):
                row[name] = unit * figures[f"{column}{end}"]
            records.append(row)
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """Relative error against the share kept, one line per layer; then accuracy and loss of the networks."""
    layers = grouped(rows, "layer")
    networks = [name for name in NETWORKS if name in layers]
    figure, axes = new_figure(1 + len(networks))
    ax = axes[0]
    for layer, style in STYLES.items():
        group = layers[layer]
        trained = layer != "normal"
        ax.plot(
            [100 * row["share_kept"] for row in group],
            [row["relative_error"] for row in group],
            linestyle=style,
            color="black" if trained else "0.65",
            label=f"trained, block {layer}" if trained else "normal entries",
        )
    ax.set(xlabel="singular values kept, %", ylabel="relative error", xlim=(0, 100), ylim=(0, 1.02))
    ax.legend(frameon=False, loc="upper right")
    for ax, network in zip(axes[1:], networks, strict=True):
        group = layers[network]
        shares = [100 * row["share_kept"] for row in group]
        ax.plot(shares, [row["value"] for row in group], color="black", marker="o", markersize=3)
        low, high = ([row[f"value_{end}"] for row in group] for end in ("low", "high"))
        ax.fill_between(shares, low, high, color="black", alpha=0.15, linewidth=0)
        ax.axhline(group[-1]["value"], color="0.65", linestyle="--", linewidth=0.8)
        ax.set(xlabel="singular values kept, %", ylabel=NETWORKS[network][2])
        ax.set(xlim=(0, 100), title=TITLES[network])
    return figure
