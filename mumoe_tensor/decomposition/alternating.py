"""Fits of a format to a tensor: alternating least squares, unless a format registers a method of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import singledispatch
from math import prod
from typing import Any

import numpy as np
from opt_einsum import contract_expression, get_symbol

from mumoe_tensor.formats.base import Format, Rank, mode_names

Indices = tuple[str, ...]


@singledispatch
def fits(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterable[Sequence[Any]]:
    """Fit a format to a tensor, once for each start; `mumoe_tensor.decompose` takes the best fit.

    Alternating least squares over the declared factors, from random ones. ``@fits.register(MyFormat)``
    makes a function of the same arguments the method for a class of formats.

    Parameters
    ----------
    dense : numpy.ndarray of float64
        Not all zero, its largest entry near one.
    generators : sequence of numpy.random.Generator
        One for each start. The first start is the one from singular vectors, where the method has one.
    n_iter : int
        Most sweeps over the factors for each start.
    tolerance : float
        A start ends when two sweeps in a row lower the error by less than this fraction each.

    Returns
    -------
    iterable of sequence of array or None
        Factors in the order of their declaration, for some or all of the starts; None for one of all ones.
        A bond may be smaller than in the rank: `decompose` fills it up with zeros. TensorLy's backend is
        NumPy while they are computed.
    """
    declared = format.declaration(dense.ndim - 2)
    shapes = format.shapes(dense.shape, rank)
    for generator in generators:
        start = [
            None if f.optional else generator.standard_normal(shape)
            for f, shape in zip(declared, shapes, strict=True)
        ]
        yield alternate(format, dense, start, n_iter, tolerance)


def alternate(format: Format, dense: Any, start: Sequence[Any], n_iter: int, tolerance: float) -> list[Any]:
    """Improve the factors of a format by alternating least squares."""
    modes = mode_names(dense.ndim - 2)
    indices = [f.indices for f in format.declaration(dense.ndim - 2)]
    factors = list(start)
    free = [k for k, factor in enumerate(factors) if factor is not None]
    whole = _contraction([indices[k] for k in free], [factors[k] for k in free], modes)
    updates = {k: _update(k, free, indices, factors, dense) for k in free}
    stop = stop_rule(tolerance)
    for _ in range(n_iter):
        for k in free:
            factors[k] = updates[k](factors)
        if stop(None, float(np.linalg.norm(whole(*(factors[k] for k in free)) - dense))):
            break
    return factors


def _update(
    k: int, free: Sequence[int], indices: Sequence[Indices], factors: Sequence[Any], dense: Any
) -> Callable[[Sequence[Any]], Any]:
    """Least squares for one factor, in which the tensor is linear, from all others.

    The modes that only this factor has are the right-hand sides; each entry of the modes that it shares with
    another factor is a problem by itself.
    """
    modes = mode_names(dense.ndim - 2)
    others = [j for j in free if j != k]
    elsewhere = {x for j in others for x in indices[j]}
    shared = [x for x in indices[k] if x in modes and x in elsewhere]
    alone = [x for x in indices[k] if x in modes and x not in elsewhere]
    bonds = [x for x in indices[k] if x not in modes]
    rest = [x for x in modes if x not in indices[k]]
    size = dict(zip(modes, dense.shape, strict=True)) | dict(zip(indices[k], factors[k].shape, strict=True))
    s, a, b, r = (prod(size[x] for x in group) for group in (shared, alone, bonds, rest))
    solved = [*shared, *bonds, *alone]
    shape, axes = [size[x] for x in solved], [solved.index(x) for x in indices[k]]
    by_problem = [modes.index(x) for x in (*shared, *rest, *alone)]
    design_of = _contraction(
        [indices[j] for j in others], [factors[j] for j in others], (*shared, *rest, *bonds)
    )

    def update(factors: Sequence[Any]) -> Any:
        design = design_of(*(factors[j] for j in others)).reshape(s, r, b)
        target = dense.transpose(by_problem).reshape(s, r, a)
        # (lstsq is the faster of the two, but solves one problem at a time.)
        solution = np.linalg.lstsq(design[0], target[0])[0] if s == 1 else np.linalg.pinv(design) @ target
        return solution.reshape(shape).transpose(axes)

    return update


def _contraction(operands: Sequence[Indices], arrays: Sequence[Any], output: Indices) -> Callable[..., Any]:
    """The contraction of arrays of these shapes, its path chosen once."""
    if not operands:
        return lambda: np.ones(())
    symbols = {x: get_symbol(n) for n, x in enumerate(sorted({x for indices in operands for x in indices}))}
    *inputs, result = ("".join(symbols[x] for x in indices) for indices in (*operands, output))
    expression: Callable[..., Any] = contract_expression(
        f"{','.join(inputs)}->{result}", *(array.shape for array in arrays)
    )
    return expression


def stop_rule(tolerance: float) -> Callable[[Any, float], bool]:
    """Whether to end after a sweep: once two in a row lower the error by less than a fraction each.

    Two, because TensorLy, whose callbacks have these arguments, reports an error twice after a line search.
    """
    last, stalled = float("inf"), 0

    def stop(_: Any, error: float) -> bool:
        nonlocal last, stalled
        stalled = stalled + 1 if error >= (1 - tolerance) * last else 0
        last = error
        return stalled == 2

    return stop
