"""Gates: maps from logits to nonnegative coefficients along an axis.

A gate takes a NumPy, PyTorch or JAX array and returns one of the same kind, shape, dtype and device. It
computes in float32, or in float64 if the logits are float64. Logits of −inf are masks: their coefficients and
derivatives are zero. A row (along `axis`) that contains NaN or +inf, or only −inf, becomes NaN; other rows
are not affected. Among equal logits, those with the lowest indices are selected first.

Coefficients sum to one unless the gate says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from mumoe_tensor.backend import (
    Array,
    cast,
    check_floating,
    dtype_name,
    is_array,
    kth_largest,
    stop_gradient,
)
from mumoe_tensor.checks import as_finite, as_integer, as_positive, check_flag

__all__ = [
    "Gate",
    "entmax15",
    "jumprelu",
    "relu_top_k",
    "sigmoid_top_k",
    "softmax",
    "sparsemax",
    "top_k",
    "uniform_top_k",
]

#: Number of Newton steps of entmax15 for N logits, indexed by log2 N rounded up. Each step at least halves
#: ‖u‖ − 1 or its slope, and both are at most √N initially. So log2(N) / 2 steps reach the neighbourhood of
#: the root, and four more converge. Adversarial rows (by hill climbing) need every step: 6 at N = 16, 14 at N
#: = 2**20.
ENTMAX15_STEPS = tuple((bits + 1) // 2 + 4 for bits in range(64))


class Gate(Protocol):
    """The gate function of a layer: a map from logits of shape (..., N) to coefficients of the same shape.

    A gate is a function, or an instance of a class with ``__call__``, such as a module. The function or class
    may have these optional attributes, which default to False or absent:

    - ``sparse_gradient = True``: the derivative is zero wherever the coefficient is zero. A layer may
      then skip the gradients of these coefficients.
    - a method ``select``, with the same arguments as the gate: returns the values and indices of k
      experts, as a ``mumoe_tensor.nn.sparse.SparseCoefficients``, or all coefficients. If k is small
      compared with N and the gate has no hooks, a layer then reads only the rows of these experts.
    - ``random_start = True``: the weight of the layer's gate is initialised at random instead of at zero.
      This is necessary if equal logits get unequal or zero coefficients; otherwise the same experts would
      always be left out.
    - ``reads_input = True``: the gate is called with the input of the layer's gate, of shape (...,
      in_features), and the number of experts of a level, instead of logits. The layer's gate then has no
      weight and no norm.
    - a method ``per_expert(num_experts, in_features)``: returns a dictionary of initial arrays with one
      row for each expert of a level. The layer's gate stores them under their names, concatenated over
      the levels, as parameters or buffers depending on their type. The gate is called with the arrays of
      its level as keyword arguments. The method raises a ValueError if the gate does not support a level.
    - a method ``fit(z, num_experts)``: returns these arrays for a level, fitted to inputs of shape (rows,
      in_features).
    """

    def __call__(self, logits: Array, /) -> Array:
        """Map logits along the last axis."""
        ...


_Function = TypeVar("_Function", bound=Callable[..., Any])


def sparse_gradient(gate: _Function) -> _Function:
    """Declare that the derivative of a gate is zero wherever its result is zero; see `Gate`."""
    declared: Any = gate  # to mypy, a callable has no attributes
    declared.sparse_gradient = True
    return gate


@sparse_gradient
def entmax15(x: Array, axis: int = -1) -> Array:
    r"""1.5-entmax: sparse like sparsemax, but smoother at the boundary of the support.

    .. math:: p_i = \max(x_i / 2 - \tau, 0)^2, \qquad \tau \text{ such that } \sum_i p_i = 1

    The threshold is computed exactly and without sorting, by Newton steps on the norm of
    :math:`u = (x/2 - \tau)_+`. The number of steps depends only on N.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits of any floating dtype.
    axis : int
        The axis of size N.

    Returns
    -------
    array with the shape and dtype of `x`
        Coefficients. Adding a constant to all logits does not change them.

    Raises
    ------
    TypeError, ValueError
        If `x` is not a floating array or has no axis, or if N is 0; if `axis` is not an integer or is out of
        range.

    References
    ----------
    Peters, Niculae, Martins, "Sparse Sequence-to-Sequence Models", ACL 2019.

    Examples
    --------
    >>> import numpy as np
    >>> print(entmax15(np.array([-2.0, 0.0, 0.5])).round(4))
    [0.    0.326 0.674]
    """
    backend, rows = _rows(x, axis)

    def shift(u: Array, total: Callable[..., Array]) -> Array:
        # ‖u‖ − 1 divided by its slope. (‖u‖² − 1 has the same root but takes up to twice as many steps.)
        square = total(backend, u * u)
        return (square - backend.sqrt(square)) / _total(backend, u)

    steps = ENTMAX15_STEPS[_log2(rows)]
    u = _newton(backend, 0.5 * _centred(backend, rows), shift, steps, differentiated=2)
    return _restored(backend, u * u, x, axis)


@sparse_gradient
def sparsemax(x: Array, axis: int = -1) -> Array:
    r"""Sparsemax: the point of the simplex closest to the logits.

    .. math:: p_i = \max(x_i - \tau, 0), \qquad \tau \text{ such that } \sum_i p_i = 1

    Parameters, return value and errors are as in `entmax15`.

    References
    ----------
    Martins, Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
    Classification", ICML 2016.
    """
    backend, rows = _rows(x, axis)

    def shift(u: Array, total: Callable[..., Array]) -> Array:
        return (total(backend, u) - 1.0) / _total(backend, cast(u != 0, dtype_name(u)))

    # As in entmax15, but the sum and its slope start at N, and convergence is not quadratic. Rows constructed
    # to converge slowly need this many steps to converge to rounding error.
    steps = _log2(rows) + (12 if dtype_name(rows) == "float64" else 4)
    p = _newton(backend, _centred(backend, rows), shift, steps, differentiated=1)
    return _restored(backend, p, x, axis)


def softmax(x: Array, axis: int = -1) -> Array:
    r"""Softmax.

    .. math:: p_i = \exp(x_i) / \sum_j \exp(x_j)

    Parameters, return value and errors are as in `entmax15`.
    """
    backend, rows = _rows(x, axis)
    return _restored(backend, _softmax(backend, _centred(backend, rows)), x, axis)


@sparse_gradient
def top_k(x: Array, k: int, axis: int = -1, *, normalize: bool = True) -> Array:
    r"""Softmax over the k largest logits, zero elsewhere.

    Equivalently, the k largest coefficients of the softmax over all logits, divided by their sum.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits; see `entmax15`, also for the return value and errors.
    k : int
        Number of logits that keep a coefficient, from 1 to N.
    axis : int
    normalize : bool
        If False, return the k coefficients of the softmax over all logits; they sum to less than one.

    References
    ----------
    Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    ICLR 2017; not normalised: Fedus, Zoph, Shazeer, "Switch Transformers", JMLR 2022.
    """
    check_flag(normalize, "normalize")
    backend, rows = _rows(x, axis)
    dropped, z = _is_dropped(backend, rows, k), _centred(backend, rows)
    if normalize:
        return _restored(backend, _softmax(backend, backend.where(dropped, -backend.inf, z)), x, axis)
    p = backend.where(dropped, 0.0, _softmax(backend, z))
    return _restored(backend, _checked(backend, p, rows), x, axis)


@sparse_gradient
def relu_top_k(x: Array, k: int, axis: int = -1) -> Array:
    r"""ReLU of the k largest logits, zero elsewhere. The coefficients need not sum to one.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits; see `entmax15`, also for the return value and errors.
    k : int
        Maximum number of nonzero coefficients, from 1 to N. Nonpositive logits get zero.
    axis : int

    References
    ----------
    Gao et al., "Scaling and Evaluating Sparse Autoencoders", ICLR 2025; as the gate of experts: Oldfield et
    al., "Towards Interpretability Without Sacrifice: Faithful Dense Layer Decomposition with Mixture of
    Decoders", NeurIPS 2025.
    """
    backend, rows = _rows(x, axis)
    p = backend.where((rows <= 0) | _is_dropped(backend, rows, k), 0.0, rows)
    return _restored(backend, _checked(backend, p, rows), x, axis)


@sparse_gradient
def jumprelu(
    x: Array, threshold: Array | float = 0.001, axis: int = -1, *, bandwidth: float = 0.001
) -> Array:
    r"""JumpReLU: the logits above a threshold, zero elsewhere. The coefficients need not sum to one.

    .. math:: p_i = x_i \text{ where } x_i > \theta_i, \text{ else } 0

    The derivative with respect to a logit is one or zero. The derivative with respect to the threshold is
    zero almost everywhere; it is replaced by the published straight-through estimate with a rectangular
    kernel:

    .. math:: \frac{\partial p_i}{\partial \theta_i} \approx
              -\frac{\theta_i}{\varepsilon} \text{ where } |x_i - \theta_i| < \varepsilon / 2, \text{ else } 0

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits; see `entmax15`, also for the return value and errors.
    threshold : float or array of shape (N,)
        At least zero. An array must have the backend and dtype of `x`; gradients flow to it.
    axis : int
    bandwidth : float
        The width :math:`\varepsilon`, in units of the logits.

    References
    ----------
    Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
    Autoencoders", arXiv:2407.14435, 2024.
    """
    backend, rows = _rows(x, axis)
    if as_finite(bandwidth, "bandwidth") <= 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}.")
    if is_array(threshold):
        theta = _along_rows("threshold", threshold, x, rows)
        constant = stop_gradient(theta)
        is_near = abs(stop_gradient(rows) - constant) < bandwidth / 2
        # Its value is zero, but its derivative is not.
        jump = backend.where(is_near, constant / bandwidth, 0.0) * (theta - constant)
    else:
        theta = constant = as_finite(threshold, "threshold")
        jump = 0.0
        if theta < 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}.")
    p = backend.where(rows <= constant, 0.0, rows) - jump
    return _restored(backend, _checked(backend, p, rows), x, axis)


@sparse_gradient
def sigmoid_top_k(
    x: Array,
    k: int,
    axis: int = -1,
    *,
    bias: Array | None = None,
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> Array:
    r"""Sigmoid of k logits from a few groups, zero elsewhere: the gate of DeepSeek-V3.

    Each logit has the score :math:`\sigma(x_i) + b_i`. The logits form consecutive groups of equal size. The
    gate selects the groups in which the two best scores have the largest sum, and then the k best scores
    within these groups. The bias and the groups affect only the selection. Fewer than k coefficients are
    nonzero if the other logits are masks.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits; see `entmax15`, also for the return value and errors.
    k : int
        Number of selected logits, from 1 to the size of `top_groups` groups.
    axis : int
    bias : array of shape (N,), optional
        Bias of the scores, with the backend and dtype of `x`. An entry of −inf excludes a logit from the
        selection; other non-finite entries turn rows into NaN. No gradient flows to the bias.
    groups, top_groups : int
        Number of groups, which divides N, and number of groups to select from.
    normalize : bool
        Divide the coefficients by their sum.
    scale : float
        Positive factor of the coefficients. If they are normalised, it is their sum.

    References
    ----------
    DeepSeek-AI, "DeepSeek-V3 Technical Report", arXiv:2412.19437, 2024.
    """
    check_flag(normalize, "normalize")
    if as_finite(scale, "scale") <= 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    backend, rows = _rows(x, axis)
    size = check_groups(rows.shape[-1], k, groups, top_groups)
    # log σ(x), without overflow.
    top = backend.clip(stop_gradient(rows), 0.0)
    top = backend.where(top < backend.inf, top, backend.nan)
    logs = (rows - top) - backend.log(backend.exp(-top) + backend.exp(rows - top))
    scores = backend.exp(stop_gradient(logs))
    if bias is not None:
        scores = scores + stop_gradient(_along_rows("bias", bias, x, rows))
    best = scores = backend.where(rows == -backend.inf, -backend.inf, scores)
    if top_groups < groups:
        parts = scores.reshape((*rows.shape[:-1], groups, size))
        scores = _best_groups(backend, parts, top_groups).reshape(rows.shape)
    dropped = _is_dropped(backend, scores, k) | (scores == -backend.inf)
    if normalize:
        p = _softmax(backend, _centred(backend, backend.where(dropped, -backend.inf, logs)))
    else:
        p = backend.where(dropped, 0.0, backend.exp(logs))
    return _restored(backend, scale * _checked(backend, p, best), x, axis)


def uniform_top_k(x: Array, k: int, axis: int = -1) -> Array:
    """1 / k for each of the k largest logits, zero elsewhere. There is no gradient.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits; see `entmax15`, also for the return value and errors. If only m < k logits are unmasked, each
        of them gets 1 / m.
    k : int
        From 1 to N.
    axis : int
    """
    backend, rows = _rows(stop_gradient(x), axis)
    dropped = _is_dropped(backend, rows, k) | (rows == -backend.inf)
    kept = cast(~dropped, dtype_name(rows))
    count = _total(backend, kept)
    p = kept / backend.where(count == 0, 1.0, count)  # a fully masked row becomes NaN below
    return _restored(backend, _checked(backend, p, rows), x, axis)


def check_groups(size: int, k: int, groups: int, top_groups: int) -> int:
    """Check the groups and k of `sigmoid_top_k`, and return the size of a group."""
    if size % as_positive(groups, "groups") or as_positive(top_groups, "top_groups") > groups:
        raise ValueError(
            f"groups must divide the size of the axis, and top_groups must be at most groups; got groups = "
            f"{groups} and top_groups = {top_groups} for size {size}."
        )
    if not 1 <= as_integer(k, "k") <= top_groups * (size // groups):
        raise ValueError(
            f"k must be at least 1 and at most the size of the selected groups, got k = {k} for {top_groups} "
            f"group(s) of size {size // groups}."
        )
    return size // groups


def _rows(x: Array, axis: int) -> tuple[Any, Array]:
    """The checked logits with `axis` moved to the end, in the dtype of the computation."""
    backend = check_floating({"x": x})
    if not x.ndim:
        raise ValueError("x must have at least one axis, got a 0-d array.")
    if not -x.ndim <= as_integer(axis, "axis") < x.ndim:
        raise ValueError(f"axis must be at least {-x.ndim} and less than {x.ndim}, got {axis}.")
    if not x.shape[axis]:
        raise ValueError(f"the axis must have at least one entry, got axis {axis} of shape {tuple(x.shape)}.")
    # torch.func.vmap has no rule for torch's `moveaxis`.
    rows = cast(x.swapaxes(-1, axis), "float32" if x.dtype.itemsize < 4 else dtype_name(x))
    # Row-major, since NumPy sums sequentially along other axes, which loses four digits at 2**20 entries.
    return backend, rows.reshape(-1).reshape(rows.shape)


def _along_rows(name: str, values: Array, x: Array, rows: Array) -> Array:
    """Check an array with one entry per logit of a row, and cast it to the dtype of the rows."""
    check_floating({"x": x, name: values})
    if values.shape != rows.shape[-1:]:
        raise ValueError(
            f"{name} must have one entry per logit of a row, shape {tuple(rows.shape[-1:])}, got shape "
            f"{tuple(values.shape)}."
        )
    return cast(values, dtype_name(rows))


def _best_groups(backend: Any, scores: Array, count: int) -> Array:
    """Set scores, of shape (..., groups, size), to −inf outside the groups with the best top-two sums."""
    best = backend.sort(scores, axis=-1)[..., -2:]
    totals = backend.sum(backend.where(best == -backend.inf, 0.0, best), axis=-1)
    totals = backend.where(best[..., -1] == -backend.inf, -backend.inf, totals)  # masks alone
    return backend.where(_is_dropped(backend, totals, count)[..., None], -backend.inf, scores)


def _is_dropped(backend: Any, rows: Array, k: int) -> Array:
    """Whether each entry is outside the k largest of its row. Rows must not contain NaN."""
    n = rows.shape[-1]
    if not 1 <= as_integer(k, "k") <= n:
        raise ValueError(f"k must be at least 1 and at most the size of the axis, got k = {k} for size {n}.")
    values = stop_gradient(rows)
    least = kth_largest(values, k)
    ties = values == least
    places = k - backend.sum(values > least, axis=-1, keepdims=True)
    return (values < least) | (ties & (backend.cumsum(ties, -1) > places))


def _log2(rows: Array) -> int:
    """log2 N, rounded up."""
    return int(rows.shape[-1] - 1).bit_length()


def _centred(backend: Any, rows: Array) -> Array:
    """Subtract each row's maximum from it; NaN if the maximum is not finite."""
    top = backend.max(stop_gradient(rows), axis=-1)[..., None]
    return rows - backend.where(abs(top) < backend.inf, top, backend.nan)


