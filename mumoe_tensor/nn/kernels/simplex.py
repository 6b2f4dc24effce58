"""Triton kernels for entmax15 and sparsemax of rows of logits, including the norm of the logits.

Both are p = u**POWER for u = (z / POWER − τ)₊ with τ such that p sums to one: POWER is 2 for entmax15, and 1
for sparsemax. As in the implementation for other devices, the Newton steps start left of the root of a convex
function of τ, and the last step uses a sum that is exact to the last bit.

A row that fits into one block is read once and stays in registers. A longer row is read once per step, so
the steps start close to the root: at the root for the maxima of several thousand equal groups of logits.
(The root for fewer logits is further left.)

Import this module only inside functions, since it imports Triton. Triton's interpreter does not support
string annotations.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mumoe_tensor.gates import ENTMAX15_STEPS

#: The steps end when the sum of the coefficients exceeds one by at most this.
TOLERANCE = tl.constexpr(2.0**-22)
#: Length of the longest row that stays in registers, and number of logits per load in longer rows.
LONGEST_WHOLE = 2**14
CHUNK = 2**12
#: Number of logits per warp.
PER_WARP = 2**10
#: Round every product, as in the interpreter. The kernels are limited by memory, not by arithmetic.
OPTIONS = {"enable_fp_fusion": False}


def forward(
    logits: Tensor, mean: Tensor | None, variance: Tensor | None, p: Tensor, norm: str, eps: float, power: int
) -> None:
    """Write the coefficients of rows of logits. Each row of the logits, and `p`, must be contiguous."""
    bits = (logits.shape[1] - 1).bit_length()
    steps = ENTMAX15_STEPS[bits] if power == 2 else bits + 4  # as in `mumoe_tensor.gates`
    sizes = (*logits.shape, logits.stride(0), eps, steps, norm, power)
    _launch(_forward_whole, _forward_in_chunks, (logits, mean, variance, p), sizes)


def backward(
    gradient: Tensor,
    p: Tensor,
    logits: Tensor | None,
    variance: Tensor | None,
    result: Tensor,
    norm: str,
    eps: float,
    power: int,
) -> None:
    """Write the gradients of rows of logits. Layer norm needs the logits. All others must be contiguous."""
    sizes = (*p.shape, 0 if logits is None else logits.stride(0), eps, norm, power)
    _launch(_backward_whole, _backward_in_chunks, (gradient, p, logits, variance, result), sizes)


def _launch(whole: Any, in_chunks: Any, arrays: tuple[Any, ...], sizes: tuple[Any, ...]) -> None:
    num_rows, n = sizes[:2]
    if not num_rows:
        return
    block = max(32, triton.next_power_of_2(n))
    rows = max(1, PER_WARP // block)
    with torch.cuda.device_of(arrays[0]):
        if n > LONGEST_WHOLE:
            in_chunks[(num_rows,)](*arrays, *sizes, BLOCK=CHUNK, num_warps=CHUNK // 512, **OPTIONS)
        else:
            shape = {"ROWS": rows, "BLOCK": block, "num_warps": max(1, block // PER_WARP)}
            whole[(triton.cdiv(num_rows, rows),)](*arrays, *sizes, **shape, **OPTIONS)


@triton.jit
def _forward_whole(
    x_ptr, mean, variance, p_ptr, num_rows, n, stride, eps, steps,
    NORM: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _places(tl.program_id(0).to(tl.int64) * ROWS, 0, num_rows, n, ROWS, BLOCK)
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM == "layer":
        x = tl.where(inside, x - (tl.sum(x, 1) / n)[:, None], 0.0)
        x = x * _inverse_root(tl.sum(x * x, 1) / n + eps)[:, None]
    if NORM == "batch":
        x = _batch_normed(x, mean, variance, column, n, eps)
    x = tl.where(inside, x, -float("inf"))
    top, is_bad = _largest(x, _is_nan(x))
    z = tl.where(is_bad[:, None], 0.0, x - top[:, None]) * (1.0 / POWER)
    u = tl.maximum(z - _near_root(z, steps, POWER)[:, None], 0.0)
    coarse, fine = _parts(u, POWER)
    excess = (tl.sum(coarse, 1) - 1.0) + tl.sum(fine, 1)
    # The step updates u itself: a rounding error of τ would affect every coefficient. A step back keeps the
    # support.
    shift = _shift(excess, tl.sum(_slopes(u, POWER), 1), POWER)[:, None]
    u = tl.where(u > tl.maximum(shift, 0.0), u - shift, 0.0)
    p = tl.where(is_bad[:, None], float("nan"), _powers(u, POWER))
    tl.store(p_ptr + row * n + column, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_in_chunks(
    x_ptr, mean, variance, p_ptr, num_rows, n, stride, eps, steps,
    NORM: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    centre, scale = 0.0, 1.0
    if NORM == "layer":
        centre = _mean(x_ptr, row, num_rows, n, stride, BLOCK)
        squares = tl.zeros([1, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            _, column, inside = _places(row, start, num_rows, n, 1, BLOCK)
            x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - centre, 0.0)
            squares += x * x
        scale = _inverse_root(tl.sum(squares) / n + eps)

    tops = tl.full([1, BLOCK], -float("inf"), tl.float32)
    is_nan = tl.zeros([1, BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        x = _chunk(x_ptr, mean, variance, row, start, num_rows, n, stride, eps, centre, scale, NORM, BLOCK)
        tops = tl.maximum(tops, x)
        is_nan = tl.maximum(is_nan, _is_nan(x))
    top, is_bad = _largest(tops, is_nan)
    z = tl.where(is_bad[:, None], 0.0, tops - top[:, None]) * (1.0 / POWER)
    # τ is stored as the sum of two numbers: rounded to one, its error would affect every coefficient.
    near, rest = _near_root(z, steps, POWER)[:, None], tl.zeros([1, 1], tl.float32)

    worst = tl.max(tl.where(is_bad, 0.0, 1.0), 0)
    step = 0
    while (worst > TOLERANCE) & (step < steps):
        coarse = tl.zeros([1, BLOCK], tl.float32)
        fine = tl.zeros([1, BLOCK], tl.float32)
        slopes = tl.zeros([1, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            x = _chunk(
                x_ptr, mean, variance, row, start, num_rows, n, stride, eps, centre, scale, NORM, BLOCK
            )
            u = tl.maximum((x - top[:, None]) * (1.0 / POWER) - near - rest, 0.0)
            more_coarse, more_fine = _parts(u, POWER)
            coarse += more_coarse
            fine += more_fine
            slopes += _slopes(u, POWER)
        excess = (tl.sum(coarse, 1) - 1.0) + tl.sum(fine, 1)
        rest += _shift(excess, tl.sum(slopes, 1), POWER)[:, None]
        worst = tl.max(tl.abs(excess), 0)
        step += 1

    for start in range(0, n, BLOCK):
        x = _chunk(x_ptr, mean, variance, row, start, num_rows, n, stride, eps, centre, scale, NORM, BLOCK)
        u = tl.maximum((x - top[:, None]) * (1.0 / POWER) - near - rest, 0.0)
        p = tl.where(is_bad[:, None], float("nan"), _powers(u, POWER))
        _, column, inside = _places(row, start, num_rows, n, 1, BLOCK)
        tl.store(p_ptr + row * n + column, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_whole(
    gradient_ptr, p_ptr, x_ptr, variance, result_ptr, num_rows, n, stride, eps,
    NORM: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _places(tl.program_id(0).to(tl.int64) * ROWS, 0, num_rows, n, ROWS, BLOCK)
    s, scaled = _weighted(gradient_ptr, p_ptr, row * n + column, inside, POWER)
    # Rows outside the array get a nonzero sum, to avoid 0 / 0.
    result = scaled - s * (tl.sum(scaled, 1) / tl.sum(tl.where(row < num_rows, s, 1.0), 1))[:, None]
    if NORM == "layer":
        x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - (tl.sum(x, 1) / n)[:, None], 0.0)
        scale = _inverse_root(tl.sum(x * x, 1) / n + eps)[:, None]
        # The gradients of a row already sum to zero, so they need not be centred.
        result = scale * (result - x * (scale * scale * (tl.sum(result * x, 1) / n)[:, None]))
    if NORM == "batch":
        result = result * _batch_scale(variance, column, n, eps)
    tl.store(result_ptr + row * n + column, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_in_chunks(
    gradient_ptr, p_ptr, x_ptr, variance, result_ptr, num_rows, n, stride, eps,
    NORM: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    roots = tl.zeros([1, BLOCK], tl.float32)
    sums = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        _, column, inside = _places(row, start, num_rows, n, 1, BLOCK)
        s, scaled = _weighted(gradient_ptr, p_ptr, row * n + column, inside, POWER)
        roots += s
        sums += scaled
    average = tl.sum(sums) / tl.sum(roots)

    centre, scale, along = 0.0, 1.0, 0.0
    if NORM == "layer":
        centre = _mean(x_ptr, row, num_rows, n, stride, BLOCK)
        squares = tl.zeros([1, BLOCK], tl.float32)
        products = tl.zeros([1, BLOCK], tl.float32)
        for start in range(0, n, BLOCK):
            _, column, inside = _places(row, start, num_rows, n, 1, BLOCK)
            s, scaled = _weighted(gradient_ptr, p_ptr, row * n + column, inside, POWER)
            x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - centre, 0.0)
            squares += x * x
            products += (scaled - s * average) * x
        scale = _inverse_root(tl.sum(squares) / n + eps)
        along = scale * scale * (tl.sum(products) / n)

    for start in range(0, n, BLOCK):
        _, column, inside = _places(row, start, num_rows, n, 1, BLOCK)
        s, scaled = _weighted(gradient_ptr, p_ptr, row * n + column, inside, POWER)
        result = scaled - s * average
        if NORM == "layer":
            x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
            result = scale * (result - (x - centre) * along)
        if NORM == "batch":
            result = result * _batch_scale(variance, column, n, eps)
        tl.store(result_ptr + row * n + column, result.to(result_ptr.dtype.element_ty), mask=inside)


# ---- parts of several kernels; blocks have the shape (rows, columns) ---------------------------------------


@triton.jit
def _places(first_row, start, num_rows, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns of a block, and a mask of the entries inside the array."""
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (start + tl.arange(0, BLOCK))[None, :]
    return row, column, (row < num_rows) & (column < n)


