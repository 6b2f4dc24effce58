"""Fits of a format to a tensor: alternating least squares, unless a format registers a method of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import singledispatch
from math import prod
from typing import Any

import numpy as np
from opt_einsum import contract_expression, get_symbol

from mumoe_tensor.decomposition.terms import TermView, balanced, views
from mumoe_tensor.formats.base import Format, Rank

Indices = tuple[str, ...]
#: Most steps of conjugate gradients for one factor in one sweep.
STEPS = 10
#: Largest product of bonds for whose problems of least squares matrices are formed in conjugate gradients.
LARGEST = 2048


@singledispatch
def fits(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterable[Sequence[Any]]:
    """Fit a format to a tensor, once for each start; `mumoe_tensor.decompose` takes the best fit.

    Alternating least squares over the declared factors, from random ones. ``@fits.register(MyFormat)``
    makes a function of the same arguments the method for a class of formats.

    Parameters
    ----------
    dense : numpy.ndarray of float64, of shape (N1, ..., NE, I, O)
        Not all zero, its largest entry near one. `split` gives it an axis for each part of a mode.
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
        A bond may be smaller than in the rank: `decompose` fills it up with zeros. Where a mode is padded,
        the method may take the padding for zeros: `decompose` goes on with alternating least squares, which
        leaves it out. TensorLy's backend is NumPy while they are computed.
    """
    for generator in generators:
        start = random_factors(format, dense.shape, rank, generator)
        yield alternate(format, dense, start, n_iter, tolerance)


def scaled_fits(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[Sequence[Any]]:
    """As `fits`, for a tensor of any scale, or of zeros."""
    exponent = int(np.frexp(np.abs(dense).max())[1])
    if not dense.any():
        pairs = zip(format.declaration(dense.ndim - 2), format.shapes(dense.shape, rank), strict=True)
        yield [None if f.optional else np.zeros(shape) for f, shape in pairs]
        return
    for factors in fits(format, np.ldexp(dense, -exponent), rank, generators, n_iter, tolerance):
        yield balanced(format, dense.ndim - 2, factors, exponent) if exponent else factors


def random_factors(format: Format, shape: Sequence[int], rank: Rank, generator: Any) -> list[Any]:
    """Normal factors, None for optional ones."""
    pairs = zip(format.declaration(len(shape) - 2), format.shapes(shape, rank), strict=True)
    return [None if f.optional else generator.standard_normal(size) for f, size in pairs]


def alternate(
    format: Format,
    dense: Any,
    start: Sequence[Any],
    n_iter: int,
    tolerance: float,
    covariance: Any | None = None,
) -> list[Any]:
    """Improve factors by alternating least squares, term by term, each against what the others leave.

    Entries of padded modes have no weight. With a covariance of inputs the error is weighted by it.
    """
    factors = list(start)
    terms = [_Term(view, factors, covariance) for view in views(format, dense.shape)]
    fitted = [term.product(factors) for term in terms]
    stop = stop_rule(tolerance)
    for _ in range(n_iter):
        for k, term in enumerate(terms):
            term.improve(factors, dense - sum(fitted[:k] + fitted[k + 1 :]))
            fitted[k] = term.product(factors)
        if stop(None, weighted_norm(sum(fitted) - dense, covariance)):
            break
    return factors


def weighted_norm(tensor: Any, covariance: Any | None) -> float:
    """Root of the sum over outputs and experts of ``w @ covariance @ w``, for w over the input mode."""
    squares = tensor**2 if covariance is None else tensor * (covariance @ tensor)
    return float(np.sqrt(max(squares.sum(), 0)))


class _Term:
    """Least squares for the factors of one term.

    Parameters
    ----------
    factors : sequence of array or None
        Those of all terms, here and in the methods.
    """

    def __init__(self, view: TermView, factors: Sequence[Any], covariance: Any | None):
        self.view, self.covariance = view, covariance
        self.indices = {k: f for k, f in view.indices.items() if factors[k] is not None}
        self._whole = _contraction(self._operands(factors), view.modes)
        update = self._plain if covariance is None and not view.is_padded else self._weighted
        self.updates = {k: update(k, factors) for k in self.indices}

    def improve(self, factors: list[Any], residual: Any) -> None:
        """Fit one factor after the other to a tensor."""
        target = self.view.take(residual if self.covariance is None else self.covariance @ residual)
        for k, update in self.updates.items():
            factors[k] = update(factors, target)

    def product(self, factors: Sequence[Any]) -> Any:
        """The term of the whole tensor."""
        return self.view.put(self._whole(*(factors[k] for k in self.indices)))

    def _plain(self, k: int, factors: Sequence[Any]) -> Callable[[Sequence[Any], Any], Any]:
        """The best factor, in which the tensor is linear, for the others as they are."""
        problem = _Problem(self, k, factors)

        def update(factors: Sequence[Any], target: Any) -> Any:
            design, right = problem.design(factors), problem.right(target)
            # (lstsq is the faster of the two, but solves one problem at a time.)
            if len(design) == 1:
                return problem.factor(np.linalg.lstsq(design[0], right[0])[0])
            return problem.factor(np.linalg.pinv(design) @ right)

        return update

    def _weighted(self, k: int, factors: Sequence[Any]) -> Callable[[Sequence[Any], Any], Any]:
        """A better factor by conjugate gradients, preconditioned by the problem without weights."""
        problem = _Problem(self, k, factors)
        view, covariance, rest = self.view, self.covariance, [j for j in self.indices if j != k]
        operands = self._operands(factors)
        back = {"*": (view.modes, view.shape)} | {j: operands[j] for j in rest}
        adjoint = _contraction(back, self.indices[k])

        def update(factors: Sequence[Any], target: Any) -> Any:
            others = [factors[j] for j in rest]
            inverse = problem.inverse(factors)

            def product(factor: Any) -> Any:
                fitted = view.put(self._whole(*(factor if j == k else factors[j] for j in self.indices)))
                return adjoint(view.take(fitted if covariance is None else covariance @ fitted), *others)

            def precondition(gradient: Any) -> Any:
                if inverse is None:
                    return gradient
                return problem.factor(inverse @ problem.columns(gradient))

            right = adjoint(target, *others)
            return conjugate_gradients(product, right, factors[k], precondition, steps=STEPS)

        return update

    def _operands(self, factors: Sequence[Any]) -> dict[Any, tuple[Indices, Sequence[int]]]:
        return {k: (axes, factors[k].shape) for k, axes in self.indices.items()}


class _Problem:
    """The axes of least squares for one factor.

    The modes that only this factor has are the right-hand sides; each entry of the modes that it shares with
    another factor is a problem by itself.
    """

    def __init__(self, term: _Term, k: int, factors: Sequence[Any]):
        modes, indices = term.view.modes, term.indices
        self.others = [j for j in indices if j != k]
        elsewhere = {x for j in self.others for x in indices[j]}
        shared = [x for x in indices[k] if x in modes and x in elsewhere]
        alone = [x for x in indices[k] if x in modes and x not in elsewhere]
        bonds = [x for x in indices[k] if x not in modes]
        rest = [x for x in modes if x not in indices[k]]
        size = dict(zip(modes, term.view.shape, strict=True))
        size |= dict(zip(indices[k], factors[k].shape, strict=True))
        self.sizes = tuple(prod(size[x] for x in group) for group in (shared, rest, bonds, alone))
        solved = [*shared, *bonds, *alone]
        self.shape, self.axes = [size[x] for x in solved], [solved.index(x) for x in indices[k]]
        self.by_problem = [modes.index(x) for x in (*shared, *rest, *alone)]
        operands = term._operands(factors)
        others = {j: operands[j] for j in self.others}
        self._design = _contraction(others, (*shared, *rest, *bonds))
        twice = {
            (j, 2): (tuple(f"{x}'" if x in bonds else x for x in axes), shape)
            for j, (axes, shape) in others.items()
        }
        self._gram = _contraction(others | twice, (*shared, *bonds, *(f"{x}'" for x in bonds)))

    def design(self, factors: Sequence[Any]) -> Any:
        s, r, b, _ = self.sizes
        return self._design(*(factors[j] for j in self.others)).reshape(s, r, b)

    def inverse(self, factors: Sequence[Any]) -> Any | None:
        """Of the matrix of the normal equations; None if that is large."""
        s, _, b, _ = self.sizes
        if b > LARGEST:
            return None
        gram = self._gram(*(factors[j] for j in (*self.others, *self.others))).reshape(s, b, b)
        return np.linalg.pinv(gram, hermitian=True)

    def right(self, target: Any) -> Any:
        s, r, _, a = self.sizes
        return target.transpose(self.by_problem).reshape(s, r, a)

    def factor(self, solution: Any) -> Any:
        return solution.reshape(self.shape).transpose(self.axes)

    def columns(self, factor: Any) -> Any:
        """The inverse of `factor`."""
        s, _, b, a = self.sizes
        return factor.transpose(np.argsort(self.axes)).reshape(s, b, a)


def conjugate_gradients(
    product: Callable[[Any], Any], right: Any, start: Any, precondition: Callable[[Any], Any], steps: int
) -> Any:
    """Solve ``product(x) = right`` for a positive semi-definite product; each step lowers the error."""
    x, residual = start, right - product(start)
    smallest = 1e-30 * float((right * precondition(right)).sum())
    direction: Any = 0.0
    last = 1.0
    for _ in range(steps):
        preconditioned = precondition(residual)
        square = float((residual * preconditioned).sum())
        if not square > smallest:
            break
        direction = preconditioned + square / last * direction
        image = product(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        x = x + square / curvature * direction
        residual = residual - square / curvature * image
        last = square
    return x


def _contraction(operands: dict[Any, tuple[Indices, Sequence[int]]], output: Indices) -> Callable[..., Any]:
    """The contraction of arrays of these indices and shapes, its path chosen once."""
    if not operands:
        return lambda: np.ones(())
    names = sorted({x for indices, _ in operands.values() for x in indices})
    symbols = {x: get_symbol(n) for n, x in enumerate(names)}
    *inputs, result = (
        "".join(symbols[x] for x in indices) for indices in (*(i for i, _ in operands.values()), output)
    )
    expression: Callable[..., Any] = contract_expression(
        f"{','.join(inputs)}->{result}", *(tuple(shape) for _, shape in operands.values())
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
