"""From a dense weight tensor to a factorized one. Each method of fitting a format has a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mumoe_tensor.backend import Array, check_floating, is_array, tensorly_backend, to_float64
from mumoe_tensor.checks import as_fraction, as_integer, as_positive
from mumoe_tensor.decomposition import cp, hadamard, tensor_ring, tensor_train, tucker  # noqa: F401
from mumoe_tensor.decomposition.alternating import fits
from mumoe_tensor.dense import to_dense
from mumoe_tensor.formats.base import MOST_LEVELS, Factor, Format, mode_names
from mumoe_tensor.formats.dense import Dense
from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.tensors import FactorizedTensor, as_factor

fits.register(Dense, lambda format, dense, *_: [[dense]])


def decompose(
    dense: Array | Sequence[Any],
    format: str | Format,
    rank: int | Sequence[int] | None = None,
    *,
    bias: bool | Array = False,
    n_restarts: int = 8,
    n_iter: int = 500,
    tolerance: float = 1e-5,
    seed: int | None = 0,
) -> tuple[FactorizedTensor, float]:
    """Approximate a weight tensor in a format.

    CP by alternating least squares with a line search [1]_, Tucker by higher-order orthogonal iteration
    [2]_, Tensor Train by TT-SVD [3]_, all three TensorLy's; Tensor Ring by alternating least squares from
    TensorLy's TR-SVD and from random cores [4]_; Hadamard by the best tensor of rank one for each output;
    any other format by alternating least squares over its declared factors, unless a method is registered
    for it by `.fits`.

    Parameters
    ----------
    dense : array of shape (N1, ..., NE, I, O), or nested sequence of arrays of shape (I, O)
        The weight; a sequence, the matrices of the experts, is stacked.
    rank : int or sequence of int, optional
        One entry a bond; see `Format.bonds`. Bonds larger than the tensor can use are filled up with zeros.
    bias : bool or array of shape (N1, ..., NE, O), default False
        Whether the last row of the input mode is the bias; or the biases, which become that row.
    n_restarts : int, default 8
        Number of starts, the first from singular vectors, the others random; the best fit is returned. Dense,
        TT and Hadamard with one level have one start.
    n_iter : int, default 500
        Most sweeps over the factors for each start.
    tolerance : float, default 1e-5
        A start ends when two sweeps in a row lower the error by less than this fraction each.
    seed : int, optional
        The same seed gives the same weight; None draws a new one.

    Returns
    -------
    weight : FactorizedTensor
        With the backend, dtype and device of `dense`; its factors have norms within a factor of four.
    error : float
        ``‖weight − dense‖ / ‖dense‖`` in the Frobenius norm, rounding to the dtype included.
        Zero for a tensor of zeros.

    Raises
    ------
    ValueError, TypeError
        If `dense` is no floating array, has fewer than two axes, an empty one, or an entry that is not
        finite; if another argument does not fit.

    Notes
    -----
    All arithmetic is NumPy's in float64; dtype and backend of the input only decide how the result is
    rounded. The result has no gradient with respect to `dense`.

    References
    ----------
    .. [1] T. G. Kolda, B. W. Bader, "Tensor decompositions and applications", SIAM Review 51(3), 2009.
    .. [2] L. De Lathauwer, B. De Moor, J. Vandewalle, "On the best rank-1 and rank-(R1, ..., RN)
       approximation of higher-order tensors", SIAM J. Matrix Anal. Appl. 21(4), 2000.
    .. [3] I. V. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33(5), 2011.
    .. [4] Q. Zhao, G. Zhou, S. Xie, L. Zhang, A. Cichocki, "Tensor ring decomposition",
       arXiv:1606.05535, 2016.

    Examples
    --------
    >>> import numpy as np, mumoe_tensor as mt
    >>> W = mt.FactorizedTensor.random("cp", experts=4, in_features=6, out_features=5, rank=3, seed=0)
    >>> V, error = mt.decompose(mt.to_dense(W), "cp", 3)
    >>> V.rank, error < 1e-6
    ((3,), True)
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
    shapes = format.shapes(spec.mode_sizes, spec.full_rank)
    declared = format.declaration(spec.num_levels)
    target = to_float64(dense)
    if not np.isfinite(target).all():
        raise ValueError(
            f"every entry of dense must be finite, got {np.sum(~np.isfinite(target))} that are not."
        )

    # A power of two, taken out and put back without rounding.
    exponent = int(np.frexp(np.abs(target).max())[1])
    target = np.ldexp(target, -exponent)
    norm = np.linalg.norm(target) or 1
    generators = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(n_restarts)]

    def fitted(factors: Sequence[Any]) -> tuple[FactorizedTensor, float]:
        returned = [None if factor is None else np.shape(factor) for factor in factors]
        if len(returned) != len(declared) or not all(map(_is_factor, returned, declared, shapes)):
            raise ValueError(
                f"a method must return the declared factors, of shapes {shapes} or with shorter bonds, None "
                f"only for optional ones; that of format {format.name!r} returned shapes {returned}."
            )
        weight = _as_weight(format, _balanced(factors, exponent), shapes, dense)
        exact = [None if f is None else to_float64(f) for f in weight.factors]
        product = np.ldexp(to_dense(FactorizedTensor(format, exact)), -exponent)
        return weight, float(np.linalg.norm(product - target) / norm)

    with tensorly_backend("numpy"), np.errstate(over="ignore", invalid="ignore"):
        if target.any():
            candidates = fits(format, target, spec.full_rank, generators, n_iter, tolerance)
        else:
            zeros = zip(declared, map(np.zeros, shapes), strict=True)
            candidates = [[None if f.optional else zero for f, zero in zeros]]
        # A fit that the dtype cannot hold has error NaN, and gives way to any other.
        best = min(map(fitted, candidates), key=lambda fit: np.nan_to_num(fit[1], nan=np.inf), default=None)
    if best is None:
        raise ValueError(
            f"a method must return one fit or more; that of format {format.name!r} returned none."
        )
    return best


