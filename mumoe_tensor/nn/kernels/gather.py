"""Triton kernels for the product of a factor and coefficients in indexed form, k of N for each input.

In the forward pass, a program reads only the rows of the factor that one input selects. In the backward
pass, a program processes one of these rows and adds its part of the factor's gradient by float32 atomics.
(Sorting by expert would take several launches, and assign all inputs of a popular expert to one program.)
The last bits of the gradient therefore depend on the order of the programs, as with torch's `index_add`.

Import this module only inside functions, since it imports Triton. Triton's interpreter does not support
string annotations.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Maximum number of columns of the factor that a program reads in one load.
MOST_COLUMNS = 1024


def forward(values: Tensor, indices: Tensor, factor: Tensor, result: Tensor) -> None:
    """Write the product to contiguous rows. Values and indices must also be contiguous."""
    (rows, k), rank = values.shape, factor.shape[1]
    block = _block(rank)
    if result.numel():
        with torch.cuda.device_of(factor):
            _sum_of_rows[(rows, triton.cdiv(rank, block))](
                values, indices, factor, result, k, rank, *factor.stride(), **_shape(block)
            )


def backward(
    values: Tensor, indices: Tensor, factor: Tensor, gradient: Tensor, of_values: Tensor, of_factor: Tensor
) -> None:
    """Write the gradient of the values, and add the gradient of the factor to float32 zeros.

    All arrays except the factor must be contiguous.
    """
    (rows, k), rank = values.shape, factor.shape[1]
    if values.numel():
        with torch.cuda.device_of(factor):
            _gradients[(rows, k)](
                values, indices, factor, gradient, of_values, of_factor, k, rank, *factor.stride(),
                **_shape(_block(rank)),
            )  # fmt: skip


def _block(rank: int) -> int:
    return min(MOST_COLUMNS, max(32, triton.next_power_of_2(rank)))


def _shape(block: int) -> dict[str, Any]:
    return {"BLOCK": block, "num_warps": max(1, block // 256), "enable_fp_fusion": False}


@triton.jit
def _sum_of_rows(
    values_ptr, indices_ptr, factor_ptr, result_ptr, k, rank, row_stride, column_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < rank
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(k):
        index = tl.load(indices_ptr + row * k + j)
        value = tl.load(values_ptr + row * k + j).to(tl.float32)
        place = factor_ptr + index * row_stride + column * column_stride
        total += value * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result_ptr + row * rank + column, total.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    values_ptr, indices_ptr, factor_ptr, gradient_ptr, of_values_ptr, of_factor_ptr, k, rank, row_stride,
    column_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = row * k + tl.program_id(1)
    index = tl.load(indices_ptr + pair)
    value = tl.load(values_ptr + pair).to(tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rank, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < rank
        gradient = tl.load(gradient_ptr + row * rank + column, mask=inside, other=0.0).to(tl.float32)
        place = factor_ptr + index * row_stride + column * column_stride
        products += gradient * tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.atomic_add(of_factor_ptr + index * rank + column, value * gradient, mask=inside, sem="relaxed")
    tl.store(of_values_ptr + pair, tl.sum(products).to(of_values_ptr.dtype.element_ty))
