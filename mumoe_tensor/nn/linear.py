"""Linear layers of others: `torch.nn.Linear`, and transformers' Conv1D, whose matrix is transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose matrix can be read."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_of(module: nn.Module) -> tuple[Tensor, bool]:
    """Matrix of shape (in, out) of a linear layer, its bias as one more row, and whether it has one.

    Raises
    ------
    TypeError
        If the module is no linear layer.
    """
    if not is_linear(module):
        raise TypeError(f"a linear layer is torch.nn.Linear or a Conv1D, got {type(module).__name__}.")
    layer: Any = module
    matrix = (layer.weight.T if isinstance(module, nn.Linear) else layer.weight).detach()
    if layer.bias is None:
        return matrix, False
    return torch.cat([matrix, layer.bias.detach()[None]]), True
