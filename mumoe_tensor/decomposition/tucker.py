"""Tucker: TensorLy's higher-order orthogonal iteration (De Lathauwer et al. 2000)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from mumoe_tensor.decomposition.alternating import fits
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.tucker import Tucker


@fits.register(Tucker)
def tucker(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """Fits from singular vectors, then from random factors."""
    import tensorly.decomposition

    dense = split(format, dense)
    # A rank larger than the size of its mode or the product of the other ranks has no effect.
    ranks = [min(n, r) for n, r in zip(dense.shape, rank, strict=True)]
    ranks = [min(r, prod(ranks) // r) for r in ranks]
    for k, generator in enumerate(generators):
        start = [generator.standard_normal(shape) for shape in zip(dense.shape, ranks, strict=True)]
        init = (None, start) if k else "svd"
        core, factors = tensorly.decomposition.tucker(
            dense, ranks, n_iter_max=n_iter, init=init, tol=tolerance
        )
        yield [core, *factors]
