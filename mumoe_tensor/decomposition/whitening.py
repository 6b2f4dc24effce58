"""Fits weighted by the covariance of the inputs, in coordinates in which the inputs are uncorrelated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mumoe_tensor.backend import Array, check_floating, to_float64
from mumoe_tensor.decomposition.alternating import scaled_fits
from mumoe_tensor.formats.base import Format, Rank, mode_names

#: Asymmetry and negative eigenvalues up to this fraction of the largest value are treated as rounding errors.
ROUNDING = 1e-4
#: Directions with a variance below this fraction of the largest are treated as absent.
ABSENT = 1e-13


def read_covariance(covariance: Array, experts: Sequence[int], size: int) -> Any:
    """Check a covariance of inputs, or one per expert, and convert it to float64.

    The result is scaled so that the largest eigenvalue is one.
    """
    check_floating({"input_covariance": covariance})
    shapes = dict.fromkeys([(size, size), (*experts, size, size)])  # of all experts, of each
    shape = tuple(covariance.shape)
    if shape not in shapes:
        raise ValueError(
            "input_covariance must have one row and one column per row of the input mode (including a bias "
            f"row), shape {' or '.join(map(str, shapes))}, got {shape}."
        )
    matrix = to_float64(covariance)
    if not np.isfinite(matrix).all():
        raise ValueError("every entry of input_covariance must be finite.")
    largest, transposed = np.abs(matrix).max(), np.swapaxes(matrix, -1, -2)
    if largest == 0 or np.abs(matrix - transposed).max() > ROUNDING * largest:
        raise ValueError("input_covariance must be symmetric and not zero.")
    values, vectors = np.linalg.eigh((matrix + transposed) / (2 * largest))
    if values.min() < -ROUNDING * values.max():
        raise ValueError(
            "input_covariance must be positive semi-definite, got eigenvalues from "
            f"{largest * values.min():.3g} to {largest * values.max():.3g}."
        )
    return _with_values(vectors, np.maximum(values, 0) / values.max())


def input_axes(format: Format, num_levels: int, by_expert: bool) -> dict[int, list[int]] | None:
    """For each term, the position of the factor with the input mode, and the axis of that mode in it.

    With `by_expert`, for one covariance per expert, the axes of the experts come first. The result is None
    unless each term has exactly one such factor with all of these axes.
    """
    modes = [*mode_names(num_levels)[:-2], "i"] if by_expert else ["i"]
    axes = {}
    for term, factors in format.summands(num_levels):
        having = [(k, f) for k, f in enumerate(term.declaration(num_levels)) if "i" in f.indices]
        if format.has_bias_term or len(having) != 1:
            return None
        ((k, f),) = having
        if not {*modes} <= {*f.indices} or (by_expert and any(map(term.window, range(num_levels)))):
            return None
        axes[factors.start + k] = [f.indices.index(x) for x in modes]
    return axes


def whitened_fits(
    format: Format,
    dense: Any,
    rank: Rank,
    generators: Sequence[Any],
    n_iter: int,
    tolerance: float,
    covariance: Any,
) -> Iterator[list[Any]]:
    """Fits to ``root @ dense``, for a format with `input_axes`, multiplied by the inverse of the root."""
    values, vectors = np.linalg.eigh(covariance)
    held = values > ABSENT * values.max()
    target = _with_values(vectors, np.sqrt(np.where(held, values, 0))) @ dense
    inverse = _with_values(vectors, np.where(held, values, np.inf) ** -0.5)
    axes = input_axes(format, dense.ndim - 2, covariance.ndim > 2) or {}
    for factors in scaled_fits(format, target, rank, generators, n_iter, tolerance):
        fitted = list(factors)
        for k, of_factor in axes.items():
            first = [*range(len(of_factor))]
            moved = np.moveaxis(fitted[k], of_factor, first)
            rows = moved.reshape(*moved.shape[: len(first)], -1)
            fitted[k] = np.moveaxis((inverse @ rows).reshape(moved.shape), first, of_factor)
        yield fitted


def _with_values(vectors: Any, values: Any) -> Any:
    """Symmetric matrices with these eigenvectors and eigenvalues."""
    return (vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2)
