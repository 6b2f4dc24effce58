"""Decomposition of dense weight tensors into a format. Each method has its own file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from mumoe_tensor.backend import Array, check_floating, is_array, tensorly_backend, to_float64
from mumoe_tensor.checks import as_fraction, as_integer, as_positive
from mumoe_tensor.decomposition import (  # noqa: F401
    blocks,
    cp,
    hadamard,
    kronecker,
    low_rank,
    sums,
    tensor_ring,
    tensor_train,
    tt_matrix,
    tucker,
)
from mumoe_tensor.decomposition.alternating import fits, scaled_fits
from mumoe_tensor.decomposition.joint import improve, weighted_norm
from mumoe_tensor.decomposition.terms import balanced, split, views
from mumoe_tensor.decomposition.whitening import input_axes, read_covariance, whitened_fits
from mumoe_tensor.dense import to_dense
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.dense import Dense
from mumoe_tensor.formats.registry import AnyFormat, get_format
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.tensors import FactorizedTensor, as_factor

fits.register(Dense, lambda format, dense, *_: [[split(format, dense)]])


def decompose(
    dense: Array | Sequence[Any],
    format: AnyFormat,
    rank: int | Sequence[int] | None = None,
    *,
    bias: bool | Array = False,
    input_covariance: Array | None = None,
    n_restarts: int = 8,
    n_iter: int = 500,
    tolerance: float = 1e-5,
    seed: int | None = 0,
) -> tuple[FactorizedTensor, float]:
    """Approximate a weight tensor in a format.

    The method depends on the format:

    - CP: alternating least squares with a line search [1]_, Tucker: higher-order orthogonal iteration
      [2]_, Tensor Train: TT-SVD [3]_. TensorLy computes all three, also for split modes.
    - TT-matrix: TT-SVD over pairs of parts.
    - Tensor Ring: alternating least squares, starting from TensorLy's TR-SVD and from random cores [4]_.
    - Hadamard: the best rank-one tensor for each output.
    - Low rank: the singular value decomposition (SVD) of each expert.
    - Kronecker: the SVD of the rearranged matrix [5]_, or CP of the rearranged tensor.
    - Monarch [6]_ and Block Tensor Train: the SVD of each block, followed by alternating least squares if
      there are experts.
    - Sums: each term is fitted to the residual of the previous terms. Then damped Gauss-Newton steps [8]_
      improve all terms together; they also start from random factors.
    - Any other format: alternating least squares over its declared factors, unless a method is registered
      with `.fits`.

    Parameters
    ----------
    dense : array of shape (N1, ..., NE, I, O), or nested sequence of arrays of shape (I, O)
        The weight. A sequence contains the matrices of the experts, which are stacked.
    rank : int or sequence of int, optional
        One entry per bond; see `Format.bonds`. Bonds larger than the tensor can use are padded with zeros.
    bias : bool or array of shape (N1, ..., NE, O), default False
        Whether the last row of the input mode is the bias, or the biases, which are appended as that row. If
        the input is split, the weight is a sum with one bias for all experts, the mean of their biases.
    input_covariance : array of shape (I, I) or (N1, ..., NE, I, I), optional
        The mean of ``z zᵀ`` over inputs z, not centred; with a bias, each z ends with a 1. The fit then
        minimises the error in the outputs ``z @ dense``. If each expert has different inputs, pass one matrix
        per expert: the sum over its inputs, divided by the number of inputs of all experts.
    n_restarts : int, default 8
        Number of starts, the first from singular vectors, the others random; the best fit is returned. Dense,
        TT, and Hadamard with one level have one start.
    n_iter : int, default 500
        Maximum number of sweeps over the factors for each start. The maximum number of Gauss-Newton steps is
        50, or a tenth of `n_iter` if that is larger.
    tolerance : float, default 1e-5
        A start ends when each of two consecutive sweeps reduces the error by less than this fraction.
    seed : int, optional
        Seed of the random starts. With None, results are not reproducible.

    Returns
    -------
    weight : FactorizedTensor
        A weight with the backend, dtype and device of `dense`. The norms of its factors differ by at most a
        factor of four.
    error : float
        ``‖weight − dense‖ / ‖dense‖`` in the Frobenius norm, including rounding to the dtype; with
        `input_covariance` C, in the norm ``‖C^(1/2) ·‖``. Zero for a tensor of zeros.

    Raises
    ------
    ValueError, TypeError
        If `dense` is not a floating-point array, has fewer than two axes, an empty axis, or a non-finite
        entry; if the covariance is not symmetric and positive semi-definite; or if another argument does not
        fit.

    Notes
    -----
    All computations use NumPy in float64; the dtype and backend of the input affect only the final rounding.
    The result is detached from `dense`: it has no gradient.

    The error does not include the padding of a split mode: Gauss-Newton steps that ignore the padding improve
    the best fit to the tensor padded with zeros.

    With a covariance, a format whose terms each have the input mode in a single factor is fitted to ``C^(1/2)
    @ dense``, and this factor is multiplied by the inverse of the root (whitening, as in [7]_). With one
    covariance per expert, this requires that the factor also has all expert modes, as in low rank; otherwise
    the first fit uses the mean of the covariances. In all other cases, Gauss-Newton steps improve the better
    of the weighted and unweighted fits. The error never exceeds that of the unweighted fit.

    References
    ----------
    .. [1] T. G. Kolda, B. W. Bader, "Tensor decompositions and applications", SIAM Review 51(3), 2009.
    .. [2] L. De Lathauwer, B. De Moor, J. Vandewalle, "On the best rank-1 and rank-(R1, ..., RN)
       approximation of higher-order tensors", SIAM J. Matrix Anal. Appl. 21(4), 2000.
    .. [3] I. V. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33(5), 2011.
    .. [4] Q. Zhao, G. Zhou, S. Xie, L. Zhang, A. Cichocki, "Tensor ring decomposition",
       arXiv:1606.05535, 2016.
    .. [5] C. F. Van Loan, N. Pitsianis, "Approximation with Kronecker products", Linear Algebra for Large
       Scale and Real-Time Applications, 1993.
    .. [6] T. Dao et al., "Monarch: Expressive structured matrices for efficient and accurate training",
       arXiv:2204.00595, 2022.
    .. [7] X. Wang, Y. Zheng, Z. Wan, M. Zhang, "SVD-LLM: Truncation-aware singular value decomposition for
       large language model compression", arXiv:2403.07378, 2024.
    .. [8] L. Sorber, M. Van Barel, L. De Lathauwer, "Optimization-based algorithms for tensor
       decompositions", SIAM J. Optim. 23(2), 2013.

    Examples
    --------
    >>> import numpy as np, mumoe_tensor as mt
    >>> W = mt.FactorizedTensor.random("cp", experts=4, in_features=6, out_features=5, rank=3, seed=0)
    >>> V, error = mt.decompose(mt.to_dense(W), "cp", 3)
    >>> V.rank, error < 1e-6
    ((3,), True)

    The best sum of two Kronecker products, for inputs whose first entry varies most:

    >>> M, covariance = np.random.default_rng(0).standard_normal((6, 8)), np.diag([9.0, 1, 1, 1, 1, 1])
    >>> mt.decompose(M, "kron", 2, input_covariance=covariance)[0]
    FactorizedTensor('kron', shape=(6, 8), rank=(2,), float64, numpy)
    """
    format = get_format(format)
    n_restarts = as_positive(n_restarts, "n_restarts")
    n_iter = as_positive(n_iter, "n_iter")
    tolerance = as_fraction(tolerance, "tolerance")
    if seed is not None and as_integer(seed, "seed") < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    dense = _stacked(dense)
    check_floating({"dense": dense})
    if len(dense.shape) < 2:
        raise ValueError(f"dense must have shape (experts..., input, output), got {tuple(dense.shape)}.")
    dense = _with_bias(dense, bias)
    *experts, i, o = dense.shape
    row = bias is not False
    spec = LayerSpec(format, experts=experts, in_features=i - row, out_features=o, rank=rank, bias=row)
    format, levels, rank = spec.weight_format, spec.num_levels, spec.full_rank
    target = to_float64(dense)
    if not np.isfinite(target).all():
        raise ValueError(
            f"every entry of dense must be finite, got {np.sum(~np.isfinite(target))} that are not."
        )
    covariance = None if input_covariance is None else read_covariance(input_covariance, experts, i)

    # Scaling by a power of two does not round.
    exponent = int(np.frexp(np.abs(target).max())[1])
    target = np.ldexp(target, -exponent)
    norm = weighted_norm(target, covariance) or 1
    generators = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(n_restarts)]
    effort = (rank, generators, n_iter, tolerance)

    def fitted(factors: Sequence[Any]) -> tuple[FactorizedTensor, float]:
        _check_factors(format, spec.mode_sizes, rank, factors)
        arrays = _as_arrays(
            format, balanced(format, levels, factors, exponent), format.shapes(dense.shape, rank), dense
        )
        weight = FactorizedTensor(format, arrays, spec.mode_sizes)
        exact = [None if f is None else to_float64(f) for f in weight.factors]
        product = np.ldexp(to_dense(FactorizedTensor(format, exact, spec.mode_sizes)), -exponent)
        return weight, weighted_norm(product - target, covariance) / norm

    def best_of(candidates: Iterable[Sequence[Any]]) -> tuple[Sequence[Any], FactorizedTensor, float]:
        fits = ((factors, *fitted(factors)) for factors in candidates)
        # A fit that overflows in the dtype has error NaN, and is used only if there is no other.
        best = min(fits, key=lambda fit: np.nan_to_num(fit[-1], nan=np.inf), default=None)
        if best is None:
            raise ValueError(
                f"a method must return at least one fit; the method of format {format.name!r} returned none."
            )
        return best

    with tensorly_backend("numpy"), np.errstate(over="ignore", invalid="ignore"):
        candidates: Iterable[Sequence[Any]] = scaled_fits(format, target, *effort)
        white = None if covariance is None else _whitened_by(format, levels, covariance)
        if white is not None:
            candidates = chain(candidates, whitened_fits(format, target, *effort, white))
        start, weight, error = best_of(candidates)
        is_padded = any(view.is_padded for view in views(format, target.shape))
        if is_padded or white is not covariance:
            improved = improve(format, target, start, n_iter, tolerance, covariance)
            _, weight, error = best_of([start, improved])
    return weight, error


def _whitened_by(format: Format, num_levels: int, covariance: Any) -> Any | None:
    """The covariance for whitening a fit: the given one, the mean over all experts, or None."""
    for each in (covariance, covariance.mean(tuple(range(covariance.ndim - 2)))):
        if input_axes(format, num_levels, each.ndim > 2) is not None:
            return each
    return None


def _check_factors(format: Format, mode_sizes: Sequence[int], rank: Rank, factors: Sequence[Any]) -> None:
    """Check that a method returned the declared factors. Bonds may be smaller, optional factors None."""
    declared, shapes = format.declaration(len(mode_sizes) - 2), format.shapes(mode_sizes, rank)
    bonds = format.bonds(len(mode_sizes) - 2)
    returned = [None if factor is None else np.shape(factor) for factor in factors]
    matches = len(returned) == len(declared) and all(
        f.optional
        if got is None
        else len(got) == len(shape)
        and all(
            n == size or (n < size and x in bonds) for n, size, x in zip(got, shape, f.indices, strict=True)
        )
        for got, shape, f in zip(returned, shapes, declared, strict=True)
    )
    if not matches:
        raise ValueError(
            f"a method must return the declared factors, of shapes {shapes} or with smaller bonds, and None "
            f"only for optional factors; the method of format {format.name!r} returned shapes {returned}."
        )


def _stacked(dense: Array | Sequence[Any]) -> Array:
    if not isinstance(dense, (list, tuple)):
        return dense
    if not dense:
        raise ValueError("a sequence of experts must contain at least one expert, got none.")
    experts = [_stacked(expert) for expert in dense]
    tl = check_floating({f"dense[{k}]": expert for k, expert in enumerate(experts)})
    shapes = sorted({tuple(expert.shape) for expert in experts})
    if len(shapes) > 1:
        raise ValueError(
            f"the matrices of all experts must have the same shape, got {shapes[0]} and {shapes[1]}."
        )
    return tl.stack(experts)


def _with_bias(dense: Array, bias: bool | Array) -> Array:
    if isinstance(bias, bool):
        return dense
    if not is_array(bias):
        raise TypeError(f"bias must be True, False or a plain array, got {type(bias).__name__}.")
    tl = check_floating({"dense": dense, "bias": bias})
    if tuple(bias.shape) != (*dense.shape[:-2], *dense.shape[-1:]):
        raise ValueError(
            f"bias must have the shape of dense without its input mode, got {tuple(bias.shape)} for dense of "
            f"shape {tuple(dense.shape)}."
        )
    return tl.concatenate([dense, bias[..., None, :]], axis=-2)


def _as_arrays(
    format: Format, factors: Sequence[Any], shapes: Sequence[tuple[int, ...]], like: Array
) -> list[Any]:
    """Pad bonds with zeros, and convert to the backend, dtype and device of `like` in memory order."""
    arrays = list(factors)
    parts = zip(factors, shapes, format.declaration(len(like.shape) - 2), strict=True)
    for k, (factor, shape, f) in enumerate(parts):
        if factor is not None:
            padded = np.pad(factor, [(0, size - n) for size, n in zip(shape, factor.shape, strict=True)])
            arrays[k] = as_factor(padded.transpose([f.indices.index(x) for x in f.memory_order]), f, like)
    return arrays
