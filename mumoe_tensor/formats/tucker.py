"""Tucker: a small core with one factor per mode."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank
from mumoe_tensor.formats.registry import register


@register
class Tucker(Format):
    """``W = G x_1 U1 ... x_(E+2) Uo`` with a core G of shape (Rn1, ..., RnE, Ri, Ro)."""

    name = "tucker"
    title = "Tucker"
    container: str | None = "TuckerTensor"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        bonds = [f"r_{m}" for m in modes]
        *experts, i, o = bonds
        core = Factor(" ".join(bonds), memory_order=" ".join([i, *experts, o]))
        return [core, *(Factor(f"{m} {r}") for m, r in zip(modes, bonds, strict=True))]

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        return tuple(max(1, min(size, round(size * t / max(mode_sizes)))) for size in mode_sizes)

    def reference_flops(self, mode_sizes: tuple[int, ...], rank: Rank) -> int:
        *experts, _, o = rank
        projections = sum(n * r for n, r in zip(mode_sizes, rank, strict=True))
        core = prod(rank) + sum(prod(experts[: e + 1]) * o for e in range(len(experts)))
        return 2 * (projections + core)

    def from_container(self, container: Any) -> list[Any]:
        return [container.core, *container.factors]

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.tucker_tensor import TuckerTensor

        return TuckerTensor((factors[0], list(factors[1:])))
