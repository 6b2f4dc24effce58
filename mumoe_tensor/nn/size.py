"""The size of a module."""

from __future__ import annotations

from torch import nn


def num_parameters(module: nn.Module) -> int:
    """The number of parameters of a module, without buffers."""
    return sum(parameter.numel() for parameter in module.parameters())
