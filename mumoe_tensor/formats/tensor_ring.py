"""Tensor Ring: a closed chain of three-way cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank
from mumoe_tensor.formats.registry import register


@register
class TensorRing(Format):
    """``W[n.., i, o] = tr(U1[:, n1, :] ... Ui[:, i, :] Uo[:, o, :])``, closed by the first bond."""

    name = "tr"
    title = "Tensor Ring"
    container = "TRTensor"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        bonds = [f"b{k}" for k in range(1, len(modes) + 1)]
        cores = list(zip(bonds, modes, [*bonds[1:], bonds[0]], strict=True))
        *inner, (a, o, b) = cores
        last = Factor(f"{a} {o} {b}", memory_order=f"{b} {a} {o}")
        return [*(Factor(f"{a} {m} {b}", memory_order=f"{m} {a} {b}") for a, m, b in inner), last]

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        return (*(4,) * (len(mode_sizes) - 1), t)

    def reference_flops(self, mode_sizes: tuple[int, ...], rank: Rank) -> int:
        return chain_flops(mode_sizes, (*rank, rank[0]))

    def from_container(self, container: Any) -> list[Any]:
        return list(container.factors)

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.tr_tensor import TRTensor

        return TRTensor(list(factors))


def chain_flops(mode_sizes: tuple[int, ...], bonds: tuple[int, ...]) -> int:
    """FLOPs of contracting cores of shape (bonds[k], mode_sizes[k], bonds[k + 1]) with vectors to a chain."""
    first = bonds[0]
    projections = sum(a * n * b for a, n, b in zip(bonds, mode_sizes, bonds[1:], strict=False))
    matrices = sum(first * bonds[k] * bonds[k + 1] for k in range(1, len(mode_sizes) - 1))
    return 2 * (projections + matrices)
