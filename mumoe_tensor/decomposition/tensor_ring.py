"""Tensor Ring: alternating least squares (Zhao et al. 2016, algorithm 2), first from TR-SVD (algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import alternate, fits, random_factors
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.tensor_ring import TensorRing


@fits.register(TensorRing)
def tensor_ring(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """Fits from singular vectors, then from random cores."""
    parts = split(format, dense)
    if parts.ndim == 2:
        yield matrix_ring(parts, rank)
        return
    for k, generator in enumerate(generators):
        start = random_factors(format, dense.shape, rank, generator)
        if k == 0:
            for random, core in zip(start, ring_svd(parts, rank), strict=False):
                random *= 0.01
                random[: core.shape[0], :, : core.shape[2]] = core
        yield alternate(format, dense, start, n_iter, tolerance)


def matrix_ring(dense: Any, rank: Rank) -> list[Any]:
    """Two cores for a matrix: its truncated SVD, with the product of the two bonds as its rank."""
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    k = min(prod(rank), len(s))
    left, right = np.zeros((len(u), prod(rank))), np.zeros((prod(rank), v.shape[1]))
    left[:, :k], right[:k] = u[:, :k], s[:k, None] * v[:k]
    return [left.reshape(-1, *rank).transpose(1, 0, 2), right.reshape(*rank, -1).transpose(1, 2, 0)]


def ring_svd(dense: Any, rank: Rank) -> list[Any]:
    """Cores of the best TR-SVD over all first modes; an empty list if the rank allows none.

    The product of the two bonds of the first core must not exceed the rank of the first unfolding. Bonds are
    smaller if an unfolding has a smaller rank. TensorLy's `mode` argument confuses the ranks from mode 2 on.
    """
    from tensorly.base import unfold
    from tensorly.decomposition import tensor_ring
    from tensorly.tr_tensor import tr_to_tensor

    d = dense.ndim
    candidates = []
    for k in range(d):
        turned = [*range(k, d), *range(k)]
        ring = [rank[j] for j in turned] + [rank[k]]
        if ring[0] * ring[1] <= min(unfold(dense, k).shape):
            cores = list(tensor_ring(dense.transpose(turned), ring))
            cores = cores[d - k :] + cores[: d - k]
            candidates.append((((tr_to_tensor(cores) - dense) ** 2).sum(), k, cores))
    return min(candidates)[2] if candidates else []
