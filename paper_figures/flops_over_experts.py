"""FLOPs of one input over the number of experts, for every format and for mixtures of dense experts.

Oldfield et al. (2024), cost of the forward pass: a factorized layer uses all experts for about what one dense
layer costs; a dense mixture pays for every expert; a sparse mixture for those it picks, and the gate.

Settings: as parameters_over_experts; the planned forward pass of one input, multiplications and additions
counted apart, the product of the gate counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from paper_figures.common import LINEAR, Row, counts, draw_over_experts, over_experts

TOP_K = 2


def rows(quick: bool) -> list[Row]:
    """One row a format and number of experts."""
    rows = over_experts(quick, "flops", lambda cost: cost.flops)
    gate, outputs = 2 * LINEAR.in_features, LINEAR.out_features
    linear = gate * outputs
    # The output of an expert that is used is weighted and added.
    expert = linear + 2 * outputs
    for n in counts(quick):
        rows.append({"name": "dense moe", "experts": n, "flops": n * (expert + gate)})
        rows.append({"name": "sparse moe", "experts": n, "flops": TOP_K * expert + n * gate})
        rows.append({"name": "linear", "experts": n, "flops": linear})
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """FLOPs over experts."""
    return draw_over_experts(rows, "flops", "FLOPs of one input")
