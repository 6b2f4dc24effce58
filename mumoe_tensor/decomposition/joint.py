"""Joint fits of all factors of all terms, by damped Gauss-Newton steps with conjugate gradients.

The preconditioner is block-diagonal, with one block per factor (Sorber et al. 2013, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from mumoe_tensor.decomposition.alternating import Problem, stop_rule
from mumoe_tensor.decomposition.terms import TermView, balanced, contraction, views
from mumoe_tensor.formats.base import Format

#: Damping of the first step, and maximum damping, relative to the largest mean curvature of a factor.
DAMPING, MOST_DAMPING = 1e-2, 1e3
#: Factor by which an accepted step reduces the damping and a rejected step increases it.
CHANGE = 5
#: Number of Gauss-Newton steps that usually suffices, and maximum number of conjugate-gradient steps in each.
FEW_STEPS, STEPS = 50, 10
#: Largest product of bonds of a factor for which the preconditioner forms a matrix.
LARGEST = 2048


def improve(
    format: Format,
    dense: Any,
    start: Sequence[Any],
    n_iter: int,
    tolerance: float,
    covariance: Any | None = None,
) -> list[Any]:
    """Improve the factors by joint steps: at most `n_iter`, and at most 50 or a tenth of `n_iter`.

    A step takes about as long as ten sweeps, and few steps usually suffice.

    Unlike alternating least squares, this does not get stuck if several terms fit the same part of the
    tensor. Padding is ignored. A covariance of the inputs weights the error.
    """
    factors = balanced(format, dense.ndim - 2, start, 0)
    terms = [_Term(view, factors) for view in views(format, dense.shape)]
    residual = dense - sum(term.product(factors) for term in terms)
    error = weighted_norm(residual, covariance)
    damping, stop = DAMPING, stop_rule(tolerance)
    for _ in range(max(min(n_iter, FEW_STEPS), n_iter // STEPS)):
        step = _step(terms, factors, residual, damping, covariance)
        moved = [f if f is None else f + step[k] for k, f in enumerate(factors)]
        left = dense - sum(term.product(moved) for term in terms)
        lower = weighted_norm(left, covariance)
        if lower < error:
            factors, residual, error = moved, left, lower
            damping /= CHANGE
            if stop(None, error):
                break
        elif damping > MOST_DAMPING:
            break
        else:
            damping *= CHANGE
    return factors


def weighted_norm(tensor: Any, covariance: Any | None) -> float:
    """The root of the sum of ``w @ covariance @ w`` over the vectors w of a tensor along the input mode."""
    squares = tensor**2 if covariance is None else tensor * (covariance @ tensor)
    return float(np.sqrt(max(squares.sum(), 0)))


def _step(
    terms: Sequence[_Term],
    factors: Sequence[Any],
    residual: Any,
    damping: float,
    covariance: Any | None,
) -> dict[int, Any]:
    """The damped step that best fits the residual if the terms are linearised."""
    from scipy.sparse.linalg import LinearOperator, cg  # slow to import

    positions = [k for term in terms for k in term.problems]
    ends = np.cumsum([factors[k].size for k in positions])[:-1]

    def flat(arrays: dict[int, Any]) -> Any:
        return np.concatenate([arrays[k].ravel() for k in positions])

    def shaped(vector: Any) -> dict[int, Any]:
        pieces = zip(positions, np.split(vector, ends), strict=True)
        return {k: piece.reshape(factors[k].shape) for k, piece in pieces}

    def gradient(tensor: Any) -> Any:
        tensor = tensor if covariance is None else covariance @ tensor
        return flat({k: g for term in terms for k, g in term.gradient(factors, tensor).items()})

    grams = {k: gram for term in terms for k, gram in term.grams(factors).items()}
    means = [np.trace(gram, axis1=1, axis2=2).max() / gram.shape[-1] for gram in grams.values()]
    added = damping * max(means)
    inverses = {
        k: np.linalg.pinv(gram + added * np.eye(gram.shape[-1]), hermitian=True) for k, gram in grams.items()
    }

    def curvature(vector: Any) -> Any:
        step = shaped(vector)
        return gradient(sum(term.change(factors, step) for term in terms)) + added * vector

    def precondition(vector: Any) -> Any:
        step = shaped(vector)
        for term in terms:
            for k, problem in term.problems.items():
                if k in inverses:
                    step[k] = problem.factor(inverses[k] @ problem.columns(step[k]))
        return flat(step)

    right = gradient(residual)
    operator = partial(LinearOperator, (right.size, right.size), dtype=right.dtype)
    return shaped(cg(operator(curvature), right, rtol=1e-15, maxiter=STEPS, M=operator(precondition))[0])


class _Term:
    """The derivatives of one term with respect to its factors."""

    def __init__(self, view: TermView, factors: Sequence[Any]):
        self.view, operands = view, view.operands(factors)
        self.problems = {k: Problem(view, k, factors) for k in operands}
        self._whole = contraction(operands, view.modes)
        self._adjoint = {
            k: contraction(
                {"*": (view.modes, view.shape)} | {j: operands[j] for j in problem.others}, operands[k][0]
            )
            for k, problem in self.problems.items()
        }

    def product(self, factors: Sequence[Any]) -> Any:
        """The term as a tensor of the shape of the weight."""
        return self.view.put(self._whole(*(factors[k] for k in self.problems)))

    def change(self, factors: Sequence[Any], step: dict[int, Any]) -> Any:
        """The change of the term for a step of its factors, to first order."""
        changes = [
            self._whole(*(step[j] if j == k else factors[j] for j in self.problems)) for k in self.problems
        ]
        return self.view.put(sum(changes))

    def gradient(self, factors: Sequence[Any], tensor: Any) -> dict[int, Any]:
        """The inner product of a tensor with the derivative of the term, for each entry of its factors."""
        part = self.view.copies * self.view.take(tensor)
        return {
            k: self._adjoint[k](part, *(factors[j] for j in problem.others))
            for k, problem in self.problems.items()
        }

    def grams(self, factors: Sequence[Any]) -> dict[int, Any]:
        """The normal matrices of each factor, ignoring the covariance; large ones are omitted."""
        return {
            k: self.view.copies * problem.gram(factors)
            for k, problem in self.problems.items()
            if problem.sizes[2] <= LARGEST
        }
