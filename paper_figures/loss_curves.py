"""Validation loss over training steps: a Mixer and a GPT-2 with dense MLPs and with experts in every layer.

Oldfield et al. (2024), loss curves of models of equal parameters.

Settings: Fashion-MNIST and Shakespeare at laptop scale, parameters matched to ± 1 %, three seeds,
means and 95 % intervals; see ``docs/experiments/mixer.md`` and ``docs/experiments/gpt2.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import colour_of, draw_line, new_figure
from paper_figures.experiments.tables import grouped, over_seeds, table

#: Titles of networks.
NETWORKS = {"mixer": "Mixer, Fashion-MNIST", "gpt2": "GPT-2, Shakespeare"}
COLOURS = {"dense": "linear", "CP": "cp", "TR": "tr"}


def rows(quick: bool) -> list[Row]:
    """One row per network, kind of block and evaluation."""
    records = []
    for network in NETWORKS:
        for (arm, step), group in grouped(table(f"{network}_curves"), "arm", "step").items():
            key = {"network": network, "arm": arm, "step": step, "seeds": len(group)}
            records.append(key | over_seeds(group, "validation_loss"))
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """A panel per network; two levels are dashed."""
    networks = grouped(rows, "network")
    figure, axes = new_figure(len(networks), height=2.8)
    for ax, (network, curves) in zip(axes, networks.items(), strict=True):
        for arm, group in grouped(curves, "arm").items():
            format, _, levels = arm.partition(", ")
            look = {"color": colour_of(COLOURS[format]), "linestyle": "--" if levels else "-", "label": arm}
            draw_line(ax, group, "step", "validation_loss", **look)
        ax.set(title=NETWORKS[network], xlabel="training steps", ylabel="validation loss, nats")
        ax.legend(frameon=False)
    return figure
