"""Linear layers of others: `torch.nn.Linear`, and transformers' Conv1D, whose matrix is transposed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.nn.reading import check_readable, check_same


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a `torch.nn.Linear` or a Conv1D of transformers, or derived from one of them."""
    return _kind(module) is not None


def check_linear(module: nn.Module) -> None:
    """Check that a module is a linear layer, and computes nothing else.

    Raises
    ------
    TypeError
        If the module is no linear layer.
    ValueError
        If it is one that does something else or more, with the cause.
    """
    kind = _kind(module)
    if kind is None:
        raise TypeError(f"a linear layer is torch.nn.Linear or a Conv1D, got {type(module).__name__}.")
    check_readable(module)
    if type(module).forward is not kind.forward:
        raise ValueError(f"the class {type(module).__name__} has a forward method of its own.")
    layer: Any = module
    names = sorted(name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    if names != (["weight"] if layer.bias is None else ["bias", "weight"]) or layer.weight.ndim != 2:
        raise ValueError(
            "a linear layer must have a matrix as its weight, perhaps a bias, and no further parameters or "
            f"buffers; got a weight of shape {tuple(layer.weight.shape)} among {names}."
        )
    matrix, bias = matrix_of(module)
    check_same(module, _rebuild, matrix.shape[0] - bias)


def matrix_of(module: nn.Module) -> tuple[Tensor, bool]:
    """Matrix of shape (in, out) of a linear layer, its bias as one more row, and whether it has one."""
    layer: Any = module
    matrix = (layer.weight.T if isinstance(module, nn.Linear) else layer.weight).detach()
    if layer.bias is None:
        return matrix, False
    return torch.cat([matrix, layer.bias.detach()[None]]), True


def _rebuild(module: nn.Module) -> Callable[[Tensor], Tensor]:
    matrix, bias = matrix_of(module)
    return lambda x: x @ matrix[:-1] + matrix[-1] if bias else x @ matrix


def _kind(module: nn.Module) -> Any:
    """The class that a linear layer is of or derived from."""
    # A Conv1D comes from transformers, which is imported then.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return next((kind for kind in (nn.Linear, conv1d) if kind and isinstance(module, kind)), None)
