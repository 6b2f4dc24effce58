"""Accuracy of heads with one learning rate for all parameters, and with a rate for every factor.

Settings: blocks 320 → 512 → 10 of 32 experts on features of EfficientNet-Lite0, Fashion-MNIST, with the
parameters of the MLP (169,482), means over seeds and 95 % intervals on test images. The dashed line is the
MLP. See ``docs/experiments/rates.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import draw_interval, legend_below, new_figure, title_of
from paper_figures.experiments.rates import FORMATS, INITS, MLP, NORMS, RATES, SETTINGS, validated
from paper_figures.experiments.tables import over_seeds, table

LABELS = {"one": "one learning rate", "structured": "a rate for every factor"}


def rows(quick: bool) -> list[Row]:
    """One row a setting, that of the MLP first; accuracies on test images, the best on validation rows."""
    kept = table("rates")
    return [
        {
            **setting._asdict(),
            "validated": max(validated(setting).values()),
            **over_seeds(group, "accuracy"),
            "seeds": len(group),
        }
        for setting in SETTINGS
        if (group := kept.of(**setting._asdict()))
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """A panel a format; a place for each norm and initialisation, a colour for each kind of rates."""
    figure, axes = new_figure(len(FORMATS), height=3.2)
    (dense,) = (row for row in rows if row["format"] == MLP)
    places = [(norm, init) for init in INITS for norm in NORMS]
    for ax, name in zip(axes, FORMATS, strict=True):
        for number, rates in enumerate(RATES):
            here = [row for row in rows if (row["format"], row["rates"]) == (name, rates)]
            for row in here:
                x = places.index((row["norm"], row["init"])) + 0.2 * number - 0.1
                label = LABELS[rates] if row is here[0] else None
                look = {"fmt": "o", "color": f"C{number}", "label": label}
                draw_interval(ax, x, row, "accuracy", 0.01, **look)
        ax.axhline(100 * dense["accuracy"], color="black", linestyle="--", label="dense MLP")
        ax.set_xticks(range(len(places)), [f"{norm}\n{init}" for norm, init in places], fontsize=6.5)
        ax.set(title=title_of(name), ylabel="test accuracy, %")
        ax.set_xlabel("norm of the logits, initialisation")
    low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        ax.set_ylim(low, high)
        ax.label_outer()
    legend_below(figure, axes[0], 3)
    return figure