def _checked(backend: Any, p: Array, rows: Array) -> Array:
    """Set rows of coefficients to NaN if their largest logit is not finite."""
    top = backend.max(stop_gradient(rows), axis=-1)[..., None]
    return backend.where(abs(top) < backend.inf, p, backend.nan)


def _total(backend: Any, u: Array) -> Array:
    return backend.sum(u, axis=-1, keepdims=True)


def _fine_total(backend: Any, u: Array) -> Array:
    """The sum of rows that sum to about one, accurate to one rounding in any order of summation.

    Some backends add dozens of numbers sequentially (XLA on CPUs: 32 or more), and each addition loses up to
    half a unit in the last place. Multiples of 2**-22 add up exactly in float32; the remainders are small.
    """
    coarse = (u * 2.0**22).round() * 2.0**-22
    return _total(backend, coarse) + _total(backend, u - coarse)


def _newton(backend: Any, z: Array, shift: Callable[..., Array], steps: int, differentiated: int) -> Array:
    """Find u = (z − τ)₊ for rows z with maximum 0, where `shift` is the Newton step for τ at u.

    The steps start at τ = −1, left of the root of a convex function, and are monotone: an entry that has left
    the support does not return. So they update u itself. Rounding τ instead would add the same error to all
    entries of u: 4e-5 to the sum of a float32 row with one large value above many near ties.
    """

    def step(u: Array, total: Callable[..., Array]) -> Array:
        delta = shift(u, total)
        return backend.where(u <= backend.clip(delta, 0.0), 0.0, u - delta)

    u = backend.clip(stop_gradient(z) + 1.0, 0.0)
    for _ in range(steps - differentiated):
        u = step(u, _total)
    if stop_gradient(z) is not z:
        # At the root, the result of a Newton step does not depend on its start to first order. So one step
        # from a constant τ has the exact first derivative, and two steps have the exact second derivative as
        # well. Entries outside the support have no derivative, and −inf − −inf would be NaN.
        z = backend.where(u == 0, 0.0, z)
        u = u + (z - stop_gradient(z))
    for _ in range(differentiated):
        u = step(u, _fine_total)
    return u


def _softmax(backend: Any, z: Array) -> Array:
    e = backend.exp(z)
    return e / _total(backend, e)


def _restored(backend: Any, p: Array, x: Array, axis: int) -> Array:
    """Move rows of coefficients back to the axis order and dtype of the logits `x`."""
    return cast(p.swapaxes(-1, axis), dtype_name(x))
