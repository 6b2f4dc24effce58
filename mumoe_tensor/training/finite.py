"""Locate the first NaN or infinity in a model."""

from __future__ import annotations

from functools import partial
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
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite"
    if not x.isfinite().all():
        return "the inputs are not finite"
    names: list[str] = []
    hooks = [
        module.register_forward_hook(partial(_note, names, name))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return f"it first occurred in the layer {names[0]}" if names else "it first occurred in the loss"


def _note(names: list[str], name: str, module: nn.Module, arguments: Any, output: Any) -> None:
    """A forward hook that appends the name of a layer whose output is not finite."""
    outputs = output if isinstance(output, tuple) else (output,)
    if any(isinstance(y, Tensor) and not y.isfinite().all() for y in outputs):
        names.append(name)
