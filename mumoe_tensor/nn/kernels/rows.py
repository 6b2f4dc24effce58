"""Weighted sums of indexed rows of a factor, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# These operators have no derivative; the autograd function that calls them does.


@torch.library.custom_op("mumoe_tensor::sum_of_indexed_rows", mutates_args=())
def sum_of_indexed_rows(values: Tensor, indices: Tensor, factor: Tensor) -> Tensor:
    """``(values.unsqueeze(-1) * factor[indices]).sum(1)`` for values and indices of shape (rows, k)."""
    from mumoe_tensor.nn.kernels.gather import forward

    result = factor.new_empty(len(values), factor.shape[1])
    forward(values.contiguous(), indices.contiguous(), factor, result)
    return result


@sum_of_indexed_rows.register_fake
def _(values: Tensor, indices: Tensor, factor: Tensor) -> Tensor:
    return factor.new_empty(len(values), factor.shape[1])


@torch.library.custom_op("mumoe_tensor::sum_of_indexed_rows_backward", mutates_args=())
def sum_of_indexed_rows_backward(
    values: Tensor, indices: Tensor, factor: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the values and of the factor."""
    from mumoe_tensor.nn.kernels.gather import backward

    values, indices, gradient = (x.contiguous() for x in (values, indices, gradient))
    of_values = torch.empty_like(values)
    of_factor = torch.zeros(factor.shape, dtype=torch.float32, device=factor.device)
    backward(values, indices, factor, gradient, of_values, of_factor)
    return of_values, of_factor.to(factor.dtype)


@sum_of_indexed_rows_backward.register_fake
def _(values: Tensor, indices: Tensor, factor: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), factor.new_empty(factor.shape)
