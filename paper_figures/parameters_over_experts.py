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

from paper_figures.common import LINEAR, Row, counts, draw_over_experts, over_experts


def rows(quick: bool) -> list[Row]:
    """One row a format and number of experts."""
    linear, gate = LINEAR.parameters, LINEAR.in_features
    rows = over_experts(quick, "parameters", lambda cost: cost.parameters)
    for n in counts(quick):
        rows.append({"name": "dense moe", "experts": n, "parameters": n * (linear + gate)})
        rows.append({"name": "linear", "experts": n, "parameters": linear})
    return rows


def draw(rows: Sequence[Row]) -> Figure:
    """Parameters over experts."""
    return draw_over_experts(rows, "parameters", "parameters, gate counted")
