"""Truncation of the singular values of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite

import torch
from torch import nn

from mumoe_tensor.nn.linear import is_linear


@contextmanager
def truncate(layers: Iterable[nn.Module], share: float) -> Iterator[None]:
    r"""Replace the weights of linear layers by their best low-rank approximations within the context.

    .. math:: W \approx \sum_{i \le k} \sigma_i u_i v_i^\top, \qquad k = \mathrm{round}(s \cdot \min(I, O))

    with the k largest singular values, a share s of all (Eckart and Young, 1936). Biases are kept. If trained
    models keep their accuracy, this supports low-rank experts (Oldfield et al., 2024). On exit, the original
    weights are restored exactly.

    Parameters
    ----------
    layers : iterable of Module
        `torch.nn.Linear`, or Conv1D of transformers; at least one.
    share : float
        Fraction of the singular values of each layer to keep: 0 keeps only the biases, 1 changes nothing.

    Raises
    ------
    ValueError
        If there is no layer, or the share is not between 0 and 1.
    TypeError
        If a module is not a linear layer.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(8, 6)
    >>> with truncate([layer], share=0.5):
    ...     print(torch.linalg.matrix_rank(layer.weight).item())
    3
    """
    chosen = list(layers)
    if not chosen:
        raise ValueError("there must be linear layers to truncate, got none.")
    if not (isfinite(share) and 0 <= share <= 1):
        raise ValueError(f"the fraction of singular values to keep must be from 0 to 1, got {share}.")
    if wrong := sorted({type(layer).__name__ for layer in chosen if not is_linear(layer)}):
        raise TypeError(f"only linear layers can be truncated, got {', '.join(wrong)}.")
    weights: list[nn.Parameter] = [layer.weight for layer in chosen]  # type: ignore[misc]
    originals = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                kept = round(share * min(weight.shape))
                if kept < min(weight.shape):
                    weight.copy_(_largest(weight, kept))
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


def _largest(matrix: torch.Tensor, kept: int) -> torch.Tensor:
    """The part of a matrix with its largest singular values, in float32 or wider."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return (u[:, :kept] * s[:kept]) @ v[:kept]
