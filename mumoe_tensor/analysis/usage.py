"""Usage of experts."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

#: Number of coefficients per chunk, which should fit into the CPU cache.
CHUNK = 2**20


@dataclass(frozen=True)
class UsageStatistics:
    """Usage statistics for the experts of one level.

    Attributes
    ----------
    rows : int
        Number of inputs.
    load : Tensor of shape (N,)
        For each expert, the fraction of inputs with a coefficient of at least the threshold.
    mean : Tensor of shape (N,)
        Mean coefficient of each expert. The means sum to one if the gate's coefficients do.
    dead : int
        Number of experts whose coefficient is zero for all inputs.
    entropy : float
        Entropy of the mean coefficients divided by log(N): 1 if all experts are used equally, 0 if only one
        is used, NaN if none is used.
    largest_share : float
        The largest mean coefficient.
    active : float
        Mean fraction of experts with nonzero coefficients.
    """

    rows: int
    load: Tensor
    mean: Tensor
    dead: int
    entropy: float
    largest_share: float
    active: float


class Usage:
    """Counts the usage of the experts of one level, batch by batch, in constant memory.

    Parameters
    ----------
    experts : int
        Number of experts N of the level.
    threshold : float, default 0.5
        An input counts towards the load of an expert if its coefficient is at least this threshold.

    Examples
    --------
    >>> usage = Usage(3)
    >>> usage.update(torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]))
    >>> result = usage.statistics()
    >>> result.load.tolist(), result.dead, round(result.active, 2)
    ([1.0, 0.0, 0.0], 1, 0.5)
    """

    def __init__(self, experts: int, threshold: float = 0.5):
        self.threshold, self.rows = threshold, 0
        # In float64, because sums over millions of inputs would lose counts in float32.
        self.sums, self.loads, self.uses = torch.zeros(3, experts, dtype=torch.float64)

    def update(self, coefficients: Tensor) -> None:
        """Count the coefficients of additional inputs.

        Parameters
        ----------
        coefficients : Tensor of shape (..., N)

        Raises
        ------
        ValueError
            If the size of the last axis is not N.
        """
        if coefficients.ndim == 0 or coefficients.shape[-1] != len(self.sums):
            raise ValueError(
                f"coefficients must have {len(self.sums)} experts in the last axis, got shape "
                f"{tuple(coefficients.shape)}."
            )
        rows = coefficients.detach().reshape(-1, len(self.sums))
        self.rows += len(rows)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        size = max(1, CHUNK // len(self.sums))
        # Sums are products with ones, and masks are floats in reused memory: sums of bool tensors, or in
        # float64, are many times slower.
        all_ones = rows.new_ones(min(size, len(rows)), dtype=dtype)
        buffer = torch.empty_like(rows[:size], dtype=dtype)
        for part in rows.split(size):
            ones, marks = all_ones[: len(part)], buffer[: len(part)]
            self._add(self.sums, ones @ part.to(dtype))
            self._add(self.loads, ones @ torch.ge(part, self.threshold, out=marks))
            self._add(self.uses, ones @ torch.ne(part, 0, out=marks))

    @staticmethod
    def _add(total: Tensor, part: Tensor) -> None:
        total += part.cpu().to(total.dtype)  # in this order, since not every device supports float64

    def statistics(self) -> UsageStatistics:
        """The statistics of all inputs so far.

        Raises
        ------
        ValueError
            If there were no inputs.
        """
        if not self.rows:
            raise ValueError("usage statistics need at least one input, got none.")
        mean = self.sums / self.rows
        share = mean / mean.sum()
        count = len(share)
        entropy = float(torch.special.entr(share).sum()) / log(count) if count > 1 else 1.0
        return UsageStatistics(
            rows=self.rows,
            load=self.loads / self.rows,
            mean=mean,
            dead=int((self.uses == 0).sum()),
            entropy=entropy,
            largest_share=float(mean.max()),
            active=float((self.uses / self.rows).mean()),
        )
