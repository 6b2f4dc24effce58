"""entmax15 as a torch function that is quick and keeps nothing but its result for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["entmax15"]


def entmax15(logits: Tensor) -> Tensor:
    """1.5-entmax along the last axis: `mumoe_tensor.entmax15` with its closed-form backward pass.

    Parameters
    ----------
    logits : Tensor of shape (..., N)
        −inf masks an expert; a row with NaN or +inf, or nothing but −inf, becomes NaN.

    Returns
    -------
    Tensor of shape (..., N)
        Computed in float32, or in float64 where the logits are; in the dtype of `logits`.
    """
    result: Tensor = _Entmax15.apply(logits)
    return result


class _Entmax15(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        dtype = logits.dtype if logits.dtype.itemsize >= 4 else torch.float32
        z = logits.to(dtype)
        top = z.amax(-1, keepdim=True)
        z = 0.5 * (z - torch.where(top.abs() < torch.inf, top, torch.nan))
        # Newton steps on ‖u‖ − 1 for u = (z − τ)₊, as many as `mumoe_tensor.entmax15` makes, and why, is
        # told there.
        u = (z + 1).clamp(min=0)
        for _ in range((int(logits.shape[-1] - 1).bit_length() + 1) // 2 + 4):
            square = (u * u).sum(-1, keepdim=True)
            delta = (square - square.sqrt()) / u.sum(-1, keepdim=True)
            u = torch.where(u <= delta.clamp(min=0), 0, u - delta)
        return (u * u).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        # The derivative is a function of p alone, so its own derivative follows through p. The root of zero
        # has none: it is kept out of the graph.
        s = torch.where(p > 0, torch.where(p > 0, p, 1).sqrt(), p)
        scaled = s * gradient
        return scaled - s * (scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))
