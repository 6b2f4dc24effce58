"""Block Tensor Train: a product of two block-structured factors, with blocks of rank r."""

from __future__ import annotations

from mumoe_tensor.formats.base import Factor, Format, by_kind
from mumoe_tensor.formats.registry import register


@register
class BTT(Format):
    """``W[n.., i, o] = sum_r U1[n1, r] ... A[i1, i2, r, o1] B[o1, i1, r, o2]`` (Qiu et al. 2024).

    The experts are connected to the bond, so each expert adds only r parameters.
    """

    name = "btt"
    title = "Block Tensor Train"
    splits = {"i": 2, "o": 2}

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        experts, (i1, i2), (o1, o2) = by_kind(modes)
        first = Factor(f"{i1} {i2} r {o1}", f"{i1} r {o1} {i2}")
        return [*(Factor(f"{n} r") for n in experts), first, Factor(f"{o1} {i1} r {o2}")]
