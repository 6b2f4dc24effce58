"""Gates: maps from logits to coefficients that are not negative and sum to one along an axis.

Every gate takes NumPy, PyTorch or JAX arrays and gives back the same kind, shape, dtype and device. It computes in
float32, or in float64 if the logits are float64. An entry of −inf is a mask: it gets zero, and a derivative of zero.
A row (along `axis`) that holds NaN or +inf, or nothing but −inf, becomes NaN and harms no other row.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

from .backend import Array, cast, check_floating, dtype_name, stop_gradient

__all__ = ["GATES", "entmax15", "softmax", "sparsemax", "top_k"]


def entmax15(x: Array, axis: int = -1) -> Array:
    r"""1.5-entmax: sparse like sparsemax, smooth like softmax.

    .. math:: p_i = \max(x_i / 2 - \tau, 0)^2 \quad\text{with } \tau \text{ such that}\quad \sum_i p_i = 1

    Exact and without a sort: Newton's method on the norm of the vector :math:`(x/2 - \tau)_+`, whose number of
    steps depends on the size of the axis alone. First and second derivatives are exact on PyTorch and JAX.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits, of any floating dtype.
    axis : int
        The axis of size N.

    Returns
    -------
    array of the shape and dtype of `x`
        Coefficients; invariant to a shift of the logits.

    Raises
    ------
    TypeError
        If `x` is not an array or not floating, or `axis` not an integer.
    ValueError
        If `x` has no axis, `axis` is out of range, or N is 0.

    References
    ----------
    Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", ACL 2019.

    Examples
    --------
    >>> import numpy as np
    >>> entmax15(np.array([-2.0, 0.0, 0.5])).round(4)
    array([0.   , 0.326, 0.674])
    """
    backend, rows, z, axis = _rows(x, axis)

    def shift(u: Array) -> Array:
        # A Newton step on ‖u‖ − 1. On ‖u‖² − 1 it would be as exact but take half as many steps again.
        square = backend.sum(u * u, axis=-1, keepdims=True)
        return (square - backend.sqrt(square)) / backend.sum(u, axis=-1, keepdims=True)

    # With two steps that are differentiated the first and the second derivative are exact.
    u = _newton(backend, 0.5 * z, shift, steps=_log2(rows.shape[-1], 4) + 2, polish=2)
    return _like(u * u, x, backend, axis)


def sparsemax(x: Array, axis: int = -1) -> Array:
    r"""Sparsemax: the Euclidean projection of the logits onto the simplex.

    .. math:: p_i = \max(x_i - \tau, 0) \quad\text{with } \tau \text{ such that}\quad \sum_i p_i = 1

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits, of any floating dtype.
    axis : int
        The axis of size N.

    Returns
    -------
    array of the shape and dtype of `x`
        Coefficients; invariant to a shift of the logits.

    Raises
    ------
    TypeError
        If `x` is not an array or not floating, or `axis` not an integer.
    ValueError
        If `x` has no axis, `axis` is out of range, or N is 0.

    References
    ----------
    Martins, Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification",
    ICML 2016.
    """
