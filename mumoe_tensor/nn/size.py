"""The size of a module."""

from __future__ import annotations

from torch import nn


def num_parameters(module: nn.Module) -> int:
    """Entries of all parameters of a module; buffers, which are not trained, are left out."""
    return sum(parameter.numel() for parameter in module.parameters())
