"""The gate's share of a layer's parameters against the number of experts.

Not in the paper. The gate is a dense matrix, so it becomes larger than the factors; levels keep it small.

Settings: GPT-2's MLP block, 768 → 3072 → 768 with biases, CP of rank 556, one to three equal levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

import mumoe_tensor as mt
from paper_figures.common import Row, colour_of, new_figure

LAYER = mt.LayerSpec("cp", experts=(), in_features=768, hidden=3072, out_features=768, rank=556, bias=True)
#: Line styles by number of levels. The colour is that of CP.
LEVELS = {1: "o-", 2: "s--", 3: "^:"}


def rows(quick: bool) -> list[Row]:
    """One row per number of levels and of experts."""
    records = []
    for levels in LEVELS:
        for exponent in range(6, 25, 6):
            if exponent % levels:
                continue
            experts = (2 ** (exponent // levels),) * levels
            cost = mt.cost(replace(LAYER, experts=experts), gate=True)
            records.append(
                {
                    "levels": levels,
                    "experts": 2**exponent,
                    "share_of_parameters": cost.gate_parameters / cost.parameters,
                    "share_of_flops": cost.gate_flops / cost.flops,
                }
            )
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """One line per number of levels."""
    figure, (ax,) = new_figure()
    for levels, line in LEVELS.items():
        group = [row for row in rows if row["levels"] == levels]
        name = f"{levels} level{'s' if levels > 1 else ''}"
        places, shares = (
            [row["experts"] for row in group],
            [100 * row["share_of_parameters"] for row in group],
        )
        ax.plot(places, shares, line, color=colour_of("cp"), label=name, markersize=4)
    ax.set(xscale="log", xlabel="experts N", ylabel="gate, % of the parameters", ylim=(0, 100))
    ax.legend(frameon=False)
    return figure
