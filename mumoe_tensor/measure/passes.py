"""Forward passes and training steps of a module, as functions to be measured."""

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
    """zero_grad, forward and backward, as in the middle of a network: the input also gets a gradient.

    Parameters
    ----------
    module : torch.nn.Module
    x : Tensor
        Input that requires a gradient.
    gradient : Tensor, optional
        Gradient of the output; by default normally distributed.
    """
    if gradient is None:
        with torch.no_grad():
            gradient = torch.randn_like(module(x))

    def run() -> None:
        module.zero_grad()
        x.grad = None
        module(x).backward(gradient)

    return run
