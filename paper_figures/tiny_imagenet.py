"""Heads on Tiny-ImageNet-200: accuracy and polysemanticity over the number of experts.

Oldfield et al. (2024), expert specialization and fine-tuned heads, with 200 classes.

Settings: layers 352 → 200 on features of EfficientNet-Lite2, means over seeds and 95 % intervals on test
images. Left and centre: heads with the parameters of the linear layer (70,600), Hadamard with more; the
dashed line is the linear layer. Right: CP with one level, with a trained gate and with null gates. See
``docs/experiments/tiny-imagenet.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from mumoe_tensor.study.plots import colour, look
from paper_figures.common import draw_line, legend_below, new_figure, set_experts_axis
from paper_figures.experiments.tables import grouped, over_seeds, table
from paper_figures.experiments.tiny_imagenet import LINEAR, NULLS

LABELS = {
    "cp": "CP", "tr": "Tensor Ring", "btt": "BTT", "hadamard": "Hadamard",
    "shared low rank + cp": "shared low rank + CP",
}  # fmt: skip
#: Lines of the right panel: label and style.
GATES = {
    "entmax15": ("trained gate", "-"),
    "dealt": ("dealt at random", "--"),
    NULLS[0]: ("random experts", ":"),
    NULLS[1]: ("nearest centres", "-."),
}


def rows(quick: bool) -> list[Row]:
    """One row a format, experts and gate at the parameters of the linear layer; that of the layer first."""
    records = []
    kept = [row | {"experts": str(row["experts"])} for row in table("tiny_imagenet").of(budget=LINEAR)]
    for (name, modes, gate, norm), group in grouped(kept, "format", "experts", "gate", "gate_norm").items():
        if norm != ("none" if gate in NULLS else "batch") or gate not in GATES:
            continue
        levels = [] if modes == "none" else [int(n) for n in modes.split("x")]
        row = {
            "name": name, "gate": gate, "levels": len(levels), "experts": prod(levels), "modes": modes,
            "parameters": group[0]["parameters"], "seeds": len(group), **over_seeds(group, "accuracy"),
        }  # fmt: skip
        for column in ("polysemanticity", "polysemanticity_random"):
            if group[0][column] is None:
                row |= dict.fromkeys((column, f"{column}_low", f"{column}_high"))
            else:
                row |= over_seeds(group, column)
        records.append(row)
    return sorted(records, key=lambda row: row["levels"])


def draw(rows: Sequence[Row]) -> Figure:
    """Accuracy with one level and with two, and polysemanticity."""
    figure, axes = new_figure(3, height=3.2)
    (dense,) = (row for row in rows if not row["levels"])
    for levels, ax in zip((1, 2), axes[:2], strict=True):
        here = [row for row in rows if row["levels"] == levels and row["gate"] == "entmax15"]
        for name, group in grouped(here, "name").items():
            points = sorted(group, key=lambda row: row["experts"])
            shade, shape, _ = look(name)
            style = {"color": shade, "marker": shape, "markersize": 3, "label": LABELS[name]}
            draw_line(ax, points, "experts", "accuracy", 0.01, **style)
        ax.axhline(100 * dense["accuracy"], color="black", linestyle="--", label="linear layer")
        set_experts_axis(ax, here)
        ax.set(title="one level" if levels == 1 else "two levels", ylabel="test accuracy, %")
        if levels == 2:
            ticks = {row["experts"]: row["modes"].replace("x", "×") for row in here}
            ax.set_xticks([*ticks], [*ticks.values()])
    low = min(ax.get_ylim()[0] for ax in axes[:2])
    high = max(ax.get_ylim()[1] for ax in axes[:2])
    for ax in axes[:2]:
        ax.set_ylim(low, high)
    axes[1].set_ylabel("")
    single = [row for row in rows if row["levels"] == 1 and row["name"] == "cp"]
    for gate, (label, line) in GATES.items():
        column = "polysemanticity_random" if gate == "dealt" else "polysemanticity"
        here = [row for row in single if row["gate"] == ("entmax15" if gate == "dealt" else gate)]
        shade = colour("cp") if gate == "entmax15" else "0.45"
        style = {"color": shade, "linestyle": line, "label": label, "marker": "o", "markersize": 3}
        draw_line(axes[2], sorted(here, key=lambda row: row["experts"]), "experts", column, **style)
    set_experts_axis(axes[2], single)
    axes[2].set(title="CP, one level", ylabel="polysemanticity")
    axes[2].legend(loc="lower left", frameon=False, fontsize="small", handlelength=2.8)
    legend_below(figure, axes[0], 3)
    return figure
