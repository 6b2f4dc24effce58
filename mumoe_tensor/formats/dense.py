"""Dense: the weight tensor itself, the 'soft' mixture of experts. Baseline and oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank, Tree
from mumoe_tensor.formats.registry import register


@register
class Dense(Format):
    """``W[n.., i, o]``, every expert a matrix of its own."""

    name = "dense"
    title = "Dense"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor(" ".join(modes))]

    def reference_path(self, levels: int) -> Tree:
        # Every expert's output, then their mixture from the last level to the first.
        tree: Tree = ("i", 0)
        for e in range(levels, 0, -1):
            tree = (f"n{e}", tree)
        return tree

    def reference_flops(self, sizes: tuple[int, ...], rank: Rank) -> int:
        *experts, _, o = sizes
        return 2 * (prod(sizes) + sum(prod(experts[: e + 1]) * o for e in range(len(experts))))

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        return factors[0]

    def decompose(
        self, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
    ) -> Iterator[list[Any]]:
        yield [dense]
