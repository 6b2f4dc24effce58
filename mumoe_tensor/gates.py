"""Gates: maps from logits to coefficients along an axis, which are at least zero.

A gate takes a NumPy, PyTorch or JAX array and returns the same kind, shape, dtype and device. It computes in
float32, or in float64 where the logits are float64. Logits of −inf are masks: their coefficients and
derivatives are zero. A row (along `axis`) with NaN or +inf in it, or with nothing but −inf, becomes NaN,
and no other row does. Of equal logits those with the lowest indices are the largest.

Coefficients sum to one, except where a gate says otherwise.
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

#: Newton steps of entmax15 for N logits, by log2 N rounded up. A step at least halves ‖u‖ − 1 or its slope,
#: both at most √N at first. That makes log2(N) / 2 steps, and four more converge. Rows built by hill climbing
#: to be slow do need them: 6 at N = 16, 14 at N = 2**20.
ENTMAX15_STEPS = tuple((bits + 1) // 2 + 4 for bits in range(64))


class Gate(Protocol):
    """What a layer takes as a gate: a map from logits of shape (..., N) to coefficients of that shape.

    It is a function, or an instance of a class with ``__call__`` such as a module. It may declare more, as an
    attribute of the function or the class; each is False or absent unless declared:

    - ``sparse_gradient = True``: its derivative is zero wherever its result is. A layer may then leave the
      gradients of these coefficients out.
    - a method ``select``, called as the gate is: the values and indices of k experts, as a
      ``mumoe_tensor.nn.sparse.SparseCoefficients``, or all coefficients. A layer whose gate has no hook then
      reads the rows of these experts alone, where they are few of many.
    - ``random_start = True``: the weight of the layer's gate starts random instead of zero. So it must where
      equal logits have unequal coefficients, or none: the same experts would be left out for ever.
    - ``reads_input = True``: it is called with the input of the layer's gate, of shape (..., in_features),
      and the number of experts of a level, instead of logits. The layer's gate then has no weight and no
      norm.
    - a method ``per_expert(num_experts, in_features)``: arrays with the experts of a level as their first
      axis, by name, at their first values. The layer's gate has them under these names, those of all levels
      one after the other, as parameters if they are parameters, else as buffers. The gate is called with
      those of the level as keyword arguments. The method raises a ValueError for a level that the gate
      cannot serve.
    - a method ``fit(z, num_experts)``: these arrays for a level, fitted to inputs of shape (rows,
      in_features).
    """

    def __call__(self, logits: Array, /) -> Array:
        """Map logits along the last axis."""
        ...


_Function = TypeVar("_Function", bound=Callable[..., Any])


def sparse_gradient(gate: _Function) -> _Function:
    """Declare of a function that its derivative is zero wherever its result is; see `Gate`."""
    declared: Any = gate  # (To mypy a callable has no attributes.)
    declared.sparse_gradient = True
    return gate


@sparse_gradient
def entmax15(x: Array, axis: int = -1) -> Array:
    r"""1.5-entmax: sparse as sparsemax, smoother at the edge of the support.

    .. math:: p_i = \max(x_i / 2 - \tau, 0)^2, \qquad \tau \text{ such that } \sum_i p_i = 1

    Exact, without a sort: Newton steps on the norm of :math:`u = (x/2 - \tau)_+`. Their number depends on
    N alone.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        Logits of any floating dtype.
    axis : int
        The axis of size N.

    Returns
    -------
    array of the shape and dtype of `x`
        Coefficients; the same for logits shifted by a constant.

    Raises
    ------
    TypeError, ValueError
        If `x` is no floating array, has no axis, or N is 0; if `axis` is no integer or out of range.

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
        # ‖u‖ − 1 over its slope. (‖u‖² − 1 has the same root but takes up to twice as many steps.)
        square = total(backend, u * u)
        return (square - backend.sqrt(square)) / _total(backend, u)

    steps = ENTMAX15_STEPS[_log2(rows)]
    u = _newton(backend, 0.5 * _centred(backend, rows), shift, steps, differentiated=2)
    return _restored(backend, u * u, x, axis)


@sparse_gradient
def sparsemax(x: Array, axis: int = -1) -> Array:
    r"""Sparsemax: the point of the simplex closest to the logits.

    .. math:: p_i = \max(x_i - \tau, 0), \qquad \tau \text{ such that } \sum_i p_i = 1

    Parameters, result and errors are those of `entmax15`.

    References
    ----------
    Martins, Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
    Classification", ICML 2016.
    """
    backend, rows = _rows(x, axis)

    def shift(u: Array, total: Callable[..., Array]) -> Array:
        return (total(backend, u) - 1.0) / _total(backend, cast(u != 0, dtype_name(u)))

    # As in entmax15, but the sum and its slope start at N and nothing is quadratic. Again, this is what rows
    # built to be slow need to come down to the rounding errors.
    steps = _log2(rows) + (12 if dtype_name(rows) == "float64" else 4)
    p = _newton(backend, _centred(backend, rows), shift, steps, differentiated=1)
    return _restored(backend, p, x, axis)


