"""Coefficients of logits and their gradients, each by one kernel: the norm, then entmax15 or sparsemax."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mumoe_tensor.calls import is_batched

Norm = Literal["none", "layer", "batch"]
#: Added to variances, as in torch.
EPS = 1e-5


def coefficients(
    logits: Tensor,
    power: int,
    norm: Norm = "none",
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Coefficients of logits along the last axis, for tensors that the kernels support.

    Parameters
    ----------
    logits : Tensor of shape (..., N)
    power : int
        2 for entmax15, 1 for sparsemax.
    norm : {"none", "layer", "batch"}
        Norm of the logits, without affine parameters. ``"batch"`` is batch norm in evaluation mode.
    mean, variance : Tensor of shape (N,), optional
        The running statistics of batch norm, to which no gradient flows.
    dtype : torch.dtype, optional
        Dtype of the coefficients, by default the dtype of the logits. The computation is in float32.
    """
    result: Tensor = _Coefficients.apply(logits, mean, variance, norm, power, dtype or logits.dtype)
    return result


class _Coefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        norm: Norm,
        power: int,
        dtype: torch.dtype,
    ) -> Tensor:
        p: Tensor = simplex(logits, mean, variance, norm, power, dtype)
        return p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, mean, variance, ctx.norm, ctx.power, _ = inputs
        ctx.dtype = logits.dtype
        # Only layer norm requires the logits.
        ctx.save_for_backward(output, logits if ctx.norm == "layer" else None, mean, variance)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        p, logits, mean, variance = ctx.saved_tensors
        # A compiler cannot trace `is_batched`, and has no batched gradients.
        is_batch = not torch.compiler.is_compiling() and is_batched(gradient)
        is_plain = not (torch.is_grad_enabled() or is_batch)
        function = simplex_backward if is_plain else _differentiable
        result = function(gradient, p, logits, mean, variance, ctx.norm, ctx.power, ctx.dtype)
        return result, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], logits: Tensor, *others: Any) -> tuple[Tensor, int]:
        axis, *statistics = in_dims[:3]
        if axis is None or any(place is not None for place in statistics):
            raise ValueError("vmap must map over the logits only, got mapped statistics of batch norm.")
        return _Coefficients.apply(logits.movedim(axis, 0), *others), 0


def _differentiable(
    gradient: Tensor,
    p: Tensor,
    logits: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    norm: Norm,
    power: int,
    dtype: torch.dtype,
) -> Tensor:
    """The same as `simplex_backward`, by differentiable operations."""
    p, gradient = p.float(), gradient.float()
    # The square root of zero has no derivative and is kept out of the graph.
    s = torch.where(p > 0, torch.where(p > 0, p, 1).sqrt() if power == 2 else 1.0, p)
    result = s * gradient
    result = result - s * (result.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))
    if logits is not None:
        centred = logits.float() - logits.float().mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
        normed = centred * scale
        along = normed * (result * normed).mean(-1, keepdim=True)
        result = scale * (result - result.mean(-1, keepdim=True) - along)
    if variance is not None:
        result = result * torch.rsqrt(variance.float() + EPS)
    return result.to(dtype)


@torch.library.custom_op("mumoe_tensor::simplex", mutates_args=())
def simplex(
    logits: Tensor, mean: Tensor | None, variance: Tensor | None, norm: str, power: int, dtype: torch.dtype
) -> Tensor:
    """The coefficients, without a derivative."""
    from mumoe_tensor.nn.kernels.simplex import forward

    p = logits.new_empty(logits.shape, dtype=dtype)
    forward(_rows(logits), mean, variance, p.view(-1, p.shape[-1]), norm, EPS, power)
    return p


@simplex.register_fake
def _(logits: Tensor, mean: Any, variance: Any, norm: str, power: int, dtype: torch.dtype) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype)


@torch.library.custom_op("mumoe_tensor::simplex_backward", mutates_args=())
def simplex_backward(
    gradient: Tensor,
    p: Tensor,
    logits: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    norm: str,
    power: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the logits."""
    from mumoe_tensor.nn.kernels.simplex import backward

    shape = p.shape
    gradient, p = (x.contiguous().view(-1, x.shape[-1]) for x in (gradient, p))
    result = p.new_empty(p.shape, dtype=dtype)
    backward(gradient, p, None if logits is None else _rows(logits), variance, result, norm, EPS, power)
    return result.view(shape)


@simplex_backward.register_fake
def _(gradient: Tensor, p: Tensor, *others: Any) -> Tensor:
    return p.new_empty(p.shape, dtype=others[-1])


@simplex_backward.register_vmap
def _(info: Any, in_dims: Any, gradient: Tensor, p: Tensor, logits: Any, *others: Any) -> tuple[Tensor, int]:
    arrays = [
        x if x is None else x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
        for x, axis in zip((gradient, p, logits), in_dims[:3], strict=True)
    ]
    return simplex_backward(*arrays, *others), 0


def _rows(x: Tensor) -> Tensor:
    """Reshape a tensor to contiguous rows; a level of the logits is not copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
