"""Tensor Ring: a closed chain of three-way cores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank, Tree, stop_rule
from mumoe_tensor.formats.registry import register


@register
class TensorRing(Format):
    """``W[n.., i, o] = tr(U1[:, n1, :] ... Ui[:, i, :] Uo[:, o, :])``, closed onto the first bond."""

    name = "tr"
    title = "Tensor Ring"
    container = "TRTensor"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        bonds = [f"b{k}" for k in range(1, len(modes) + 1)]
        cores = list(zip(bonds, modes, [*bonds[1:], bonds[0]], strict=True))
        *inner, (a, o, b) = cores
        last = Factor(f"{a} {o} {b}", storage=f"{b} {a} {o}")
        return [*(Factor(f"{a} {m} {b}", storage=f"{m} {a} {b}") for a, m, b in inner), last]

    def default_rank(self, sizes: tuple[int, ...], t: int) -> Rank:
        return (*(4,) * (len(sizes) - 1), t)

    def reference_path(self, levels: int) -> Tree:
        return chain_path(levels)

    def reference_flops(self, sizes: tuple[int, ...], rank: Rank) -> int:
        return chain_flops(sizes, (*rank, rank[0]))

    def from_container(self, container: Any) -> list[Any]:
        return list(container.factors)

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.tr_tensor import TRTensor

        return TRTensor(list(factors))

    def decompose(
        self, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
    ) -> Iterator[list[Any]]:
        # Alternating least squares from TR-SVD and from random cores (Zhao et al. 2016, algorithms 1, 2).
        import numpy as np
        from tensorly.decomposition import tensor_ring_als
        from tensorly.tenalg.svd import svd_interface

        ring = (*rank, rank[0])
        if len(rank) == 2:  # a matrix of rank R1 R2; TensorLy warns of such a ring
            u, s, v = svd_interface(dense, n_eigenvecs=min(prod(rank), *dense.shape))
            missing = prod(rank) - len(s)
            left = np.pad(u, ((0, 0), (0, missing))).reshape(-1, *rank).transpose(1, 0, 2)
            right = np.pad(s[:, None] * v, ((0, missing), (0, 0))).reshape(*rank, -1).transpose(1, 2, 0)
            yield [left, right]
            return
        for k, generator in enumerate(generators):
            start = [generator.standard_normal((ring[j], n, ring[j + 1])) for j, n in enumerate(dense.shape)]
            if k == 0:
                for random, core in zip(start, ring_svd(dense, rank), strict=False):
                    random *= 0.01
                    random[: core.shape[0], :, : core.shape[2]] = core
            stop = stop_rule(tolerance)

            def callback(cores: Any, error: float, start: list[Any] = start, stop: Any = stop) -> bool:
                # TensorLy's ALS takes no start of one's own, but shows its own before the first sweep.
                if not start:
                    return stop(cores, error)
                for j in reversed(range(len(rank))):
                    cores[j] = start.pop()
                return False

            yield list(
                tensor_ring_als(dense, ring, n_iter_max=n_iter, tol=0, random_state=0, callback=callback)
            )


def chain_path(levels: int) -> Tree:
    """Project every vector, multiply the small matrices along the chain, then the output core."""
    projected: list[Tree] = [(f"n{e}", e - 1) for e in range(1, levels + 1)] + [("i", levels)]
    tree = projected[0]
    for matrix in projected[1:]:
        tree = (tree, matrix)
    return (tree, levels + 1)


def chain_flops(sizes: tuple[int, ...], bonds: tuple[int, ...]) -> int:
    """FLOPs of `chain_path` for cores of shape (bonds[k], sizes[k], bonds[k + 1])."""
    first = bonds[0]
    projections = sum(a * n * b for a, n, b in zip(bonds, sizes, bonds[1:], strict=False))
    matrices = sum(first * bonds[k] * bonds[k + 1] for k in range(1, len(sizes) - 1))
    return 2 * (projections + matrices)


def ring_svd(dense: Any, rank: Rank) -> list[Any]:
    """Cores of the best TR-SVD over the modes it may begin with; none where the rank allows none.

    The two bonds of the first core together must not exceed the rank of the first unfolding. Ranks come
    out smaller where an unfolding has no more. (TensorLy's own `mode` mixes up the ranks from 2 on.)
    """
    from tensorly.base import unfold
    from tensorly.decomposition import tensor_ring
    from tensorly.tr_tensor import tr_to_tensor

    d = dense.ndim
    fits = []
    for k in range(d):
        turned = [*range(k, d), *range(k)]
        ring = [rank[j] for j in turned] + [rank[k]]
        if ring[0] * ring[1] <= min(unfold(dense, k).shape):
            cores = list(tensor_ring(dense.transpose(turned), ring))
            cores = cores[d - k :] + cores[: d - k]
            fits.append((((tr_to_tensor(cores) - dense) ** 2).sum(), k, cores))
    return min(fits)[2] if fits else []
