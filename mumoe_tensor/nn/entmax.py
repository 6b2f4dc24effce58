"""entmax15 along the last axis, and its gradient, as fast torch operations.

All methods find u = (z − t)₊, where z are the logits minus the maximum of their row; p = (u / 2)² sums to one
if ‖u‖ = 2. Newton steps on ‖u‖ − 2 increase t to this root from any smaller value. On a CPU, the method
depends on the number of logits. Few logits are sorted for a closed form, with NumPy, whose calls have less
overhead than torch's. In long rows, the threshold of the maxima of every 16 entries is a close lower bound of
the threshold of the row. Few entries are above this bound, and only these are read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mumoe_tensor import gates
from mumoe_tensor.nn.norm import LogitBatchNorm

#: Maximum number of logits of a call for which NumPy, on one thread, is faster than torch.
FEW = 8192
#: Maximum number of logits of a call for which sorting with torch is faster than Newton steps, which need
#: more calls.
FEWEST = 4096
#: Maximum length of a row for which the closed form is accurate in float32.
SHORT = 256
#: Minimum length of a row for which the entries above a bound are selected.
LONG = 4096
#: Number of entries in a block, which is replaced by its maximum.
BLOCK = 16
#: Maximum fraction of entries above the bound at which these entries are read by index.
SHARE = 0.25
#: Newton steps stop once they are this small in every row. They converge quadratically, and a last step
#: follows.
SMALL = 1e-5
#: Number of Newton steps for the bound, which is a lower bound after any number and closer after more.
BOUND_STEPS = 5
#: Number of elements in a chunk of rows. Every step reads and writes a chunk, so it should fit into the CPU
#: cache.
CHUNK = 2**19


def coefficients(z: Tensor) -> Tensor:
    """The coefficients of logits, also in float64, by operations that do not depend on values."""
    if _are_few(z) and not torch.compiler.is_compiling():  # compiled code must accept any number of rows
        return _sorted(z)
    u = torch.sub(z, z.amax(-1, keepdim=True)).add_(2).relu_()
    for _ in range(_most_steps(z)):
        u.sub_(_step(u)).relu_()
    return _closed(u, torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=torch.float64), u.sign())


def coefficients_on_cpu(z: Tensor) -> Tensor:
    """The coefficients of logits on a CPU, by operations that may depend on values."""
    if z.numel() <= FEW and z.dtype == torch.float32:
        return torch.from_numpy(_by_numpy(z.detach().numpy()))
    rows = z.reshape(-1, z.shape[-1])
    p = _of_few_entries(rows) if _is_long(rows) else None
    return (_newton(rows) if p is None else p).view(z.shape)


def coefficients_of_levels(
    logits: Tensor, sizes: Sequence[int], norm: LogitBatchNorm | None
) -> tuple[Tensor, ...]:
    """The coefficients of few logits, for levels of these sizes, after batch norm with running statistics."""
    z = logits.numpy()
    if norm is not None:
        with np.errstate(all="ignore"):
            z = (z - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
        z = z.astype(np.float32, copy=False)
    if len(sizes) == 1:
        return (torch.from_numpy(_by_numpy(z)),)
    if len(set(sizes)) == 1:  # a single call is faster
        return torch.from_numpy(_by_numpy(z.reshape(*z.shape[:-1], len(sizes), sizes[0]))).unbind(-2)
    levels = [z[..., stop - n : stop] for n, stop in zip(sizes, accumulate(sizes), strict=True)]
    return tuple([torch.from_numpy(_by_numpy(level)) for level in levels])


def gradient(p: Tensor, dp: Tensor, result: Tensor | None = None) -> Tensor:
    """The gradient of the logits, given the coefficients and their gradient."""
    # On a CPU, the square root of zero takes many times longer than that of other numbers.
    s = p.clamp_min(torch.finfo(p.dtype).tiny).rsqrt_().mul_(p)
    scaled = torch.mul(s, dp, out=result)
    return scaled.addcmul_(s, -scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))


def gradient_on_cpu(p: Tensor, dp: Tensor) -> Tensor:
    """The gradient of the logits on a CPU, by operations that may depend on values."""
    if p.numel() <= CHUNK and p.shape[-1] < LONG:
        return gradient(p, dp)
    shape, p, dp = p.shape, p.reshape(-1, p.shape[-1]), dp.reshape(-1, p.shape[-1])
    dz = _gradient_of_few_entries(p, dp) if _is_long(p) else None
    if dz is None:
        dz = torch.empty_like(p)
        for part in zip(_chunks(p), _chunks(dp), _chunks(dz), strict=True):
            gradient(*part)
    return dz.view(shape)


def _are_few(z: Tensor) -> bool:
    return z.numel() <= FEWEST and z.dtype == torch.float32


def _most_steps(z: Tensor) -> int:
    return gates.ENTMAX15_STEPS[int(z.shape[-1] - 1).bit_length()]


def _step(u: Tensor) -> Tensor:
    """A Newton step of t."""
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return (norm * (norm - 2) / u.sum(-1, keepdim=True)).relu_()


def _closed(u: Tensor, norm: Tensor, support: Tensor) -> Tensor:
    """The coefficients from u, its norm and its sign, with a final Newton step, in place."""
    # The step may also decrease t to correct rounding errors, so it is restricted to the support, which is
    # kept.
    step = norm * (2 - norm) / u.sum(-1, keepdim=True)
    # Without `value`, which torch.compile converts to an operation that torch.func.grad cannot differentiate.
    u.addcmul_(support, step.to(u.dtype)).mul_(0.5)
    return u.mul_(u)


def _solve(u: Tensor) -> Tensor:
    """The coefficients from u for a t below the threshold, in place to save memory traffic."""
    for _ in range(_most_steps(u)):
        step = _step(u)
        u.sub_(step).relu_()
        if not bool((step > SMALL).any()):
            break
    # `sum` adds pairwise, so this norm is more accurate than `vector_norm`, and faster than one in float64.
    # The memory of `squares` is reused, since writing to new memory is slow.
    squares = u * u
    norm = squares.sum(-1, keepdim=True).sqrt_()
    return _closed(u, norm, torch.sign(u, out=squares))


def _newton(rows: Tensor) -> Tensor:
    """The coefficients of rows of logits by Newton steps, chunk by chunk."""
    p = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for part, u in zip(_chunks(rows), _chunks(p), strict=True):
        _solve(torch.sub(part, part.amax(-1, keepdim=True), out=u).add_(2).relu_())
    return p


def coefficients_in_float32(z: Tensor) -> Tensor | None:
    """The coefficients without float64, for few logits in short rows; otherwise None."""
    if not _are_few(z) or z.shape[-1] > SHORT or torch.compiler.is_compiling():
        return None
    return _sorted(z, torch.float32)


def _sorted(z: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The coefficients of logits by the closed form for the k largest of a row."""
    # Entries more than 2 below the maximum have coefficient zero. float64 avoids cancellation errors.
    wide = (z - z.amax(-1, keepdim=True)).clamp_(min=-2).to(dtype)
    largest = wide.sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, dtype=dtype, device=z.device)
    total, squares = largest.cumsum(-1), largest.square().cumsum(-1)
    # For each k, the t at which the k largest entries have ‖z − t‖ = 2. It grows with k. The threshold of the
    # row is the last t that is not above the k-th entry; later entries are below it.
    root = torch.addcmul(total.square(), k, squares.sub_(4), value=-1).relu_().sqrt_()
    t = torch.minimum(total.sub_(root).div_(k), largest).amax(-1, keepdim=True)
    if dtype == torch.float32:  # refine by a Newton step
        u = (wide - t).relu_()
        excess = torch.linalg.vector_norm(u, dim=-1, keepdim=True).sub_(2)
        t.addcdiv_(excess, u.sum(-1, keepdim=True), value=2)
    u = wide.sub_(t).relu_().mul_(0.5)
    return u.mul_(u).to(z.dtype)


