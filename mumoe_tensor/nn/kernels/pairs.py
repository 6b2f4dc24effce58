"""Both gradients of an elementwise product of two arrays of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# The operator has no derivative; the autograd function that calls it does.
@torch.library.custom_op("mumoe_tensor::product_backward", mutates_args=())
def product_backward(gradient: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``(gradient * right, gradient * left)``, for contiguous arrays of the same shape and dtype."""
    from mumoe_tensor.nn.kernels.elementwise import multiply_both

    of_left, of_right = torch.empty_like(gradient), torch.empty_like(gradient)
    multiply_both(gradient, left, right, of_left, of_right)
    return of_left, of_right


@product_backward.register_fake
def _(gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gradient.new_empty(gradient.shape), gradient.new_empty(gradient.shape)
