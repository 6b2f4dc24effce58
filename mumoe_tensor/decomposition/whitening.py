"""Fits weighted by the covariance of the inputs: in coordinates in which the inputs are uncorrelated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mumoe_tensor.backend import Array, check_floating, to_float64
from mumoe_tensor.decomposition.alternating import scaled_fits
from mumoe_tensor.formats.base import Format, Rank

#: Asymmetry and negative eigenvalues up to this fraction of the largest one are taken for rounding.
ROUNDING = 1e-4
#: Inputs whose variance is below this fraction of the largest one are taken for absent.
ABSENT = 1e-13


def read_covariance(covariance: Array, size: int) -> Any:
    """A covariance of inputs as float64, its largest eigenvalue one, or an error that says what it is not."""
    check_floating({"input_covariance": covariance})
    if tuple(covariance.shape) != (size, size):
        raise ValueError(
            "input_covariance must have one row and one column for each row of the input mode, the bias "
            f"row included where there is one: {(size, size)}, got {tuple(covariance.shape)}."
        )
    matrix = to_float64(covariance)
    if not np.isfinite(matrix).all():
        raise ValueError("every entry of input_covariance must be finite.")
    largest = np.abs(matrix).max()
    if largest == 0 or np.abs(matrix - matrix.T).max() > ROUNDING * largest:
        raise ValueError("input_covariance must be symmetric and not zero.")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / (2 * largest))
    if values[0] < -ROUNDING * values[-1]:
        raise ValueError(
            "input_covariance must be positive semi-definite, got eigenvalues from "
            f"{largest * values[0]:.3g} to {largest * values[-1]:.3g}."
        )
    return (vectors * np.maximum(values, 0) / values[-1]) @ vectors.T


def input_axes(format: Format, num_levels: int) -> dict[int, int] | None:
    """Position and axis of the factor of each term that has the input mode; None unless it is one."""
    axes = {}
    for term, factors in format.summands(num_levels):
        having = [(k, f) for k, f in enumerate(term.declaration(num_levels)) if "i" in f.indices]
        if format.has_bias_term or len(having) != 1:
            return None
        ((k, f),) = having
        axes[factors.start + k] = f.indices.index("i")
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
    """Fits of ``root @ dense``, for a format with `input_axes`, times the inverse of the root."""
    values, vectors = np.linalg.eigh(covariance)
    held = values > ABSENT * values[-1]
    root, vectors = np.sqrt(values[held]), vectors[:, held]
    target = (vectors * root) @ vectors.T @ dense
    inverse = (vectors / root) @ vectors.T
    axes = input_axes(format, dense.ndim - 2) or {}
    for factors in scaled_fits(format, target, rank, generators, n_iter, tolerance):
        fitted = list(factors)
        for k, axis in axes.items():
            fitted[k] = np.moveaxis(np.tensordot(inverse, fitted[k], (1, axis)), 0, axis)
        yield fitted
