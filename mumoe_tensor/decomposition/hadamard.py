"""Hadamard: the best rank-one tensor for each output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import alternate, fits
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.hadamard import Hadamard


@fits.register(Hadamard)
def hadamard(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """Fits from singular vectors, then from random factors; each output uses its best start.

    With at most one level of experts, the first start is optimal.
    """
    parts = split(format, dense)
    *others, o = parts.shape
    best: list[Any] = []
    for k, generator in enumerate(generators if len(others) > 2 else generators[:1]):
        start = [generator.standard_normal((n, o)) for n in others] if k else singular_vectors(parts)
        factors = alternate(format, dense, start, n_iter, tolerance)
        # The residual of least squares is orthogonal to the fit, so a larger fit has a smaller residual.
        better = norms(factors) > norms(best) if best else True
        best = [np.where(better, f, b) for f, b in zip(factors, best or factors, strict=True)]
        yield best


def singular_vectors(dense: Any) -> list[Any]:
    """The leading singular vector of each unfolding of each output."""
    starts = []
    for mode, n in enumerate(dense.shape[:-1]):
        unfolded = np.moveaxis(dense, (-1, mode), (0, 1)).reshape(dense.shape[-1], n, -1)
        starts.append(np.linalg.svd(unfolded, full_matrices=False)[0][:, :, 0].T)
    return starts


def norms(factors: Sequence[Any]) -> Any:
    """Squared norm of the tensor of each output."""
    return prod((f**2).sum(0) for f in factors)
