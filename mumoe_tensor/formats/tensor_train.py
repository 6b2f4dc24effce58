"""Tensor Train: an open chain of cores, a Tensor Ring whose first bond has size one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank
from mumoe_tensor.formats.registry import register
from mumoe_tensor.formats.tensor_ring import chain_flops


@register
class TensorTrain(Format):
    """``W[n.., i, o] = U1[n1, :] U2[:, n2, :] ... Uo[:, o]``."""

    name = "tt"
    title = "Tensor Train"
    container = "TTTensor"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        bonds = [f"b{k}" for k in range(2, len(modes) + 1)]
        first, *inner, last = modes
        cores = zip(bonds[:-1], inner, bonds[1:], strict=True)
        return [
            Factor(f"{first} {bonds[0]}"),
            *(Factor(f"{a} {m} {b}", memory_order=f"{m} {a} {b}") for a, m, b in cores),
            Factor(f"{bonds[-1]} {last}"),
        ]

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        return (*(4,) * (len(mode_sizes) - 2), t)

    def reference_flops(self, mode_sizes: tuple[int, ...], rank: Rank) -> int:
        return chain_flops(mode_sizes, (1, *rank, 1))

    def from_container(self, container: Any) -> list[Any]:
        first, *inner, last = container.factors
        return [first[0], *inner, last[:, :, 0]]

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.tt_tensor import TTTensor

        first, *inner, last = factors
        return TTTensor([first[None], *inner, last[:, :, None]])
