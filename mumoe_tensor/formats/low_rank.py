"""Low rank: each expert is a product of two matrices."""

from __future__ import annotations

from mumoe_tensor.formats.base import Factor, Format, by_kind
from mumoe_tensor.formats.registry import register


@register
class LowRank(Format):
    """``W[n.., i, o] = sum_r A[n.., i, r] B[n.., r, o]``, with separate factors for each expert."""

    name = "lowrank"
    title = "Low rank"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        experts, inputs, outputs = by_kind(modes)
        n, i, o = map(" ".join, (experts, inputs, outputs))
        return [Factor(f"{n} {i} r", f"{i} {n} r"), Factor(f"{n} r {o}")]
