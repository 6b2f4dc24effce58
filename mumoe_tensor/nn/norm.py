"""Batch norm of the gate's logits, which can ignore padded tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.compiler import is_compiling

from mumoe_tensor.calls import backward_pass, is_recorded


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllReduce.forward(ctx, gradient)


class LogitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm without affine parameters over all axes but the last, with an optional mask of rows.

    In distributed training the statistics are computed over all processes. A forward pass that activation
    checkpointing repeats does not update the running statistics, unless it is compiled. Tools that look for
    torch's batch norms, such as `torch.optim.swa_utils.update_bn`, recognise this class.

    The running statistics are stored in float32 or wider.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    #: Number of processes with a copy of each row: one, or the number over which `parallelize` divides the
    #: layer.
    copies = 1

    def __init__(
        self, num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        super().__init__(num_features, affine=False, device=device, dtype=dtype)

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise logits of shape (..., features); `mask`, of shape (...), is true for rows to include.

        Raises
        ------
        ValueError
            In training, if fewer than two rows are included.
        """
        rows = logits if logits.ndim == 2 else logits.reshape(-1, logits.shape[-1])
        if not self.training and self.track_running_stats:
            if rows.dtype == self.running_var.dtype:
                # As `nn.functional.batch_norm` calls it.
                running = self.running_mean, self.running_var
                normed = torch.batch_norm(rows, None, None, *running, False, 0.0, self.eps, False)
                return normed.reshape(logits.shape)
            scale, shift = self.affine_map(rows.dtype)
            return torch.addcmul(shift, rows, scale).reshape(logits.shape)
        shared = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        # A forward pass inside a backward pass is a repetition by activation checkpointing.
        is_repeated = not is_compiling() and backward_pass() != -1
        advances = self.track_running_stats and not is_repeated
        running = self.running_mean, self.running_var
        if mask is None and not shared and (running[0] is None or rows.dtype == running[0].dtype):
            if rows.shape[0] < 2:
                raise _too_few(rows.shape[0])
            if advances:
                self.num_batches_tracked.add_(1)
            elif running[0] is not None:
                running = running[0].clone(), running[1].clone()
            weight = self._weight() if advances else 0.0
            normed = nn.functional.batch_norm(rows, *running, training=True, momentum=weight, eps=self.eps)
            return normed.reshape(logits.shape)
        counts = rows.new_ones(rows.shape[0], 1) if mask is None else mask.reshape(-1, 1).to(rows.dtype)

        def counted(values: Tensor) -> Tensor:
            # Masked rows may contain anything, even NaN.
            return values if mask is None else torch.where(mask.reshape(-1, 1), values, 0)

        total = _AllReduce.apply if shared else lambda sums: sums
        sums = total(torch.cat([counted(rows).sum(0), counts.sum(0)]))
        count = sums[-1].detach()
        # Copies of a row do not change a mean, but are not additional samples.
        rows_seen = count / self.copies
        if not is_recorded() and int(rows_seen) < 2:
            raise _too_few(int(rows_seen))
        mean = sums[:-1] / count
        centred = rows - mean
        variance = total(counted(centred).square().sum(0)) / count
        if advances:
            self._advance(mean.detach(), variance.detach() * (rows_seen / (rows_seen - 1)))
        return (centred * torch.rsqrt(variance + self.eps)).reshape(logits.shape)

    def affine_map(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift of every feature in evaluation mode."""
        scale = torch.rsqrt(self.running_var.to(dtype) + self.eps)
        return scale, -self.running_mean.to(dtype) * scale

    @torch.no_grad()
    def _advance(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        weight = self._weight()
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(new.to(running.dtype), weight)

    def _weight(self) -> float:
        """Weight of the latest batch, which `num_batches_tracked` already includes."""
        return 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"{self.num_features}"


def _too_few(rows: int) -> ValueError:
    return ValueError(
        f"gate_norm='batch' needs at least two unmasked rows in training, got {rows}; use "
        "gate_norm='layer' or 'none', or call eval()."
    )
