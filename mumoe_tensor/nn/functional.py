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


entmax15.sparse_gradient = True  # type: ignore[attr-defined]  # see ExpertGate.is_sparse_gradient


class _Entmax15(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # Newton steps on ‖u‖ − 1 for u = (z / 2 − τ)₊, as many as `mumoe_tensor.entmax15` makes, and why, is
        # told there. In place, because the time goes into reading and writing u.
        u = torch.sub(z, z.amax(-1, keepdim=True)).mul_(0.5).add_(1).relu_()
        for _ in range((int(logits.shape[-1] - 1).bit_length() + 1) // 2 + 3):
            u.sub_(_newton_step(u).relu_()).relu_()
        # The last step may also go back: rounding errors may have led the others too far.
        u = torch.where(u > 0, u - _newton_step(u), u)
        return u.mul_(u).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            s = p.sqrt()
            scaled = s * gradient
            return scaled.sub_(s.mul_(scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True)))
        # The derivative is a function of p alone, so its own derivative follows through p. The root of zero
        # has none: it is kept out of the graph.
        s = torch.where(p > 0, torch.where(p > 0, p, 1).sqrt(), p)
        scaled = s * gradient
        return scaled - s * (scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))


def _newton_step(u: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return norm * (norm - 1) / u.sum(-1, keepdim=True)
