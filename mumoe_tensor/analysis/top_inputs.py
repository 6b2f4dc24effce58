"""The inputs that an expert is most active for."""

from __future__ import annotations

import torch
from torch import Tensor

from mumoe_tensor.analysis.labels import read_labels


class TopInputs:
    """Finds the inputs with the largest coefficients of every expert of one level, batch by batch.

    The memory it takes does not grow with the inputs. Of equal coefficients the first one seen counts.

    Parameters
    ----------
    experts : int
        Number of experts N of the level.
    k : int
        How many inputs to find for each.

    Attributes
    ----------
    indices : Tensor of int of shape (N, k)
        Numbers of the inputs, that of the largest coefficient first; −1 where an expert has a coefficient
        above zero for fewer than `k`.
    coefficients : Tensor of shape (N, k)
        Theirs, in float32, or in float64 once some in float64 were seen; zero where there is none.
    rows : int
        Inputs that were seen.

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
        # (Not in float64 from the start: not every device has it.)
        self.coefficients = torch.zeros(experts, k, dtype=torch.float32)

    def update(self, coefficients: Tensor, indices: Tensor | None = None) -> None:
        """Look at further inputs.

        Parameters
        ----------
        coefficients : Tensor of shape (..., N)
        indices : Tensor of int of shape (...), optional
            Numbers of these inputs, at least 0; from the number of those seen so far on, by default.

        Raises
        ------
        ValueError
            If the shapes do not fit, or an index is negative.
        TypeError
            If indices are no integers.
        """
        experts, k = self.indices.shape
        leading = coefficients.shape[:-1]
        if coefficients.shape != (*leading, experts) or (indices is not None and indices.shape != leading):
            raise ValueError(
                f"coefficients must have {experts} experts in the last axis, and there must be an index for "
                f"every input; got coefficients of {tuple(coefficients.shape)}, indices of "
                f"{None if indices is None else tuple(indices.shape)}."
            )
        new = coefficients.detach().reshape(-1, experts)
        if indices is None:
            numbers = torch.arange(len(new)) + self.rows
        else:
            numbers = read_labels(indices, what="indices").reshape(-1).cpu()
        self.rows += len(new)
        # Few inputs are better than the k best so far: the more are seen, the fewer.
        row, expert = (new > self.coefficients[:, -1].to(new.device)).nonzero().unbind(1)
        value = torch.cat([self.coefficients.flatten(), new[row, expert].cpu()])
        index = torch.cat([self.indices.flatten(), numbers[row.cpu()]])
        owner = torch.cat([torch.arange(experts).repeat_interleave(k), expert.cpu()])
        # By expert, then by coefficient; stable, so that of equal ones the first stays first.
        order = value.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]
        count = owner.bincount(minlength=experts)
        best = order[(count.cumsum(0) - count)[:, None] + torch.arange(k)]
        self.coefficients, self.indices = value[best], index[best]
