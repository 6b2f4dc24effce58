"""Rise in a language model's cross entropy over the active experts of layers that replace an MLP.

After the figures of Oldfield et al. (2025), who compare mixtures of decoders with transcoders. This figure
adds layers with baseline gates, and layers without experts.

Settings: one MLP block of SmolLM2-135M-Instruct is replaced at a time; all layers except "no experts, same
width" have twice its parameters. Lines are means over seeds, bands the range over seeds. Baselines are
dashed; layers without K are horizontal lines. Gray: the model with the block's outputs set to zero; the
intact model is at zero. Reads ``paper_figures/tables/replacement.csv``, which ``mumoe-tensor replace`` writes
for the grid ``experiments/replacement.toml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mumoe_tensor.ledger import Row
from paper_figures.common import legend_below
from paper_figures.experiments.replacement import NULLS
from paper_figures.experiments.tables import grouped, table

#: Line styles of the arms, in order; gray is for the model without the block.
COLOURS = [f"C{number}" for number in range(10) if number != 7]


def rows(quick: bool) -> list[Row]:
    """One row per trained layer."""
    return list(table("replacement"))


def draw(rows: Sequence[Row]) -> Figure:
    """A panel per replaced module, with a line per arm."""
    modules, arms = grouped(rows, "module"), grouped(rows, "arm")
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots(1, len(modules), sharey=True, squeeze=False, width_ratios=[2, 1][: len(modules)])
    for ax, (module, here) in zip(axes[0], modules.items(), strict=True):
        ax.axhline(here[0]["rise_zeroed"], color="gray", linewidth=1, label="zeroed")
        for colour, arm in zip(COLOURS, arms, strict=False):
            null = {"linestyle": "--", "markerfacecolor": "white"} if arm in NULLS else {}
            look = {"color": colour, "label": arm, **null}
            draw_arm(ax, [row for row in here if row["arm"] == arm], look)
        ks = sorted({row["k"] for row in here if row["k"]})
        ax.set(xscale="log", yscale="log", title=module, xlabel="active experts K")
        ax.set_xlim(ks[0] / 1.4, ks[-1] * 1.4)
        ax.set_xticks(ks, map(str, ks))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    axes[0][0].set(ylabel="rise in cross entropy, nats per token")
    legend_below(figure, axes[0][0], 4)
    return figure


def draw_arm(ax: Axes, rows: Sequence[Row], look: dict[str, Any]) -> None:
    """The mean over seeds at each K, with the range over seeds as a band."""
    groups = sorted(grouped(rows, "k").items())
    ks, rises = [k for k, _ in groups], [[row["rise"] for row in group] for _, group in groups]
    if ks == [0]:
        ax.axhline(fmean(rises[0]), **look)
        return
    ax.plot(ks, [*map(fmean, rises)], marker="o", markersize=4, **look)
    ax.fill_between(ks, [*map(min, rises)], [*map(max, rises)], color=look["color"], alpha=0.15, linewidth=0)
