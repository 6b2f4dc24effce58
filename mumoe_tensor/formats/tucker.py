"""Tucker: a small core with one factor a mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank, Tree
from mumoe_tensor.formats.registry import register


@register
class Tucker(Format):
    """``W = G x_1 U1 ... x_(E+2) Uo`` with a core G of shape (Rn1, ..., RnE, Ri, Ro)."""

    name = "tucker"
    title = "Tucker"
    container = "TuckerTensor"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        bonds = [f"r_{m}" for m in modes]
        *experts, i, o = bonds
        core = Factor(" ".join(bonds), storage=" ".join([i, *experts, o]))
        return [core, *(Factor(f"{m} {r}") for m, r in zip(modes, bonds, strict=True))]

    def default_rank(self, sizes: tuple[int, ...], t: int) -> Rank:
        return tuple(max(1, min(size, round(size * t / max(sizes)))) for size in sizes)

    def reference_path(self, levels: int) -> Tree:
        # The input meets the core first, then the levels from the last to the first.
        tree: Tree = (("i", levels + 1), 0)
        for e in range(levels, 0, -1):
            tree = ((f"n{e}", e), tree)
        return (tree, levels + 2)

    def reference_flops(self, sizes: tuple[int, ...], rank: Rank) -> int:
        *experts, _, o = rank
        projections = sum(n * r for n, r in zip(sizes, rank, strict=True))
        core = prod(rank) + sum(prod(experts[: e + 1]) * o for e in range(len(experts)))
        return 2 * (projections + core)

    def from_container(self, container: Any) -> list[Any]:
        return [container.core, *container.factors]

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.tucker_tensor import TuckerTensor

        return TuckerTensor((factors[0], list(factors[1:])))

    def decompose(
        self, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
    ) -> Iterator[list[Any]]:
        # Higher-order orthogonal iteration (De Lathauwer et al. 2000).
        from tensorly.decomposition import tucker

        # No rank can be used beyond the size of its mode or the product of the other ranks.
        capped = [min(n, r) for n, r in zip(dense.shape, rank, strict=True)]
        capped = [min(r, prod(capped) // r) for r in capped]
        for k, generator in enumerate(generators):
            start = [generator.standard_normal(shape) for shape in zip(dense.shape, capped, strict=True)]
            init = (None, start) if k else "svd"
            core, factors = tucker(dense, capped, n_iter_max=n_iter, init=init, tol=tolerance)
            yield [core, *factors]
