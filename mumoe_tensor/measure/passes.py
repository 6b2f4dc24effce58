"""A forward pass and a training step of a module, as calls to measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def forward(module: Any, x: Tensor) -> Callable[[], object]:
    """A forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def step(module: Any, x: Tensor, gradient: Tensor | None = None) -> Callable[[], None]:
    """zero_grad, forward, backward, as in the middle of a network: the input has a gradient too.

    Parameters
    ----------
    module : torch.nn.Module
    x : Tensor
        Requires a gradient.
    gradient : Tensor, optional
        Of the output; by default normal.
    """
    if gradient is None:
        with torch.no_grad():
            gradient = torch.randn_like(module(x))

    def run() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(gradient)

    return run