def _by_numpy(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The coefficients by the closed form for the k largest of a row, with NumPy, whose calls are faster."""
    with np.errstate(invalid="ignore", over="ignore"):  # for rows that become NaN
        behind = np.negative(z)
        behind.sort(-1)
        least = behind[..., :1]
        # The distance of each logit from the maximum. From 2 on, the coefficient is zero. Computed in
        # float64 because of cancellation.
        d = np.subtract(behind, least, dtype=np.float64)
        np.minimum(d, 2, out=d)
        # For each k, the t at which the k largest logits have ‖t − d‖ = 2. It falls with k. The threshold of
        # the row is the last t that is not below the k-th distance; later distances are above it.
        k = np.arange(1.0, z.shape[-1] + 1)
        total, squares = d.cumsum(-1), (d * d).cumsum(-1)
        squares -= 4
        squares *= k
        t = total * total
        t -= squares
        np.maximum(t, 0, out=t)
        np.sqrt(t, out=t)
        t += total
        t /= k
        np.maximum(t, d, out=t)
        # In this order, because a logit and the maximum may both be far from zero.
        p = z + least
        p += np.minimum.reduce(t, -1, keepdims=True)
        np.maximum(p, 0, out=p)
        p *= 0.5
        p *= p
    return p


def _chunks(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(max(1, CHUNK // rows.shape[-1]))


def _is_long(rows: Tensor) -> bool:
    return rows.shape[-1] >= LONG and rows.shape[-1] % BLOCK == 0


def _block_maxima(rows: Tensor) -> Tensor:
    # The entries of a block are far apart in memory, so that torch compares whole vectors.
    return rows.unflatten(1, (BLOCK, -1)).amax(1)


def _places_above(bound: Tensor, rows: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of entries that are NaN or above the bound of their row; None if there are many."""
    row, block = (maxima <= bound).logical_not_().nonzero().unbind(1)
    if len(row) > SHARE * maxima.numel():
        return None
    entries = rows.unflatten(1, (BLOCK, -1))[row, :, block]
    entry = (entries <= bound[row]).logical_not_().flatten().nonzero().squeeze(1)
    k = entry.div(BLOCK, rounding_mode="floor")
    return row[k], (entry - k * BLOCK) * maxima.shape[1] + block[k]


def _of_few_entries(rows: Tensor) -> Tensor | None:
    """The coefficients of long rows; None if many entries are above the bound."""
    maxima = _block_maxima(rows)
    top = maxima.amax(-1, keepdim=True)
    t = _bound(maxima - top)
    # Lower the bound by more than all rounding errors; the problem is solved again for the entries above it.
    t -= 4 * torch.finfo(rows.dtype).eps * top.abs() + SMALL
    places = _places_above(top + t, rows, maxima)
    if places is None:
        return None
    count = torch.bincount(places[0], minlength=len(rows))
    most = int(count.max())
    if most > SHARE * rows.shape[-1]:
        return None
    # A short row for each long row: its entries, padded with −inf.
    first = count.cumsum(0) - count
    slots = torch.arange(len(places[0])) + (most * torch.arange(len(rows)) - first)[places[0]]
    short = rows.new_full((len(rows) * most,), -torch.inf)
    short[slots] = rows[places]
    p = _solve(short.view(-1, most).sub_(top).sub_(t).relu_())
    result = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    result[places] = p.flatten()[slots]
    return result


def _bound(z: Tensor) -> Tensor:
    """A close lower bound of t, for rows of logits minus their maximum."""
    u, t = z.add(2).relu_(), torch.full_like(z[:, :1], -2)
    for _ in range(BOUND_STEPS):
        step = _step(u)
        u.sub_(step).relu_()
        t += step
    return t


def _gradient_of_few_entries(p: Tensor, dp: Tensor) -> Tensor | None:
    """The gradient of the logits of long rows; None if many coefficients are nonzero."""
    places = _places_above(p.new_zeros(len(p), 1), p, _block_maxima(p))
    if places is None:
        return None
    s = p[places].sqrt_()
    scaled, zeros = s * dp[places], s.new_zeros(len(p))
    ratio = zeros.index_add(0, places[0], scaled) / zeros.index_add(0, places[0], s)
    result = torch.zeros_like(p)
    result[places] = scaled.addcmul_(s, ratio[places[0]], value=-1)
    return result
