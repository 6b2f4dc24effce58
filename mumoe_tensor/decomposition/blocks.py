"""Monarch and Block Tensor Train: the singular value decomposition of each block (Dao et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import alternate, fits, random_factors
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.btt import BTT
from mumoe_tensor.formats.monarch import Monarch


@fits.register(BTT)
def btt(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """The truncated SVD of each block, which is optimal; with experts, alternating least squares.

    The first start uses singular vectors of the expert modes, and of the blocks mixed by them.
    """
    parts, (r,) = split(format, dense), rank
    if dense.ndim == 2:
        yield list(block_svd(parts, r))
        return
    for k, generator in enumerate(generators):
        start = random_factors(format, dense.shape, rank, generator)
        if k == 0:
            *experts, first, second = start
            mixed = parts[..., None]
            for level, factor in enumerate(experts):
                vectors = singular_vectors(np.moveaxis(parts, level, 0).reshape(len(factor), -1))[:, :r]
                factor[:, : vectors.shape[1]] = vectors
                mixed = np.einsum("n...r,nr->...r", mixed, factor)
            for bond in range(r):
                ends = block_svd(mixed[..., bond], 1)
                first[:, :, bond], second[:, :, bond] = ends[0][:, :, 0], ends[1][:, :, 0]
        yield alternate(format, dense, start, n_iter, tolerance)


@fits.register(Monarch)
def monarch(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """The best rank-one matrix for each block; with experts, a rank-one tensor by alternating least squares.

    The first start uses the leading singular vectors of all unfoldings of each block.
    """
    parts = split(format, dense)
    if dense.ndim == 2:
        yield [factor[:, :, 0] for factor in block_svd(parts, 1)]
        return
    blocks = np.moveaxis(parts, (-4, -2), (0, 1))  # i1 o1 n.. i2 o2
    for k, generator in enumerate(generators):
        start = random_factors(format, dense.shape, rank, generator)
        if k == 0:
            unfolded = [
                np.moveaxis(blocks, axis, 2).reshape(*blocks.shape[:2], blocks.shape[axis], -1)
                for axis in range(2, blocks.ndim)
            ]
            *experts, first, second = (singular_vectors(matrix)[..., 0] for matrix in unfolded)
            start = [np.moveaxis(vector, 2, 0) for vector in experts]
            start += [first.transpose(0, 2, 1), second.transpose(1, 0, 2)]
        yield alternate(format, dense, start, n_iter, tolerance)


def block_svd(parts: Any, r: int) -> tuple[Any, Any]:
    """Truncated SVD of each matrix (I2, O2) in a tensor (I1, I2, O1, O2).

    The factors have shapes (I1, I2, r, O1) and (O1, I1, r, O2).
    """
    u, s, v = np.linalg.svd(parts.transpose(0, 2, 1, 3), full_matrices=False)  # i1 o1 i2 r, r o2
    left, right = u[..., :r] * s[..., None, :r], v[..., :r, :]
    return left.transpose(0, 2, 3, 1), right.transpose(1, 0, 2, 3)


def singular_vectors(matrix: Any) -> Any:
    """The left singular vectors, in descending order."""
    return np.linalg.svd(matrix, full_matrices=False)[0]