@triton.jit
def _chunk(
    x_ptr, mean, variance, row, start, num_rows, n, stride, eps, centre, scale,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of a row after the norm, −inf outside the row."""
    _, column, inside = _places(row, start, num_rows, n, 1, BLOCK)
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM == "layer":
        x = (x - centre) * scale
    if NORM == "batch":
        x = _batch_normed(x, mean, variance, column, n, eps)
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _mean(x_ptr, row, num_rows, n, stride, BLOCK: tl.constexpr):
    total = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        _, column, inside = _places(row, start, num_rows, n, 1, BLOCK)
        total += tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(total) / n


@triton.jit
def _inverse_root(x):
    # `tl.rsqrt` is an approximation.
    return 1.0 / tl.sqrt_rn(x)


@triton.jit
def _batch_scale(variance, column, n, eps):
    return _inverse_root(tl.load(variance + column, mask=column < n, other=0.0).to(tl.float32) + eps)


@triton.jit
def _batch_normed(x, mean, variance, column, n, eps):
    centre = tl.load(mean + column, mask=column < n, other=0.0).to(tl.float32)
    return (x - centre) * _batch_scale(variance, column, n, eps)


@triton.jit
def _is_nan(x):
    return tl.where(x == x, 0, 1)


@triton.jit
def _largest(x, is_nan):
    """The maximum of each row, and whether the coefficients of the row are NaN."""
    top = tl.max(x, 1)
    return top, (tl.max(is_nan, 1) > 0) | (tl.abs(top) == float("inf"))


@triton.jit
def _powers(u, POWER: tl.constexpr):
    return u * u if POWER == 2 else u


@triton.jit
def _slopes(u, POWER: tl.constexpr):
    """u**(POWER - 1): the derivatives of the coefficients, up to a factor."""
    return u if POWER == 2 else tl.where(u > 0.0, 1.0, 0.0)


@triton.jit
def _parts(u, POWER: tl.constexpr):
    """Coefficients as multiples of 2**-22, which add up exactly in float32, and the remainders."""
    p = _powers(u, POWER)
    coarse = (p + 2.0) - 2.0
    return coarse, p - coarse


@triton.jit
def _shift(excess, slope, POWER: tl.constexpr):
    """The Newton step of τ, from the excess of the sum of coefficients over one, and the sum of slopes."""
    if POWER == 2:
        # For ‖u‖ − 1; with ‖u‖² − 1, it takes up to twice as many steps.
        norm = tl.sqrt_rn(1.0 + excess)
        shift = norm * excess / ((1.0 + norm) * slope)
    else:
        shift = excess / slope
    return shift


@triton.jit
def _near_root(z, steps, POWER: tl.constexpr):
    """τ of rows with maximum zero, up to rounding errors."""
    tau = tl.max(z, 1) - 1.0
    worst = tl.max(tau, 0) + 2.0
    step = 0
    while (worst > TOLERANCE) & (step < steps):
        u = tl.maximum(z - tau[:, None], 0.0)
        excess = tl.sum(_powers(u, POWER), 1) - 1.0
        tau += tl.maximum(_shift(excess, tl.sum(_slopes(u, POWER), 1), POWER), 0.0)
        worst = tl.max(excess, 0)
        step += 1
    return tau


@triton.jit
def _weighted(gradient_ptr, p_ptr, place, inside, POWER: tl.constexpr):
    """The slopes of coefficients, and their products with the gradient."""
    p = tl.load(p_ptr + place, mask=inside, other=0.0).to(tl.float32)
    # Propagate NaN.
    s = tl.sqrt_rn(p) if POWER == 2 else tl.where(p > 0.0, 1.0, p)
    return s, s * tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
