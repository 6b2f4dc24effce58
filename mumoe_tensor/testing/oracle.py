"""The dense reference implementation: slow, in float64, and independent of the planner and executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from string import ascii_letters
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mumoe_tensor.backend import Array, dtype_name
from mumoe_tensor.formats import Format, mode_names
from mumoe_tensor.formats.base import Term
from mumoe_tensor.tensors import FactorizedTensor

Float64 = NDArray[np.float64]

#: Tolerance relative to the sum of the magnitudes of the terms.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "float16": 1e-2, "bfloat16": 4e-2}
#: Absolute tolerance, for values near the smallest of the dtype.
SMALLEST = {"float64": 1e-290, "float32": 1e-30, "float16": 1e-4, "bfloat16": 1e-30}


def to_numpy(array: Array) -> Float64:
    """Convert an array of any backend to NumPy float64."""
    if hasattr(array, "detach"):
        array = array.detach().cpu().double()
    return np.asarray(array).astype(np.float64)


def subscripts(format: Format, num_levels: int) -> tuple[list[str], str]:
    """Letters for the axes of the factors and the tensor of a single term, for `einsum`.

    The tensor has an axis for each part of a split mode, and none for a mode that the term omits.
    """
    modes = format.modes(num_levels)
    letter = dict(zip((*modes, *format.bonds(num_levels)), ascii_letters, strict=False))
    factors = ["".join(letter[x] for x in f.indices) for f in format.declaration(num_levels)]
    return factors, "".join(letter[m] for m in modes if letter[m] in "".join(factors))


def dense_weight(weight: FactorizedTensor, *, absolute: bool = False) -> Float64:
    """Form the weight tensor by one sum over all indices.

    Parameters
    ----------
    weight : FactorizedTensor
    absolute : bool, default False
        Use the absolute values of the factors, which gives the sum of the magnitudes of the terms.

    Returns
    -------
    array of shape (N1, ..., NE, I, O)
    """
    shapes = weight.format.shapes(weight.shape, weight.rank)
    values = [
        np.ones(shape) if factor is None else to_numpy(factor)
        for factor, shape in zip(weight.factors, shapes, strict=True)
    ]
    return sum_of_terms(weight, [abs(x) for x in values] if absolute else values)


def sum_of_terms(
    weight: FactorizedTensor,
    factors: Sequence[Any],
    einsum: Callable[..., Any] = np.einsum,
    array: Callable[[Float64], Any] = np.asarray,
) -> Any:
    """The weight tensor, computed from factors of any backend.

    Parameters
    ----------
    weight : FactorizedTensor
        A weight with the format and the shapes.
    factors : sequence of array
        The factors to use instead of the weight's, without missing ones.
    einsum, array : callable
        Functions of the backend of the factors.
    """
    total = 0
    for term in weight.format.terms(weight.shape, weight.rank):
        letters, axes = subscripts(term.format, weight.num_levels)
        tensor = einsum(f"{','.join(letters)}->{axes}", *factors[term.factors])
        sizes = term.format.index_sizes(term.mode_sizes, term.rank)
        present = {x for f in term.format.declaration(weight.num_levels) for x in f.indices}
        modes = mode_names(weight.num_levels)
        tensor = tensor.reshape([prod(sizes[x] for x in term.format.parts(m) if x in present) for m in modes])
        for axis, mode in enumerate(modes):
            whole, entry = ascii_letters[: len(modes)], ascii_letters[len(modes)]
            is_left_out = present.isdisjoint(term.format.parts(mode))
            place = array(placement(term, axis, tensor.shape[axis], weight.shape[axis], is_left_out))
            placed = whole.replace(whole[axis], entry)
            tensor = einsum(f"{whole},{whole[axis]}{entry}->{placed}", tensor, place)
        total = total + tensor
    return total


def placement(term: Term, axis: int, size: int, whole: int, is_left_out: bool) -> Float64:
    """A matrix of zeros and ones that maps the entries of a mode of a term to entries of the weight."""
    is_expert = axis < len(term.mode_sizes) - 2
    if is_left_out:  # constant along the experts; a bias is the last row of the input mode
        return np.ones((1, whole)) if is_expert else np.eye(whole)[-1:]
    start, stop = (term.format.window(axis) if is_expert else None) or (0, term.mode_sizes[axis])
    columns = np.arange(whole)
    return np.where((np.arange(size)[:, None] + start == columns) & (columns < stop), 1.0, 0.0)


def dense_moe(tensor: Float64, z: Float64, coefficients: Sequence[Float64], *, bias: bool = False) -> Float64:
    """Mix the experts of a dense weight tensor, one input at a time.

    Parameters
    ----------
    tensor : array of shape (N1, ..., NE, I, O)
    z : array of shape (..., I)
    coefficients : sequence of array of shape (..., Ne)
    bias : bool, default False
        Append a one to every input, so that the last row of the input mode is the bias.

    Returns
    -------
    array of shape (..., O)
    """
    leading = z.shape[:-1]
    if bias:
        z = np.concatenate([z, np.ones((*leading, 1))], axis=-1)
    y = np.empty((*leading, tensor.shape[-1]))
    for at in np.ndindex(*leading):
        mixed = tensor
        for a in coefficients:
            mixed = np.tensordot(a[at], mixed, axes=1)
        y[at] = z[at] @ mixed
    return y


def magnitude(
    weight: FactorizedTensor, z: Array, coefficients: Sequence[Array], *, bias: bool = False
) -> Float64:
    """Sum of the magnitudes of all terms in an output, the scale of its rounding errors.

    Parameters
    ----------
    weight : FactorizedTensor
    z : array of shape (..., I)
    coefficients : sequence of array of shape (..., Ne)
    bias : bool, default False

    Returns
    -------
    array of shape (..., O)
    """
    arrays = [np.abs(to_numpy(x)) for x in (z, *coefficients)]
    return dense_moe(dense_weight(weight, absolute=True), arrays[0], arrays[1:], bias=bias)


def assert_close(
    actual: Array, expected: Array, scale: Any, what: str = "the result", dtype: str | None = None
) -> None:
    """Assert that two arrays are equal up to rounding.

    Parameters
    ----------
    actual, expected : array
        Arrays of any backend.
    scale : float or array
        Sum of the magnitudes of the terms, for each entry or for all.
    what : str
        Name of `actual` in the error message.
    dtype : str, optional
        Dtype that determines the tolerance; by default the dtype of `actual`.
    """
    dtype = dtype or dtype_name(actual)
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape, f"{what} has shape {actual.shape}, expected {expected.shape}."
    allowed = TOLERANCE[dtype] * np.asarray(scale) + SMALLEST[dtype]
    error = np.abs(actual - expected)
    if not np.all(error <= allowed):  # also where there is a NaN
        worst = np.max(error / allowed)
        raise AssertionError(
            f"{what} is off by {np.max(error):.3g}, {worst:.3g} times what {dtype} allows:\n"
            f"{actual}\nexpected\n{expected}"
        )
