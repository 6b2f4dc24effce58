"""Mean and spread of rows, accumulated over batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """The mean of rows, and the sum of their squared distances from it.

    Attributes
    ----------
    rows : int
    mean : Tensor of float64 of shape (features,)
    spread : float
    """

    def __init__(self) -> None:
        self.rows, self.mean, self.spread = 0, torch.zeros((), dtype=torch.float64, device="cpu"), 0.0

    def update(self, rows: Tensor) -> None:
        """Add rows of shape (n, features), in float32 or float64."""
        if not len(rows):
            return
        # Merge means (Chan et al.) to avoid the cancellation in a difference of sums of squares.
        mean, count = rows.mean(0), len(rows)
        apart = mean.cpu().double() - self.mean
        share = count / (self.rows + count)
        self.spread += float((rows - mean).square().sum())
        self.spread += float(apart.square().sum()) * self.rows * share
        self.mean = self.mean + share * apart
        self.rows += count
