"""Batched matrix products that write their result in the memory order of the next step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mumoe_tensor.calls import is_batched, is_recorded, is_transformed

#: Minimum size of a matrix for which writing a stack of matrices to strided memory is faster than copying it.
LARGE = 4096
#: Maximum size of a matrix for which copying it is faster than making two views.
COPIED = 1 << 16


def spread_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, where one operand is a stack of matrices and the other is a stack of one matrix.

    `torch.matmul` would reshape the stack to one matrix if either requires a gradient, and copy it.
    """
    if left.shape[0] == 1:
        return torch.bmm(left.expand(right.shape[0], -1, -1), right)
    return torch.bmm(left, right.expand(left.shape[0], -1, -1))


def stacked_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, for matrices or stacks of matrices."""
    is_spread = left.ndim == 3 and left.shape[0] != right.shape[0]
    return spread_product(left, right) if is_spread else left @ right


def permuted_product(left: Tensor, right: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """``(left @ right).permute(order)``; if possible, written contiguously without a copy."""
    if order is None:
        return stacked_product(left, right)
    if order[-2:] == (len(order) - 1, len(order) - 2):
        return stacked_product(right.mT, left.mT)
    if _can_write(left, right, order):
        shape = (len(left), left.shape[1], right.shape[2])
        result = left.new_empty([shape[axis] for axis in order])
        torch.bmm(left, right, out=result.permute([order.index(axis) for axis in range(3)]))
        return result
    return stacked_product(left, right).permute(order)


def summed_product(left: Tensor, right: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """``(left @ right).sum(0, keepdim=True).permute(order)``, contiguous."""
    if order is not None:  # the stack comes first
        left, right = right.mT, left.mT
    rows, columns = left.shape[1], right.shape[2]
    if rows * columns <= (rows + columns) * left.shape[2]:
        return stacked_product(left, right).sum(0, keepdim=True)
    # As a single product, since copies of the operands take less memory than separate products would.
    return torch.tensordot(left, right, dims=([0, 2], [0, 1])).unsqueeze(0)


def product_above_sum(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, then the sum of the rows of `right`, as if `left` had a last row of ones."""
    if is_recorded() or len(left) * right.shape[1] < COPIED or not _takes_out(left, right):
        return torch.cat((left @ right, right.sum(0, keepdim=True)))
    result = right.new_empty(len(left) + 1, right.shape[1])
    torch.mm(left, right, out=result[:-1])
    torch.sum(right, 0, out=result[-1])
    return result


def _can_write(left: Tensor, right: Tensor, order: tuple[int, ...]) -> bool:
    # The matrices must have contiguous rows or columns.
    return (
        not is_recorded()  # first, since the other conditions would fix the sizes of a compiled function
        and order[-1] != 0
        and len(left) == len(right)
        and left.shape[1] * right.shape[2] >= LARGE
        and _takes_out(left, right)
    )


def _takes_out(left: Tensor, right: Tensor) -> bool:
    # Operations with `out` have no derivative, and transforms and compilers do not support them.
    return (
        type(left) in (Tensor, nn.Parameter)
        and type(right) in (Tensor, nn.Parameter)
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and not (is_transformed() or is_batched(left) or is_batched(right))
    )


@dataclass(frozen=True)
class Joined:
    """The last product for a split output, permuted to the order of the output, contiguously."""

    order: tuple[int, ...]

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        if _can_write(left, right, self.order):
            return permuted_product(left, right, self.order)
        # Not `contiguous`, which fails for fake GPU tensors on a CPU-only build.
        return (left @ right).permute(self.order).clone(memory_format=torch.contiguous_format)
