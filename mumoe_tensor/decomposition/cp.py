"""CP: TensorLy's alternating least squares (Kolda and Bader 2009, figure 3.3) with a line search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import fits, stop_rule
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.cp import CP


@fits.register(CP)
def cp(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """Fits from singular vectors, then from eigenvectors, then from random factors."""
    (r,), dense = rank, split(format, dense)
    for k, generator in enumerate(generators):
        start = [generator.standard_normal((n, r)) for n in dense.shape]
        if k == 0:
            with_singular_vectors(dense, start)
        elif k == 1:
            start = from_eigenvectors(dense, r, generator) or start
        yield [None, *improved(dense, start, n_iter, tolerance)]


def improved(dense: Any, factors: list[Any], n_iter: int, tolerance: float) -> list[Any]:
    """Improve the factors by TensorLy's alternating least squares."""
    from tensorly.decomposition import parafac

    stop = stop_rule(tolerance)

    def callback(fit: Any, error: float) -> bool:
        factors[:] = fit.factors
        return stop(fit, error)

    # The first ridge is too small to affect a fit, but keeps the systems regular if components vanish or
    # coincide. If a system is still singular, a larger ridge is used. TensorLy calls the callback only if tol
    # > 0.
    for ridge in (1e-14, 1e-11, 1e-8):
        options = {"l2_reg": ridge, "linesearch": True, "callback": callback}
        with suppress(np.linalg.LinAlgError):
            parafac(dense, factors[0].shape[1], n_iter, init=(None, factors), tol=1e-300, **options)
            break
    return factors


def with_singular_vectors(dense: Any, factors: Sequence[Any]) -> None:
    """Replace the first columns of each factor by the leading singular vectors of its unfolding."""
    from tensorly.base import unfold
    from tensorly.tenalg.svd import svd_interface

    for mode, factor in enumerate(factors):
        matrix = unfold(dense, mode)
        width = min(factor.shape[1], *matrix.shape)
        factor[:, :width] = svd_interface(matrix, n_eigenvecs=width)[0]


def from_eigenvectors(dense: Any, r: int, generator: Any) -> list[Any]:
    """Factors from the eigenvectors of two random mixtures of slices (Leurgans et al. 1993).

    Exact if the tensor has rank r and at least two of its modes have r or more entries. Alternating least
    squares alone gets stuck in this case if the other modes are small. The result is empty if no two modes
    are this large or the eigenvectors are not real.
    """
    from tensorly.base import unfold
    from tensorly.tenalg import multi_mode_dot
    from tensorly.tenalg.svd import svd_interface

    *others, p, q = sorted(range(dense.ndim), key=lambda mode: dense.shape[mode])
    if not others or dense.shape[p] < r:
        return []
    bases = [svd_interface(unfold(dense, mode), n_eigenvecs=r)[0] for mode in (p, q)]
    slices = multi_mode_dot(dense, bases, modes=[p, q], transpose=True).transpose(*others, p, q)
    a, b = np.tensordot(generator.standard_normal((2, *slices.shape[:-2])), slices, dense.ndim - 2)
    try:
        values, left = np.linalg.eig(a @ np.linalg.inv(b))
        right = np.linalg.inv(left) @ b
        # slice = left @ diag(terms) @ right for every slice
        terms = np.einsum("ri,...ij,jr->...r", np.linalg.inv(left), slices, np.linalg.inv(right))
    except np.linalg.LinAlgError:
        return []
    if np.iscomplexobj(values):
        return []
    factors = {p: bases[0] @ left, q: bases[1] @ right.T}
    for k, mode in enumerate(others):
        rows = np.moveaxis(terms, k, 0).reshape(dense.shape[mode], -1, r)
        factors[mode] = np.einsum("nmr,mr->nr", rows, generator.standard_normal(rows.shape[1:]))
    return [factors[mode] for mode in range(dense.ndim)]