def softmax(x: Array, axis: int = -1) -> Array:
    r"""Softmax.

    .. math:: p_i = \exp(x_i) / \sum_j \exp(x_j)

    Parameters, result and errors are those of `entmax15`.
    """
    backend, rows = _rows(x, axis)
    return _restored(backend, _softmax(backend, _centred(backend, rows)), x, axis)


@sparse_gradient
def top_k(x: Array, k: int, axis: int = -1, *, normalize: bool = True) -> Array:
    r"""Softmax over the k largest logits, zero elsewhere.

    It is the softmax of all logits, of which the k largest coefficients are kept and divided by their sum.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        As in `entmax15`; so are result and errors.
    k : int
        Number of logits that keep a coefficient, from 1 to N.
    axis : int
    normalize : bool
        False leaves the k coefficients as the softmax of all logits has them: their sum is less than one.

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
    r"""ReLU of the k largest logits, zero elsewhere. The coefficients have any sum.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        As in `entmax15`; so are result and errors.
    k : int
        Number of logits that may have a coefficient, from 1 to N. Those that are not positive have none.
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
    r"""JumpReLU: logits above a threshold as they are, zero elsewhere. The coefficients have any sum.

    .. math:: p_i = x_i \text{ where } x_i > \theta_i, \text{ else } 0

    The derivative with respect to a logit is one or zero. With respect to the threshold it is zero almost
    everywhere; in its place is the published straight-through estimate, with a rectangle as the kernel:

    .. math:: \frac{\partial p_i}{\partial \theta_i} \approx
              -\frac{\theta_i}{\varepsilon} \text{ where } |x_i - \theta_i| < \varepsilon / 2, \text{ else } 0

    Parameters
    ----------
    x : array of shape (..., N, ...)
        As in `entmax15`; so are result and errors.
    threshold : float or array of shape (N,)
        At least zero. An array is of the backend and dtype of `x`, and has derivatives.
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
        # Zero, but with a derivative.
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
    r"""Sigmoid of k logits of a few groups, zero elsewhere: the gate of DeepSeek-V3.

    They are chosen by their scores :math:`\sigma(x_i) + b_i`. The logits are in equal groups, one after the
    other; the groups whose two best scores have the largest sums are taken, and in these the k best scores.
    Bias and groups affect the choice alone. Fewer than k have a coefficient where all others are masks.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        As in `entmax15`; so are result and errors.
    k : int
        Number of logits with a coefficient, from 1 to the size of `top_groups` groups.
    axis : int
    bias : array of shape (N,), optional
        Of the backend and dtype of `x`, and finite: rows are NaN where it is not, except that −inf keeps a
        logit from being chosen. It has no derivative.
    groups, top_groups : int
        Number of groups, which divides N, and how many of them are taken.
    normalize : bool
        Divide the coefficients by their sum.
    scale : float
        Positive. Multiplies the coefficients: their sum, if they are normalised.

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
    """1 / k for each of the k largest logits, zero elsewhere. It has no derivative.

    Parameters
    ----------
    x : array of shape (..., N, ...)
        As in `entmax15`; so are result and errors. Where fewer than k are no masks, these share one.
    k : int
        From 1 to N.
    axis : int
    """
    backend, rows = _rows(stop_gradient(x), axis)
    dropped = _is_dropped(backend, rows, k) | (rows == -backend.inf)
    kept = cast(~dropped, dtype_name(rows))
    return _restored(backend, _checked(backend, kept / _total(backend, kept), rows), x, axis)


