"""Validation loss over training steps: a Mixer and a GPT-2 with dense MLPs and with experts in every layer.

Oldfield et al. (2024), loss curves of models of equal parameters.

Settings: Fashion-MNIST and Shakespeare at laptop scale, parameters matched to ± 1 %, three seeds,
means and 95 % intervals; see ``docs/experiments/mixer.md`` and ``docs/experiments/gpt2.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from paper_figures.common import Row, colour_of, draw_line, new_figure
from paper_figures.experiments.tables import over_seeds, table

#: Titles of networks.
NETWORKS = {"mixer": "Mixer, Fashion-MNIST", "gpt2": "GPT-2, Shakespeare"}
COLOURS = {"dense": "linear", "CP": "cp", "TR": "tr"}


def rows(quick: bool) -> list[Row]:
    """One row per network, kind of block and evaluation."""
    records = []
    for network in NETWORKS:
        curves = table(f"{network}_curves")
        for arm, step in dict.fromkeys((row["arm"], row["step"]) for row in curves):
            group = [row for row in curves if (row["arm"], row["step"]) == (arm, step)]
            key = {"network": network, "arm": arm, "step": step, "seeds": len(group)}
            records.append(key | over_seeds(group, "validation_loss"))
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """A panel per network; two levels are dashed."""
    networks = [network for network in NETWORKS if any(row["network"] == network for row in rows)]
    figure, axes = new_figure(len(networks), height=2.8)
    for ax, network in zip(axes, networks, strict=True):
        curves = [row for row in rows if row["network"] == network]
        for arm in dict.fromkeys(row["arm"] for row in curves):
            group = [row for row in curves if row["arm"] == arm]
            format, _, levels = arm.partition(", ")
            look = {"color": colour_of(COLOURS[format]), "linestyle": "--" if levels else "-", "label": arm}
            draw_line(ax, group, "step", "validation_loss", **look)
        ax.set(title=NETWORKS[network], xlabel="training steps", ylabel="validation loss, nats")
        ax.legend(frameon=False)
    return figure
