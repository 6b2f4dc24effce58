"""Kronecker: rearrange the tensor so that a Kronecker product has rank one (Van Loan and Pitsianis 1993)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import fits
from mumoe_tensor.decomposition.cp import cp
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank, by_kind
from mumoe_tensor.formats.cp import CP
from mumoe_tensor.formats.kronecker import Kronecker


@fits.register(Kronecker)
def kronecker(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """The truncated SVD of the rearranged matrix, which is optimal; CP if there are more than two modes."""
    paired = pair_parts(format, dense)
    fitted: Iterable[list[Any]]
    if paired.ndim == 2:
        u, s, v = np.linalg.svd(paired, full_matrices=False)
        fitted = [[u[:, : rank[0]] * s[: rank[0]], v[: rank[0]].T]]
    else:
        fitted = (factors[1:] for factors in cp(CP(), paired, rank, generators, n_iter, tolerance))
    for factors in fitted:
        shapes = format.shapes(dense.shape, factors[0].shape[1])
        yield [factor.reshape(shape) for factor, shape in zip(factors, shapes, strict=True)]


def pair_parts(format: Format, dense: Any) -> Any:
    """Rearrange a tensor to shape (experts..., I1 O1, I2 O2, ...), with one mode per pair of parts."""
    parts = split(format, dense)
    experts, inputs, _ = map(len, by_kind(format.modes(dense.ndim - 2)))
    pairs = [(k, k + inputs) for k in range(experts, experts + inputs)]
    sizes = [parts.shape[i] * parts.shape[o] for i, o in pairs]
    axes = [*range(experts), *(axis for pair in pairs for axis in pair)]
    return parts.transpose(axes).reshape(*parts.shape[:experts], *sizes)
