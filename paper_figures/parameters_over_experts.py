"""Parameters against the number of experts, for every format and for mixtures of dense experts.

Oldfield et al. (2024), comparison of parameter counts: at a fixed rank, each expert adds parameters to one
factor of a factorized layer, but a whole weight matrix to a mixture of dense experts.

Settings: 768 → 768 with biases, including the gate. The rank of a format is the one at which 64 experts have
as many parameters as the linear layer; it is the same for all numbers of experts. A sparse mixture has as
many parameters as a dense mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from mumoe_tensor.ledger import Row
from paper_figures.common import LINEAR, counts, draw_over_experts, over_experts


def rows(quick: bool) -> list[Row]:
    """One row per format and number of experts."""
    linear, gate = LINEAR.parameters, LINEAR.in_features
    rows = over_experts(quick, "parameters", lambda cost: cost.parameters)
    for n in counts(quick):
        rows.append({"name": "dense moe", "experts": n, "parameters": n * (linear + gate)})
        rows.append({"name": "linear", "experts": n, "parameters": linear})
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """Parameters against experts."""
    return draw_over_experts(rows, "parameters", "parameters, with the gate")
