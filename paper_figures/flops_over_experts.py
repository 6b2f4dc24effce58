"""FLOPs per input against the number of experts, for every format and for mixtures of dense experts.

Oldfield et al. (2024), cost of the forward pass: a factorized layer uses all experts at about the cost of one
dense layer; a dense mixture costs as much as all its experts, a sparse mixture as its active experts and the
gate.

Settings: as in parameters_over_experts; the planned forward pass of one input, including the gate, with two
FLOPs per multiplication and addition.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import LINEAR, counts, draw_over_experts, over_experts

TOP_K = 2


def rows(quick: bool) -> list[Row]:
    """One row per format and number of experts."""
    rows = over_experts(quick, "flops", lambda cost: cost.flops)
    gate, outputs = 2 * LINEAR.in_features, LINEAR.out_features
    linear = gate * outputs
    # The output of each active expert is weighted and added.
    expert = linear + 2 * outputs
    for n in counts(quick):
        rows.append({"name": "dense moe", "experts": n, "flops": n * (expert + gate)})
        rows.append({"name": "sparse moe", "experts": n, "flops": TOP_K * expert + n * gate})
        rows.append({"name": "linear", "experts": n, "flops": linear})
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """FLOPs against experts."""
    return draw_over_experts(rows, "flops", "FLOPs of one input")
