"""Low rank: the truncated SVD of each expert (Eckart and Young 1936)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import fits
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank, by_kind
from mumoe_tensor.formats.low_rank import LowRank


@fits.register(LowRank)
def low_rank(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """The optimal fit."""
    parts = split(format, dense)
    experts, _, outputs = map(len, by_kind(format.modes(dense.ndim - 2)))
    matrices = parts.reshape(*parts.shape[:experts], -1, prod(parts.shape[-outputs:]))
    u, s, v = np.linalg.svd(matrices, full_matrices=False)
    r = min(rank[0], s.shape[-1])
    factors = [u[..., :r] * s[..., None, :r], v[..., :r, :]]
    shapes = format.shapes(dense.shape, r)
    yield [factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True)]
