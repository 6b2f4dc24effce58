"""Perplexity of a mixture of experts against the parameters saved, with its experts in several formats.

Not in the paper: how much worse a small Mixtral, trained on the bytes of Shakespeare's plays, predicts
held-out plays when its experts are compressed.

Settings: two layers of 8 experts, 2 active per byte; each weight fitted from one start with 10 sweeps, with
no further training. Left: fitted to the weights. Right: weighted by the inputs of each expert. Lines are
means over seeds, bands the range over seeds. Reads ``paper_figures/tables/mixture.csv``, which
``experiments/mixture.py`` writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import legend_below
from paper_figures.experiments.mixture import relative
from paper_figures.experiments.tables import table

MARKERS = "osvDPX^<>"
FITS = {"plain": "fitted to the weights", "weighted": "weighted by the inputs of each expert"}


def rows(quick: bool) -> list[Row]:
    """One row per seed, format, fraction of parameters saved and kind of fit."""
    return list(table("mixture"))


def draw(rows: Sequence[Row]) -> Figure:
    """A panel per kind of fit, with a line per format."""
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    lines = relative(rows)
    formats = dict.fromkeys(format for format, _ in lines)
    for ax, (fit, title) in zip(axes, FITS.items(), strict=True):
        for k, format in enumerate(formats):
            places = lines[format, fit].values()
            saved, ratios = [100 * x for x, _ in places], [y for _, y in places]
            means = [100 * (sum(y) / len(y) - 1) for y in ratios]
            ax.plot(saved, means, color=f"C{k}", marker=MARKERS[k], markersize=3, label=format)
            bounds = ([100 * (pick(y) - 1) for y in ratios] for pick in (min, max))
            ax.fill_between(saved, *bounds, color=f"C{k}", alpha=0.15, linewidth=0)
        ax.set(title=title, xlabel="parameters of the experts saved, %", xlim=(0, None))
        # (Linear below a tenth of a percent, as a rise may be zero.)
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    axes[0].set(ylabel="rise of perplexity, %")
    legend_below(figure, axes[0], 5)
    return figure
