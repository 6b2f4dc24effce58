"""Batch norm of the gate's logits, padded tokens left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LogitBatchNorm(nn.BatchNorm1d):
    """Batch norm without affine parameters over all axes but the last; a mask may leave rows out.

    Parameters
    ----------
    num_features : int
    device : torch.device or str, optional
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None):
        super().__init__(num_features, affine=False, device=device)

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise logits of shape (..., features); `mask` of shape (...) is true where a row counts.

        Raises
        ------
        ValueError
            In training with fewer than two rows that count.
        """
        rows = logits.reshape(-1, logits.shape[-1])
        if not self.training:
            return super().forward(rows).reshape(logits.shape)
        if mask is None:
            self._check_rows(rows.shape[0])
            return super().forward(rows).reshape(logits.shape)
        counts = mask.reshape(-1, 1).to(rows.dtype)
        count = counts.sum()
        if not torch.compiler.is_compiling():
            self._check_rows(int(count))
        mean = (counts * rows).sum(0) / count
        centred = rows - mean
        variance = (counts * centred * centred).sum(0) / count
        statistics = ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1))))
        with torch.no_grad():
            for running, new in statistics:
                running.lerp_(new, self.momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return (centred * torch.rsqrt(variance + self.eps)).reshape(logits.shape)

    def _check_rows(self, rows: int) -> None:
        if rows < 2:
            raise ValueError(
                f"gate_norm='batch' needs at least two rows in training that the mask leaves in, got {rows}; "
                "use gate_norm='layer' or 'none', or call eval()."
            )

    def extra_repr(self) -> str:
        return f"{self.num_features}"
