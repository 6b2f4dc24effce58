"""Monarch: a block-diagonal matrix, a permutation and a block-diagonal matrix."""

from __future__ import annotations

from mumoe_tensor.formats.base import Factor, Format, by_kind
from mumoe_tensor.formats.registry import register


@register
class Monarch(Format):
    """``W[n.., i, o] = U1[n1, i1, o1] ... A[i1, i2, o1] B[o1, i1, o2]`` (Dao et al. 2022).

    The coefficients of the experts scale the result of the first block-diagonal matrix.
    """

    name = "monarch"
    title = "Monarch"
    splits = {"i": 2, "o": 2}

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        experts, (i1, i2), (o1, o2) = by_kind(modes)
        first, second = Factor(f"{i1} {i2} {o1}"), Factor(f"{o1} {i1} {o2}")
        return [*(Factor(f"{n} {i1} {o1}") for n in experts), first, second]
