"""Error of structured formats that approximate a pretrained matrix, fitted with and without input covariance.

Not in the paper: the error of each structure for a linear layer, and the gain from fitting its outputs.

Settings: an expanding convolution of EfficientNet-Lite2 (120 → 720) and an up-projection of SmolLM2-135M
(576 → 1,536), no experts; `decompose` from one start with at most 20 sweeps; ranks for 5 to 50 % of the
parameters. Top: the error in the weight, fitted without weighting. Bottom: the error in the outputs, dotted
for fits without weighting and solid for fits with `input_covariance`; both use the inputs that the layer has
in its network. Kronecker and TT-matrix with two parts are the same matrices. CP-matrix has at most 600
components. Reads ``paper_figures/tables/compression.csv``, which ``experiments/compression.py`` writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import legend_below
from paper_figures.experiments.tables import grouped, table

MARKERS = "osvDPX^<>"


def rows(quick: bool) -> list[Row]:
    """One row per network, format, fraction of the parameters and kind of fit."""
    return list(table("compression"))


def draw(rows: Sequence[Row]) -> Figure:
    """A column per network; the error in the weight above the error in the outputs."""
    networks, lines = grouped(rows, "network"), grouped(rows, "network", "format", "fit")
    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    axes = figure.subplots(2, len(networks), squeeze=False)
    for column, network in enumerate(networks):
        for k, format in enumerate(grouped(rows, "format")):
            look = {"color": f"C{k}", "marker": MARKERS[k], "markersize": 3}
            for ax, error, fits in zip(
                axes[:, column],
                ("weight_error", "output_error"),
                ({"plain": "-"}, {"plain": ":", "weighted": "-"}),
                strict=True,
            ):
                for fit, line in fits.items():
                    here = lines[network, format, fit]
                    places = [row["share"] for row in here], [row[error] for row in here]
                    ax.plot(*places, linestyle=line, label=format if line == "-" else None, **look)
        axes[0, column].set(title=network, ylabel="relative error of the weight", ylim=(0, 1))
        axes[1, column].set(ylabel="relative error of the outputs", ylim=(0, 1))
        for ax in axes[:, column]:
            ax.set(xlabel="parameters, share of the dense ones", xlim=(0, 0.55))
    legend_below(figure, axes[1, 0], 5)
    return figure
