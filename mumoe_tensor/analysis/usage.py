"""How much each expert is used."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

#: Coefficients that are counted together: few enough for the cache of a processor.
CHUNK = 2**20


@dataclass(frozen=True)
class UsageStatistics:
    """How the experts of one level are used.

    Attributes
    ----------
    rows : int
        Inputs that were seen.
    load : Tensor of shape (N,)
        Share of the inputs that give the expert a coefficient of the threshold at least.
    mean : Tensor of shape (N,)
        Mean coefficient of the expert; these sum to one, unless someone changes coefficients.
    dead : int
        Experts that no input gave a coefficient other than zero.
    entropy : float
        Entropy of the mean coefficients over log(N): 1 if all experts are used alike, 0 if only one is, NaN
        if none is.
    largest_share : float
        The largest mean coefficient.
    active : float
        Mean share of experts with a coefficient other than zero.
    """

    rows: int
    load: Tensor
    mean: Tensor
    dead: int
    entropy: float
    largest_share: float
    active: float


class Usage:
    """Counts the use of the experts of one level, batch by batch, in memory that does not grow.

    Parameters
    ----------
    experts : int
        Number of experts N of the level.
    threshold : float, default 0.5
        An input counts for the load of an expert with a coefficient of this at least.

    Examples
    --------
    >>> usage = Usage(3)
    >>> usage.update(torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]))
    >>> found = usage.statistics()
    >>> found.load.tolist(), found.dead, round(found.active, 2)
    ([1.0, 0.0, 0.0], 1, 0.5)
    """

    def __init__(self, experts: int, threshold: float = 0.5):
        self.threshold, self.rows = threshold, 0
        # Sums over millions of inputs: float32 would stop counting.
        self.sums, self.loads, self.uses = torch.zeros(3, experts, dtype=torch.float64)

    def update(self, coefficients: Tensor) -> None:
        """Count the coefficients of further inputs.

        Parameters
        ----------
        coefficients : Tensor of shape (..., N)

        Raises
        ------
        ValueError
            If the last axis has another size than N.
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
        # Sums as products with ones, and marks as floats in memory that is used again: sums of a bool tensor,
        # or in float64, take many times as long.
        all_ones = rows.new_ones(min(size, len(rows)), dtype=dtype)
        buffer = torch.empty_like(rows[:size], dtype=dtype)
        for part in rows.split(size):
            ones, marks = all_ones[: len(part)], buffer[: len(part)]
            self._add(self.sums, ones @ part.to(dtype))
            self._add(self.loads, ones @ torch.ge(part, self.threshold, out=marks))
            self._add(self.uses, ones @ torch.ne(part, 0, out=marks))

    @staticmethod
    def _add(total: Tensor, part: Tensor) -> None:
        total += part.cpu().to(total.dtype)  # (in this order: not every device has float64)

    def statistics(self) -> UsageStatistics:
        """The figures so far.

        Raises
        ------
        ValueError
            If no input was seen.
        """
        if not self.rows:
            raise ValueError("there must be inputs before usage can be computed, got none.")
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
