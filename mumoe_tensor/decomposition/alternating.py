"""Fits of a format to a tensor: alternating least squares, unless another method is registered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import singledispatch
from math import prod
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.terms import TermView, balanced, contraction, views
from mumoe_tensor.formats.base import Format, Rank


@singledispatch
def fits(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterable[Sequence[Any]]:
    """Fit a format to a tensor, once for each start; `mumoe_tensor.decompose` returns the best fit.

    The default method is alternating least squares over the declared factors, from random starts.
    ``@fits.register(MyFormat)`` registers a function with the same arguments as the method for a class of
    formats.

    Parameters
    ----------
    dense : numpy.ndarray of float64, of shape (N1, ..., NE, I, O)
        The tensor, which is nonzero and has a largest entry near one. `split` reshapes it to the parts of
        split modes.
    generators : sequence of numpy.random.Generator
        One for each start. The first start uses singular vectors instead, if the method supports it.
    n_iter : int
        Maximum number of sweeps over the factors for each start.
    tolerance : float
        A start ends when each of two consecutive sweeps reduces the error by less than this fraction.

    Returns
    -------
    iterable of sequence of array or None
        Factors in the order of their declaration, for some or all of the starts; None for a factor of all
        ones. A bond may be smaller than in the rank, since `decompose` pads it with zeros. If a mode is
        padded, the method may treat the padding as zeros, since `decompose` then improves the best fit,
        ignoring the padding. TensorLy's backend is NumPy during the computation.
    """
    for generator in generators:
        start = random_factors(format, dense.shape, rank, generator)
        yield alternate(format, dense, start, n_iter, tolerance)


def scaled_fits(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[Sequence[Any]]:
    """Like `fits`, for a tensor of any scale, including zero."""
    exponent = int(np.frexp(np.abs(dense).max())[1])
    if not dense.any():
        pairs = zip(format.declaration(dense.ndim - 2), format.shapes(dense.shape, rank), strict=True)
        yield [None if f.optional else np.zeros(shape) for f, shape in pairs]
        return
    for factors in fits(format, np.ldexp(dense, -exponent), rank, generators, n_iter, tolerance):
        yield balanced(format, dense.ndim - 2, factors, exponent) if exponent else factors


def random_factors(format: Format, shape: Sequence[int], rank: Rank, generator: Any) -> list[Any]:
    """Factors with normally distributed entries, None for optional factors."""
    pairs = zip(format.declaration(len(shape) - 2), format.shapes(shape, rank), strict=True)
    return [None if f.optional else generator.standard_normal(size) for f, size in pairs]


def alternate(format: Format, dense: Any, start: Sequence[Any], n_iter: int, tolerance: float) -> list[Any]:
    """Improve the factors of one term by alternating least squares, treating padding as zeros."""
    factors, (view,) = list(start), views(format, dense.shape)
    target = view.take(dense)
    problems = {k: Problem(view, k, factors) for k in view.operands(factors)}
    whole, stop = contraction(view.operands(factors), view.modes), stop_rule(tolerance)
    for _ in range(n_iter):
        for k, problem in problems.items():
            factors[k] = problem.solve(factors, target)
        if stop(None, float(np.linalg.norm(whole(*(factors[k] for k in problems)) - target))):
            break
    return factors


class Problem:
    """The least-squares problem for one factor of a term.

    The modes that only this factor has form the right-hand sides. Each entry of the modes that it shares with
    other factors is a separate problem.

    Parameters
    ----------
    factors : sequence of array or None
        The factors of all terms, also in the methods.
    """

    def __init__(self, view: TermView, k: int, factors: Sequence[Any]):
        operands = view.operands(factors)
        indices, shape = operands.pop(k)
        elsewhere = {x for axes, _ in operands.values() for x in axes}
        shared = [x for x in indices if x in view.modes and x in elsewhere]
        alone = [x for x in indices if x in view.modes and x not in elsewhere]
        bonds = [x for x in indices if x not in view.modes]
        rest = [x for x in view.modes if x not in indices]
        size = dict(zip((*view.modes, *indices), (*view.shape, *shape), strict=True))
        self.others = list(operands)
        self.sizes = tuple(prod(size[x] for x in group) for group in (shared, rest, bonds, alone))
        solved = [*shared, *bonds, *alone]
        self.shape, self.axes = [size[x] for x in solved], [solved.index(x) for x in indices]
        self.by_problem = [view.modes.index(x) for x in (*shared, *rest, *alone)]
        self._design = contraction(operands, (*shared, *rest, *bonds))
        twice = {
            (j, 2): (tuple(f"{x}'" if x in bonds else x for x in axes), shape)
            for j, (axes, shape) in operands.items()
        }
        self._gram = contraction(operands | twice, (*shared, *bonds, *(f"{x}'" for x in bonds)))

    def solve(self, factors: Sequence[Any], target: Any) -> Any:
        """The best factor, with the other factors fixed."""
        s, r, b, a = self.sizes
        design = self._design(*(factors[j] for j in self.others)).reshape(s, r, b)
        right = target.transpose(self.by_problem).reshape(s, r, a)
        # lstsq is faster than pinv, but solves only one problem at a time.
        if s == 1:
            return self.factor(np.linalg.lstsq(design[0], right[0])[0])
        return self.factor(np.linalg.pinv(design) @ right)

    def gram(self, factors: Sequence[Any]) -> Any:
        """The matrices of the normal equations."""
        s, _, b, _ = self.sizes
        return self._gram(*(factors[j] for j in (*self.others, *self.others))).reshape(s, b, b)

    def factor(self, solution: Any) -> Any:
        return solution.reshape(self.shape).transpose(self.axes)

    def columns(self, factor: Any) -> Any:
        """The inverse of `factor`."""
        s, _, b, a = self.sizes
        return factor.transpose(np.argsort(self.axes)).reshape(s, b, a)


def stop_rule(tolerance: float) -> Callable[[Any, float], bool]:
    """A callback that stops when each of two consecutive sweeps reduces the error by less than a fraction.

    Two sweeps are required because TensorLy, which calls it, reports the same error twice after a line
    search.
    """
    last, stalled = float("inf"), 0

    def stop(_: Any, error: float) -> bool:
        nonlocal last, stalled
        stalled = stalled + 1 if error >= (1 - tolerance) * last else 0
        last = error
        return stalled == 2

    return stop
