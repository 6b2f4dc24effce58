"""Worst-subpopulation accuracy against overall accuracy, for corrections of increasing strength.

Oldfield et al. (2024), bias correction: λ times the mean coefficient of an expert over a subpopulation is
added to the expert's bias. For comparison: thresholds moved for all inputs, or for all inputs of the group,
and methods that retrain. Up and right is better.

Settings: attributes of CelebA (blond men, old women) and Adult (well-paid women), CP with 128 experts of rank
512, strengths from 0 to 8, 5 seeds, means over test rows; at the chosen strength the 95 % interval. See
``docs/experiments/bias.md``. Reads the table ``bias.csv``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product

from matplotlib.figure import Figure

from mumoe_tensor.experiments.bias import COLUMNS, CORRECTIONS, LARGEST_LOSS, METHODS
from mumoe_tensor.interval import interval
from mumoe_tensor.ledger import Ledger, Row
from paper_figures.common import FOLDER, colour_of, legend_below, new_figure
from paper_figures.experiments.tables import grouped

TABLE = FOLDER / "tables" / "bias.csv"
ATTRIBUTES = {
    "celeba Blond_Hair=1 Male=1": "CelebA: blond men",
    "celeba Young=0 Male=0": "CelebA: old women",
    "adult income=1 Male=0": "Adult: well-paid women",
}
FACES = {"faces.npz old=1 male=0": "UTKFace: old women", "faces.npz old=0 male=1": "UTKFace: young men"}
TASKS = ATTRIBUTES | FACES
TITLES = {
    "edit": "expert edit of the μMoE",
    "threshold": "global threshold of the μMoE",
    "linear threshold": "global threshold, linear model",
    "group threshold": "threshold of the group, μMoE",
    "linear": "linear model",
    "high-rank linear": "high-rank linear model",
    "mumoe": "μMoE",
    "oversampling": "oversampling, μMoE",
    "adversarial": "adversarial debiasing",
}
STYLES = {
    "edit": (colour_of("cp"), "-"),
    "threshold": (colour_of("tr"), "--"),
    "linear threshold": (colour_of("linear"), "-."),
    "group threshold": ("0.6", ":"),
}
MARKERS = {"linear": "v", "high-rank linear": "^", "mumoe": "o", "oversampling": "s", "adversarial": "X"}


def rows(quick: bool) -> list[Row]:
    """Rows of the tasks with attributes, see `means`."""
    return means(ATTRIBUTES)


def means(tasks: Collection[str]) -> list[Row]:
    """One row per task, method and strength: means over seeds. Strength None is the one chosen per seed."""
    groups = grouped(Ledger(TABLE, COLUMNS).of(split="test"), "task", "method")
    records = []
    for task, method in product(tasks, METHODS):
        group = groups[task, method]
        strengths = sorted(grouped(group, "value").items()) if method in CORRECTIONS else []
        for strength, here in [(None, [row for row in group if row["chosen"]]), *strengths]:
            row = {"task": task, "method": method, "strength": strength, "seeds": len(here)}
            for metric in ("accuracy", "target", "worst"):
                row[metric], row[f"{metric}_half"] = interval([one[metric] for one in here])
            records.append(row)
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """A panel per task: a line per correction, and a marker per model and per chosen strength."""
    tasks = grouped(rows, "task")
    figure, axes = new_figure(len(tasks), height=3.6)
    for ax, (task, of_task) in zip(axes, tasks.items(), strict=True):
        methods = grouped(of_task, "method")
        for method in (*CORRECTIONS, *MARKERS):
            group = methods[method]
            colour, line = STYLES.get(method, ("black", "none"))
            curve = [row for row in group if row["strength"] is not None]
            places = [[100 * row[metric] for row in curve] for metric in ("accuracy", "worst")]
            ax.plot(*places, color=colour, linestyle=line, label=TITLES[method] if curve else None)
            (chosen,) = (row for row in group if row["strength"] is None)
            ax.errorbar(
                100 * chosen["accuracy"], 100 * chosen["worst"], 100 * chosen["worst_half"],
                100 * chosen["accuracy_half"], color=colour, marker=MARKERS.get(method, "D"), markersize=4,
                elinewidth=0.7, fillstyle="none" if method in MARKERS else "full", linestyle="none",
                label=None if curve else TITLES[method],
            )  # fmt: skip
        best = 100 * max(row["accuracy"] for row in of_task)
        ax.set(xlim=(best - 100 * LARGEST_LOSS, best + 1), ylim=(-2, 102), title=TASKS[task])
        ax.set(xlabel="test accuracy, %", ylabel="accuracy of the worst subpopulation, %")
        ax.label_outer()
    legend_below(figure, axes[0], 3)
    return figure
