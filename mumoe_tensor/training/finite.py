"""Locate the first NaN or infinity in a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_layer_not_finite(model: nn.Module, x: Tensor) -> str:
    """A phrase for where a forward pass first has NaN or infinity: a parameter, the inputs or a layer.

    Parameters
    ----------
    model : Module
    x : Tensor
        The inputs.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"the parameter {name} is not finite"
    if not _is_finite(x):
        return "the inputs are not finite"
    names: list[str] = []
    hooks = [
        module.register_forward_hook(_noted(name, names))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return f"it first occurred in the layer {names[0]}" if names else "it first occurred in the loss"


def not_finite(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of the parameters whose gradient is not finite."""
    return [name for name, p in named if p.grad is not None and not _is_finite(p.grad)]


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _noted(name: str, names: list[str]) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if any(isinstance(y, Tensor) and not _is_finite(y) for y in outputs):
            names.append(name)

    return hook