def _is_factor(returned: tuple[int, ...] | None, f: Factor, shape: tuple[int, ...]) -> bool:
    """Whether a method returned a factor: None for an optional one, or its shape but for shorter bonds."""
    if returned is None:
        return f.optional
    modes = mode_names(MOST_LEVELS)
    return len(returned) == len(shape) and all(
        n == size or (n < size and x not in modes)
        for n, size, x in zip(returned, shape, f.indices, strict=True)
    )


def _stacked(dense: Array | Sequence[Any]) -> Array:
    if not isinstance(dense, (list, tuple)):
        return dense
    if not dense:
        raise ValueError("a sequence of experts must hold one expert or more, got none.")
    experts = [_stacked(expert) for expert in dense]
    tl = check_floating({f"dense[{k}]": expert for k, expert in enumerate(experts)})
    shapes = sorted({tuple(expert.shape) for expert in experts})
    if len(shapes) > 1:
        raise ValueError(f"the matrices of all experts must have one shape, got {shapes[0]} and {shapes[1]}.")
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


def _balanced(factors: Sequence[Any], exponent: int) -> list[Any]:
    """Bring 2^exponent into the factors and their norms near one another, by powers of two: no rounding."""
    held = [k for k, factor in enumerate(factors) if factor is not None]
    exponents = {k: int(np.frexp(np.linalg.norm(factors[k]))[1]) for k in held}
    each, more = divmod(sum(exponents.values()) + exponent, len(held))
    balanced = list(factors)
    for position, k in enumerate(held):
        balanced[k] = np.ldexp(factors[k], each + (position < more) - exponents[k])
    return balanced


def _as_weight(
    format: Format, factors: Sequence[Any], shapes: Sequence[tuple[int, ...]], like: Array
) -> FactorizedTensor:
    """Fill bonds up with zeros, and take on the kind of `like` and the memory order of the format."""
    arrays = list(factors)
    parts = zip(factors, shapes, format.declaration(len(like.shape) - 2), strict=True)
    for k, (factor, shape, f) in enumerate(parts):
        if factor is not None:
            padded = np.pad(factor, [(0, size - n) for size, n in zip(shape, factor.shape, strict=True)])
            arrays[k] = as_factor(padded.transpose([f.indices.index(x) for x in f.memory_order]), f, like)
    return FactorizedTensor(format, arrays)
