"""Rise of a language model's cross entropy over the number of active experts, of layers that replace an MLP.

After the figures of Oldfield et al. (2025), who compare mixtures of decoders with transcoders. Here are also
layers whose gate is replaced by a null, and layers without experts.

Settings: one MLP block of SmolLM2-135M-Instruct is replaced at a time; all layers but those without experts
of the same width have twice its parameters. Lines are means over seeds, bands reach from the least to the
most. Nulls are dashed; what has no K is a level line. Gray: the model with zeros in the place; the intact
model is at zero. Reads ``docs/experiments/replacement.csv``, which ``mumoe-tensor replace`` makes of
``experiments/replacement.toml``.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from paper_figures.common import Row
from paper_figures.experiments.heads import table

#: Layers whose experts are chosen by chance or by the inputs alone, or that have none.
NULLS = ("MxD, random experts", "MxD, nearest centres", "no experts", "no experts, same width")


def rows(quick: bool) -> list[Row]:
    """One row a trained layer."""
    return table("replacement")


def draw(rows: Sequence[Row]) -> Figure:
    """A panel a place, with a line an arm."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    modules = list(dict.fromkeys(row["module"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    axes = figure.subplots(1, len(modules), sharey=True, squeeze=False, width_ratios=[2, 1][: len(modules)])[
        0
    ]
    for ax, module in zip(axes, modules, strict=True):
        here = [row for row in rows if row["module"] == module]
        ax.axhline(here[0]["rise_zeroed"], color="gray", linewidth=1, label="zeroed")
        for number, arm in enumerate(arms):
            style = {"color": f"C{number}", "linestyle": "--" if arm in NULLS else "-"}
            of_arm = [row for row in here if row["arm"] == arm]
            by_k = {
                k: [row["rise"] for row in of_arm if row["k"] == k] for k in sorted({r["k"] for r in of_arm})
            }
            means = [sum(rises) / len(rises) for rises in by_k.values()]
            if list(by_k) == [0]:
                ax.axhline(means[0], **style, label=arm)
                continue
            ax.plot([*by_k], means, **style, marker="o", markersize=3, label=arm)
            bounds = ([pick(rises) for rises in by_k.values()] for pick in (min, max))
            ax.fill_between([*by_k], *bounds, color=style["color"], alpha=0.15, linewidth=0)
        ks = sorted({row["k"] for row in here if row["k"]})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, map(str, ks))
        ax.set_yscale("log")
        ax.set(title=module, xlabel="active experts K")
    axes[0].set(ylabel="rise of the cross entropy, nats a token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
