"""Parameters over the number of experts, for every format and for mixtures of dense experts.

Oldfield et al. (2024), comparison of parameter counts: with the rank kept, the experts of a factorized layer
cost parameters in one factor only, those of a mixture of dense experts all of theirs.

Settings: 768 → 768 with biases, the gate counted. The rank of a format is the one at which it has as many
parameters as the linear layer with 64 experts; it is kept for all numbers of experts. A sparse mixture has
the parameters of a dense one.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

import mumoe_tensor as mt
from paper_figures.common import FORMATS, Row, draw_lines, new_figure

SIZES = dict(in_features=768, out_features=768, bias=True)
MATCHED_AT = 64


def ranks() -> dict[str, tuple[int, ...]]:
    """The rank of every format at which it has the parameters of the linear layer."""
    found = {}
    for name in FORMATS:
        bonds = mt.get_format(name).bonds(1)
        fitted = (
            mt.fit_rank(name, experts=MATCHED_AT, parameters="match", gate=True, **SIZES) if bonds else ()
        )
        found[name] = fitted if isinstance(fitted, tuple) else (fitted,)
    return found


def rows(quick: bool) -> list[Row]:
    """One row a format and number of experts, up to a million."""
    counts = [2**k for k in range(1, 21, 4 if quick else 1)]
    linear = mt.dense_parameters(768, 768)
    found: list[Row] = []
    for name, rank in ranks().items():
        for n in counts:
            cost = mt.cost(name, experts=n, rank=rank or None, gate=True, **SIZES)
            found.append({"name": name, "experts": n, "parameters": cost.parameters})
    for n in counts:
        found.append({"name": "dense moe", "experts": n, "parameters": n * linear + 768 * n})
        found.append({"name": "linear", "experts": n, "parameters": linear})
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Parameters over experts, both logarithmic."""
    figure, (ax,) = new_figure(height=2.9)
    draw_lines(ax, rows, "experts", "parameters")
    ax.set(xscale="log", yscale="log", xlabel="experts N", ylabel="parameters, gate counted")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
