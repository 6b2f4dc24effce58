"""Fast functions of torch: entmax15, which keeps only its result for the backward pass, and top-k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from mumoe_tensor import gates
from mumoe_tensor.calls import get_proxy_mode, is_exported, is_jit_traced, is_transformed
from mumoe_tensor.compiling import constant_under_compile
from mumoe_tensor.nn import kernels
from mumoe_tensor.nn.kernels.coefficients import coefficients

__all__ = ["entmax15"]


@gates.sparse_gradient
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
    if kernels.serve(logits):
        return coefficients(logits, power=2)
    if not is_eager_on_cpu(logits) and is_exported():
        return _plain(logits)
    if torch.is_grad_enabled() or is_transformed():
        result: Tensor = _Entmax15.apply(logits)
        return result
    # (Applying a function takes longer than computing a row.)
    return _Entmax15.forward(logits)


def _plain(logits: Tensor) -> Tensor:
    """The same from operations of torch that have derivatives, in one precision."""
    p: Tensor = gates.entmax15(logits)
    return p


@constant_under_compile
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, tried once for each kind of device: Apple's MPS does not."""
    kind = device.type
    if kind not in _HAS_FLOAT64:
        try:
            torch.zeros((), dtype=torch.float64, device=device)
            _HAS_FLOAT64[kind] = True
        except (TypeError, RuntimeError):
            _HAS_FLOAT64[kind] = False
    return _HAS_FLOAT64[kind]


_HAS_FLOAT64: dict[str, bool] = {}

#: Elements of a chunk of rows on a CPU: every step reads and writes them, so they stay in its cache.
CHUNK = 2**19


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not is_eager_on_cpu(z):
            return _solve(z).to(logits.dtype) if has_float64(z.device) else _plain(logits)
        p = torch.empty_like(z, memory_format=torch.contiguous_format)
        if z.numel() <= CHUNK:
            _solve(z, p, can_stop=True)
        else:
            for part, result in zip(_chunks(z), _chunks(p), strict=True):
                _solve(part, result, can_stop=True)
        return p.to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The derivative is a function of p alone, so its own derivative follows through p. The root of
            # zero has none: it is kept out of the graph.
            s = torch.where(p > 0, torch.where(p > 0, p, 1).sqrt(), p)
            scaled = s * gradient
            return scaled - s * (scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))
        dtype = torch.promote_types(p.dtype, torch.float32)
        if p.numel() <= CHUNK or not is_eager_on_cpu(gradient):
            return _gradient(p.to(dtype), gradient.to(dtype)).to(p.dtype)
        # (Not into memory allocated before: under vmap the gradient is a batch of gradients.)
        parts = zip(_chunks(p.to(dtype)), _chunks(gradient.to(dtype)), strict=True)
        return torch.cat([_gradient(*part) for part in parts]).reshape(p.shape).to(p.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], logits: Tensor) -> tuple[Tensor, int]:
        (axis,) = in_dims
        assert axis is not None
        return _Entmax15.apply(logits.movedim(axis, 0)), 0


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k largest logits of each row and their places, for gates that then leave all others alone.

    None where the general functions must be used: values cannot be read, a row has NaN, or the k-th largest
    logit of a row has an equal that is not among the k.
    """
    is_wide = logits.dtype in (torch.float32, torch.float64)
    if not is_wide or k >= logits.shape[-1] or not is_eager_on_cpu(logits):
        return None
    values, places = logits.topk(k + 1, -1)
    if not bool(((values[..., k - 1] > values[..., k]) & (values[..., 0] < torch.inf)).all()):
        return None
    return values[..., :k], places[..., :k]


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether the values of a tensor can be read at once, and memory be written in place."""
    if type(x) is not Tensor or x.device.type != "cpu":
        return False
    # (`is_recorded` written out: a gate asks this for every level.)
    return not (is_compiling() or is_jit_traced() or get_proxy_mode() or is_transformed())


def _chunks(x: Tensor) -> Sequence[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    return rows.split(max(1, CHUNK // x.shape[-1]))


def _solve(z: Tensor, result: Tensor | None = None, can_stop: bool = False) -> Tensor:
    """The coefficients of rows of logits."""
    # Newton steps on ‖u‖ − 2 for u = (z − 2τ)₊. In place, because the time goes into reading and writing u.
    u = torch.sub(z, z.amax(-1, keepdim=True), out=result).add_(2).relu_()
    for k in range(gates.ENTMAX15_STEPS[int(z.shape[-1] - 1).bit_length()]):
        norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        step = (norm * (norm - 2) / u.sum(-1, keepdim=True)).relu_()
        u.sub_(step).relu_()
        # The test takes about a quarter of a step, and on other devices much longer.
        if can_stop and k % 2 and bool((step <= torch.finfo(u.dtype).eps).all()):
            break
    # The last step may also go back, where rounding errors have led too far: with a finer norm, and on the
    # support alone, which it leaves as it is.
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True, dtype=torch.float64)
    step = norm * (2 - norm) / u.sum(-1, keepdim=True)
    # (Without `value`, of which torch.compile makes an operation that torch.func.grad cannot differentiate.)
    u.addcmul_(u.sign(), step.to(u.dtype)).mul_(0.5)
    return u.mul_(u)


def _gradient(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the logits from the coefficients and their gradient."""
    # (A CPU takes many times longer for the root of zero than for that of other numbers.)
    s = p.clamp_min(torch.finfo(p.dtype).tiny).rsqrt_().mul_(p)
    scaled = s * gradient
    return scaled.addcmul_(s, -scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))
