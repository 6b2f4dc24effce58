"""The inputs for which an expert is most active."""

from __future__ import annotations

import torch
from torch import Tensor

from mumoe_tensor.analysis.labels import read_labels
from mumoe_tensor.analysis.usage import CHUNK


class TopInputs:
    """Tracks the inputs with the largest coefficients of every expert of one level, batch by batch.

    Its memory does not grow with the number of inputs. Among equal coefficients, the first is kept.

    Parameters
    ----------
    experts : int
        Number of experts N of the level.
    k : int
        Number of inputs per expert.

    Attributes
    ----------
    indices : Tensor of int of shape (N, k)
        Indices of the inputs, in descending order of their coefficients; −1 if an expert has fewer than `k`
        positive coefficients.
    coefficients : Tensor of shape (N, k)
        Their coefficients, in float32, or in float64 after a float64 update; zero where an index is −1.
    parts : Tensor of shape (N, k, parts)
        The values from which the coefficients were pooled, if updates contain them; otherwise without parts.
    rows : int
        Number of inputs so far.

    Raises
    ------
    ValueError
        If a number is not positive.

    Examples
    --------
    >>> top = TopInputs(experts=2, k=2)
    >>> top.update(torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]))
    >>> top.indices.tolist(), top.coefficients.tolist()
    ([[1, 2], [0, 2]], [[1.0, 0.5], [0.75, 0.5]])
    """

    def __init__(self, experts: int, k: int):
        if experts < 1 or k < 1:
            raise ValueError(f"experts and k must be positive, got {experts} and {k}.")
        self.rows = 0
        self.indices = torch.full((experts, k), -1)
        # Not in float64 from the start, since not every device supports it.
        self.coefficients = torch.zeros(experts, k, dtype=torch.float32)
        self.parts = torch.zeros(experts, k, 0)

    def update(
        self, coefficients: Tensor, indices: Tensor | None = None, parts: Tensor | None = None
    ) -> None:
        """Add inputs.

        Parameters
        ----------
        coefficients : Tensor of shape (..., N)
        indices : Tensor of int of shape (...), optional
            Indices of these inputs, at least 0. By default, they continue from the number of inputs so far.
        parts : Tensor of shape (..., parts, N), optional
            Values from which the coefficients were pooled, such as the coefficients of the tokens of a text.
            Either all updates or none contain them, with the same number of parts.

        Raises
        ------
        ValueError
            If the shapes do not match, or an index is negative.
        TypeError
            If indices are not integers.
        """
        experts = len(self.indices)
        leading = coefficients.shape[:-1]
        if coefficients.shape != (*leading, experts) or (indices is not None and indices.shape != leading):
            raise ValueError(
                f"coefficients must have {experts} experts in the last axis, and there must be an index for "
                f"every input; got coefficients of {tuple(coefficients.shape)}, indices of "
                f"{None if indices is None else tuple(indices.shape)}."
            )
        count = 0
        if parts is not None:
            count = self.parts.shape[2] or (parts.shape[-2] if parts.ndim > 1 else 0)
            if parts.shape != (*leading, count, experts):
                raise ValueError(
                    f"parts must have the shape {(*leading, count or 'parts', experts)}, got "
                    f"{tuple(parts.shape)}."
                )
        new = coefficients.detach().reshape(-1, experts)
        if indices is None:
            numbers = torch.arange(len(new)) + self.rows
        else:
            numbers = read_labels(indices, what="indices").reshape(-1).cpu()
        of_new = None if parts is None else parts.detach().reshape(len(new), count, experts)
        self.rows += len(new)
        # Few rows at a time, so that they stay in the cache; few rows of later chunks are among the best.
        size = max(1, CHUNK // experts)
        for start in range(0, len(new), size):
            rows = slice(start, start + size)
            self._update(new[rows], numbers[rows], None if of_new is None else of_new[rows])

    def _update(self, new: Tensor, numbers: Tensor, parts: Tensor | None) -> None:
        k = self.indices.shape[1]
        least = self.coefficients[:, -1].to(new.device)
        # NaN is the maximum of its column, and not larger than anything.
        changed = (~(new.amax(0) <= least)).nonzero()[:, 0]
        if not len(changed):
            return
        new = new[:, changed]
        row, column = (new > least[changed]).nonzero().unbind(1)
        value, row, column = new[row, column].cpu(), row.cpu(), column.cpu()
        changed = changed.cpu()
        value = torch.cat([self.coefficients[changed].flatten(), value])
        index = torch.cat([self.indices[changed].flatten(), numbers[row]])
        owner = torch.cat([torch.arange(len(changed)).repeat_interleave(k), column])
        # Sorted by expert, then by coefficient; stable, so that the first of equal coefficients stays first.
        order = value.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]
        count = owner.bincount(minlength=len(changed))
        best = order[(count.cumsum(0) - count)[:, None] + torch.arange(k)]
        if value.dtype != self.coefficients.dtype:
            self.coefficients = self.coefficients.to(value.dtype)
        self.coefficients[changed], self.indices[changed] = value[best], index[best]
        if parts is not None:
            self._keep(parts, changed, best, row, column)

    def _keep(self, parts: Tensor, changed: Tensor, best: Tensor, row: Tensor, column: Tensor) -> None:
        """Reorder the parts of the kept inputs, and add the parts of the new ones."""
        experts, k = self.indices.shape
        if not self.parts.shape[2]:
            self.parts = torch.zeros(experts, k, parts.shape[1])
        before = len(changed) * k
        old = self.parts[changed].flatten(0, 1)
        kept = old[best.clamp(max=before - 1)]
        expert, place = (best >= before).nonzero().unbind(1)
        new = best[expert, place] - before
        row, column = (each[new].to(parts.device) for each in (row, changed[column]))
        kept[expert, place] = parts[row, :, column].float().cpu()
        self.parts[changed] = kept
