"""Largest expert rank of CP and Tensor Ring layers of equal parameters, against the number of experts.

Oldfield et al. (2024), maximum rank of expert matrices: at matched parameters, experts of a Tensor Ring have
higher rank than those of CP, and the rank falls later with the number of experts.

Settings: 768 → 1000 with biases and gate, as many parameters as the linear layer. Tensor Ring with
R1 = R2 = 4. Dots: numerical rank of one expert with normal factors (float64).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

import mumoe_tensor as mt
from mumoe_tensor.ledger import Row
from paper_figures.common import colour_of, draw_lines, new_figure, rank_text, set_experts_axis

OPEN = {"cp": (None,), "tr": (4, 4, None)}


def rows(quick: bool) -> list[Row]:
    """One row per format and number of experts."""
    records = []
    for name, rank in OPEN.items():
        for n in (16, 64, 256) if quick else (8, 16, 32, 64, 128, 256, 512):
            spec = mt.LayerSpec(
                name, experts=n, in_features=768, out_features=1000, rank=rank, bias=True
            ).fitted()
            weight = mt.FactorizedTensor.random(spec, like=np.zeros(1), seed=0)
            matrix, _ = mt.expert_matrix(weight, 0, bias=True)
            records.append(
                {
                    "name": name,
                    "experts": n,
                    "rank": rank_text(spec),
                    "max_expert_rank": spec.max_expert_rank,
                    "numerical_rank": int(np.linalg.matrix_rank(matrix)),
                }
            )
    return records


def draw(rows: Sequence[Row]) -> Figure:
    """Bounds as lines, numerical ranks as dots."""
    figure, (ax,) = new_figure()
    draw_lines(ax, rows, "experts", "max_expert_rank")
    for row in rows:
        ax.plot(row["experts"], row["numerical_rank"], "o", color=colour_of(row["name"]), markersize=4)
    set_experts_axis(ax, rows)
    ax.set(ylabel="largest rank of an expert", ylim=(0, 450))
    ax.legend(frameon=False)
    return figure
