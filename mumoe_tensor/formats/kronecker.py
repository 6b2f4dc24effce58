"""Kronecker: a sum of Kronecker products of small matrices."""

from __future__ import annotations

from mumoe_tensor.formats.base import Factor, Format, by_kind
from mumoe_tensor.formats.registry import register


@register
class Kronecker(Format):
    """``W[n.., i, o] = sum_k U1[n1, k] ... A1[i1, o1, k] A2[i2, o2, k]`` (Van Loan and Pitsianis 1993)."""

    name = "kron"
    title = "Kronecker"
    splits = {"i": 2, "o": 2}

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        experts, inputs, outputs = by_kind(modes)
        *pairs, (i, o) = zip(inputs, outputs, strict=True)
        # The input is first multiplied by the last part. Each result is a matrix, the input of the next part.
        first = [Factor(f"{i} {o} k", f"{o} {i} k") for i, o in pairs]
        return [*(Factor(f"{n} k") for n in experts), *first, Factor(f"{i} {o} k", f"{i} k {o}")]
