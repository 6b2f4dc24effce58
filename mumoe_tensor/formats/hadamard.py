"""Hadamard: CP whose rank is the output size and whose output factor is the identity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank, Tree, stop_rule
from mumoe_tensor.formats.registry import register


@register
class Hadamard(Format):
    """``W[n.., i, o] = C1[n1, o] ... CE[nE, o] D[i, o]``: full-rank experts (Mixture of Decoders, 2025)."""

    name = "hadamard"
    title = "Hadamard"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor(f"{m} o") for m in modes[:-1]]

    def reference_path(self, levels: int) -> Tree:
        tree: Tree = ("i", levels)
        for e in range(levels, 0, -1):
            tree = ((f"n{e}", e - 1), tree)
        return tree

    def reference_flops(self, sizes: tuple[int, ...], rank: Rank) -> int:
        *others, o = sizes
        return 2 * o * sum(others) + o * (len(others) - 1)

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.cp_tensor import CPTensor

        like = {key: value for key, value in tl.context(factors[-1]).items() if key != "requires_grad"}
        return CPTensor((None, [*factors, tl.eye(factors[-1].shape[1], **like)]))

    def decompose(
        self, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
    ) -> Iterator[list[Any]]:
        # For every output a tensor of rank one, all at once: what parafac(rank=1) does for each alone.
        # With one level of experts the start is the optimum already.
        import numpy as np

        *others, o = dense.shape
        last = len(others)
        best: list[Any] = []
        for k, generator in enumerate(generators if last > 2 else generators[:1]):
            factors = [generator.standard_normal((n, o)) for n in others]
            if k == 0:
                for m in range(last):
                    slices = np.moveaxis(dense, (last, m), (0, 1)).reshape(o, others[m], -1)
                    factors[m] = np.linalg.svd(slices, full_matrices=False)[0][:, :, 0].T
            stop = stop_rule(tolerance)
            for _ in range(n_iter):
                for m in range(last):
                    rest = [(factors[j], [j, last]) for j in range(last) if j != m]
                    operands = [x for pair in rest for x in pair]
                    squares = prod((f**2).sum(0) for f, _ in rest)
                    products = np.einsum(dense, [*range(last + 1)], *operands, [m, last], optimize=True)
                    factors[m] = products / np.where(squares > 0, squares, 1)
                # At a least-squares fit what is left over is orthogonal to what is fitted.
                fitted = prod((f**2).sum(0) for f in factors)
                if stop(None, (max((dense**2).sum() - fitted.sum(), 0)) ** 0.5):
                    break
            if best:
                better = fitted > prod((f**2).sum(0) for f in best)
                factors = [np.where(better, f, b) for f, b in zip(factors, best, strict=True)]
            best = factors
            yield best
