"""Sums: each term is fitted to the residual of the previous terms, then all terms are fitted together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import fits, random_factors, scaled_fits
from mumoe_tensor.decomposition.joint import improve
from mumoe_tensor.decomposition.terms import views
from mumoe_tensor.dense import to_dense
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.sums import Bias, Shared, Sliced, Sum
from mumoe_tensor.tensors import FactorizedTensor


@fits.register(Sum)
def sum_of_terms(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """Fits that start from successive best fits of the terms to the residual, then from random factors."""
    first: list[Any] = []
    residual = dense.copy()
    for term, view in zip(format.terms(dense.shape, rank), views(format, dense.shape), strict=True):
        seen = residual[..., view.rows, :]
        best = seen
        for factors in scaled_fits(term.format, seen, term.rank, generators, n_iter, tolerance):
            left = seen - to_dense(FactorizedTensor(term.format, factors, term.mode_sizes))
            if best is seen or np.linalg.norm(left) < np.linalg.norm(best):
                best, chosen = left, factors
        seen[...] = best
        first += chosen
    yield first
    for k, generator in enumerate(generators):
        start = random_factors(format, dense.shape, rank, generator) if k else first
        yield improve(format, dense, start, n_iter, tolerance)


@fits.register(Shared)
def shared(
    format: Shared, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterable[Sequence[Any]]:
    """The fit to the mean of all experts, which is optimal in the sum of squares."""
    mean = dense.mean(tuple(range(dense.ndim - 2)))
    return scaled_fits(format.format, mean, rank, generators, n_iter, tolerance)


@fits.register(Sliced)
def sliced(
    format: Sliced, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterable[Sequence[Any]]:
    """The fit to the experts of the slice."""
    experts = dense.take(range(format.start, format.stop), format.level)
    return scaled_fits(format.format, experts, rank, generators, n_iter, tolerance)


@fits.register(Bias)
def bias(format: Format, dense: Any, *_: Any) -> list[list[Any]]:
    """The mean of the biases of all experts."""
    return [[dense.mean(tuple(range(dense.ndim - 1)))]]