def check_groups(size: int, k: int, groups: int, top_groups: int) -> int:
    """The size of a group of `sigmoid_top_k`; a ValueError if there are no such groups, or k is too large."""
    if size % as_positive(groups, "groups") or as_positive(top_groups, "top_groups") > groups:
        raise ValueError(
            f"groups must divide the size of the axis, and top_groups be at most groups; got groups = "
            f"{groups} and top_groups = {top_groups} for size {size}."
        )
    if not 1 <= as_integer(k, "k") <= top_groups * (size // groups):
        raise ValueError(
            f"k must be at least 1 and at most the size of the groups taken, got k = {k} for {top_groups} "
            f"group(s) of size {size // groups}."
        )
    return size // groups


def _rows(x: Array, axis: int) -> tuple[Any, Array]:
    """The checked logits with `axis` last, in the dtype to compute in."""
    backend = check_floating({"x": x})
    if not x.ndim:
        raise ValueError("x must have at least one axis, got a 0-d array.")
    if not -x.ndim <= as_integer(axis, "axis") < x.ndim:
        raise ValueError(f"axis must be at least {-x.ndim} and less than {x.ndim}, got {axis}.")
    if not x.shape[axis]:
        raise ValueError(f"the axis must have at least one entry, got axis {axis} of shape {tuple(x.shape)}.")
    # (torch.func.vmap has no rule for torch's `moveaxis`.)
    rows = cast(x.swapaxes(-1, axis), "float32" if x.dtype.itemsize < 4 else dtype_name(x))
    # In row-major order: along another axis NumPy adds one by one, which loses four digits at 2**20 entries.
    return backend, rows.reshape(-1).reshape(rows.shape)


def _along_rows(name: str, values: Array, x: Array, rows: Array) -> Array:
    """An array with an entry for each logit of a row, in the dtype of the rows."""
    check_floating({"x": x, name: values})
    if values.shape != rows.shape[-1:]:
        raise ValueError(
            f"{name} must have an entry for each logit of a row, shape {tuple(rows.shape[-1:])}, got shape "
            f"{tuple(values.shape)}."
        )
    return cast(values, dtype_name(rows))


def _best_groups(backend: Any, scores: Array, count: int) -> Array:
    """Scores of shape (..., groups, size), −inf outside of the groups whose two best have the best sums."""
    best = backend.sort(scores, axis=-1)[..., -2:]
    totals = backend.sum(backend.where(best == -backend.inf, 0.0, best), axis=-1)
    totals = backend.where(best[..., -1] == -backend.inf, -backend.inf, totals)  # masks alone
    return backend.where(_is_dropped(backend, totals, count)[..., None], -backend.inf, scores)


def _is_dropped(backend: Any, rows: Array, k: int) -> Array:
    """Whether each entry is not among the k largest of its row, which has no NaN."""
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
    """Every row less its maximum; NaN where that is not finite."""
    top = backend.max(stop_gradient(rows), axis=-1)[..., None]
    return rows - backend.where(abs(top) < backend.inf, top, backend.nan)


def _checked(backend: Any, p: Array, rows: Array) -> Array:
    """Rows of coefficients; NaN where the largest logit of a row is not finite."""
    top = backend.max(stop_gradient(rows), axis=-1)[..., None]
    return backend.where(abs(top) < backend.inf, p, backend.nan)


def _total(backend: Any, u: Array) -> Array:
    return backend.sum(u, axis=-1, keepdims=True)


def _fine_total(backend: Any, u: Array) -> Array:
    """The same for rows with a sum near one, as exact as if it were rounded once, in any order.

    Some backends add dozens of numbers one by one (XLA on CPUs: 32 or more), and each costs up to half a unit
    in the last place of the sum. Multiples of 2**-22 add up exactly in float32; what they leave is small.
    """
    coarse = (u * 2.0**22).round() * 2.0**-22
    return _total(backend, coarse) + _total(backend, u - coarse)


def _newton(backend: Any, z: Array, shift: Callable[..., Array], steps: int, differentiated: int) -> Array:
    """Find u = (z − τ)₊ for rows z with maximum 0, where `shift` is the Newton step for τ at u.

    The steps start from τ = −1, left of the root of a convex function, and are monotone: what has left the
    support does not come back. So they move u itself. A rounded τ would be one error common to all of u, and
    4e-5 in the sum of a float32 row with one large value over a near-tied cloud.
    """

    def step(u: Array, total: Callable[..., Array]) -> Array:
        delta = shift(u, total)
        return backend.where(u <= backend.clip(delta, 0.0), 0.0, u - delta)

    u = backend.clip(stop_gradient(z) + 1.0, 0.0)
    for _ in range(steps - differentiated):
        u = step(u, _total)
    if stop_gradient(z) is not z:
        # At the root the result of a Newton step does not depend, to first order, on the τ it starts from. So
        # one step with a constant τ has the exact first derivative, and two steps have the second as well.
        # What is outside the support has none, and −inf − −inf would be NaN.
        z = backend.where(u == 0, 0.0, z)
        u = u + (z - stop_gradient(z))
    for _ in range(differentiated):
        u = step(u, _fine_total)
    return u


def _softmax(backend: Any, z: Array) -> Array:
    e = backend.exp(z)
    return e / _total(backend, e)


def _restored(backend: Any, p: Array, x: Array, axis: int) -> Array:
    """Rows of coefficients in the axis order and dtype of the logits `x`."""
    return cast(p.swapaxes(-1, axis), dtype_name(x))
