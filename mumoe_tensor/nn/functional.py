"""Fast torch functions: top-k, and entmax15 that saves only its result for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from mumoe_tensor import gates
from mumoe_tensor.calls import (
    get_proxy_mode,
    is_batched,
    is_exported,
    is_jit_traced,
    is_recorded,
    is_transformed,
    plain_apply,
)
from mumoe_tensor.compiling import constant_under_compile
from mumoe_tensor.nn import entmax, kernels
from mumoe_tensor.nn.kernels.coefficients import coefficients

__all__ = ["entmax15"]

#: Dtypes for computations.
WIDE = (torch.float32, torch.float64)


@gates.sparse_gradient
def entmax15(logits: Tensor) -> Tensor:
    """1.5-entmax along the last axis: `mumoe_tensor.entmax15` with its closed-form backward pass.

    Parameters
    ----------
    logits : Tensor of shape (..., N)
        An expert with logit −inf is masked. A row that contains NaN or +inf, or only −inf, becomes NaN.

    Returns
    -------
    Tensor of shape (..., N)
        The coefficients, in the dtype of `logits`. The computation is in float32, or float64 for
        float64 logits.
    """
    if logits.device.type in kernels.DEVICES and kernels.serve(logits):
        return coefficients(logits, power=2)
    is_eager = is_eager_on_cpu(logits)
    if not is_eager and (is_exported() or (not is_compiling() and forward_ad._current_level >= 0)):
        return _plain(logits)
    if torch.is_grad_enabled() or is_transformed():
        apply = _apply if is_eager else _Entmax15.apply
        result: Tensor = apply(logits, is_eager)
        return result
    # `apply` of an autograd function takes longer than computing a row.
    return _Entmax15.forward(logits, is_eager)


def softmax(logits: Tensor) -> Tensor:
    """`mumoe_tensor.softmax` along the last axis, computed by torch."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, -1, dtype=wide).to(logits.dtype)


def _plain(logits: Tensor) -> Tensor:
    """entmax15 by differentiable torch operations, in the dtype of the logits."""
    p: Tensor = gates.entmax15(logits)
    return p


@constant_under_compile
def has_float64(device: torch.device) -> bool:
    """Whether a device supports float64 (Apple's MPS does not), tested once per device type."""
    kind = device.type
    if kind not in _HAS_FLOAT64:
        try:
            torch.zeros((), dtype=torch.float64, device=device)
            _HAS_FLOAT64[kind] = True
        except (TypeError, RuntimeError):
            _HAS_FLOAT64[kind] = False
    return _HAS_FLOAT64[kind]


_HAS_FLOAT64: dict[str, bool] = {}


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, is_eager: bool) -> Tensor:
        z = logits if logits.dtype in WIDE else logits.float()
        if is_eager:
            p = entmax.coefficients_on_cpu(z)
            return p if z is logits else p.to(logits.dtype)
        if has_float64(z.device):
            return entmax.coefficients(z).to(logits.dtype)
        short = entmax.coefficients_in_float32(z)
        return _plain(logits) if short is None else short.to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The derivative depends only on p, so higher derivatives follow through p. The square root of
            # zero has no derivative and is kept out of the graph.
            s = torch.where(p > 0, torch.where(p > 0, p, 1).sqrt(), p)
            scaled = s * gradient
            return scaled - s * (scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True)), None
        dtype = torch.promote_types(p.dtype, torch.float32)
        solve = entmax.gradient_on_cpu if is_eager_on_cpu(gradient) else entmax.gradient
        return solve(p.to(dtype), gradient.to(dtype)).to(p.dtype), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], logits: Tensor, is_eager: bool
    ) -> tuple[Tensor, int]:
        axis, _ = in_dims
        assert axis is not None
        return _Entmax15.apply(logits.movedim(axis, 0), is_eager), 0


_apply = plain_apply(_Entmax15)


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k largest logits of each row and their indices.

    Returns None if the general functions must be used instead: if values cannot be read, a row contains NaN,
    or the k-th and the next largest logit of a row are equal. For float32 on a GPU the result is never None:
    values are not read, the first of several equal logits is selected, and rows with NaN coefficients get
    NaN.
    """
    if kernels.serve(logits) and logits.dtype == torch.float32 and not (is_recorded() or is_transformed()):
        return _largest_by_keys(logits, k)
    is_wide = logits.dtype in (torch.float32, torch.float64)
    if not is_wide or k >= logits.shape[-1] or not is_eager_on_cpu(logits):
        return None
    values, places = logits.topk(k + 1, -1)
    if not bool(((values[..., k - 1] > values[..., k]) & (values[..., 0] < torch.inf)).all()):
        return None
    return values[..., :k], places[..., :k]


def _largest_by_keys(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits and their indices, by integer keys that sort by logit, then by index."""
    # NaN is the largest value, and −0 equals 0.
    z = torch.where(logits < torch.inf, logits, torch.nan) + 0.0
    bits = z.detach().view(torch.int32).long()
    # The bits of nonnegative floats sort like the floats, those of negative floats in reverse.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered << 32) - torch.arange(z.shape[-1], device=z.device)
    places = keys.topk(k, -1).indices
    values = z.gather(-1, places)
    return torch.where(values[..., :1] > -torch.inf, values, torch.nan), places


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether the values of a tensor can be read immediately, and memory can be written in place."""
    if type(x) is not Tensor or x.device.type != "cpu":
        return False
    # `is_recorded` inlined, since a gate calls this for every level.
    if is_compiling() or is_jit_traced() or get_proxy_mode() or is_transformed() or is_batched(x):
        return False
    return forward_ad._current_level < 0  # a tangent would be lost
