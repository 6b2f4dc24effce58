"""Hadamard: CP whose rank is the output size and whose output factor is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mumoe_tensor.backend import context_of
from mumoe_tensor.formats.base import Factor, Format, Rank
from mumoe_tensor.formats.registry import register


@register
class Hadamard(Format):
    """``W[n.., i, o] = C1[n1, o] ... CE[nE, o] D[i, o]``: full-rank experts (Oldfield et al. 2025)."""

    name = "hadamard"
    title = "Hadamard"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor(f"{m} o") for m in modes[:-1]]

    def reference_flops(self, mode_sizes: tuple[int, ...], rank: Rank) -> int:
        *others, o = mode_sizes
        return 2 * o * sum(others) + o * (len(others) - 1)

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.cp_tensor import CPTensor

        identity = tl.eye(factors[-1].shape[1], **context_of(factors[-1], tl))
        return CPTensor((None, [*factors, identity]))
