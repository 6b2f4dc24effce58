"""Linear layers, and layers of experts initialised from them.

A linear layer is a `torch.nn.Linear`, or a Conv1D of transformers, which has the transposed matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mumoe_tensor.nn.fitting import fit_every_expert
from mumoe_tensor.nn.reading import check_readable, check_same

L = TypeVar("L")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an instance of `torch.nn.Linear` or transformers' Conv1D."""
    return _kind(module) is not None


def check_linear(module: nn.Module) -> None:
    """Raise an error unless a module is a linear layer and computes nothing else."""
    kind = _kind(module)
    if kind is None:
        raise TypeError(f"a linear layer must be a torch.nn.Linear or a Conv1D, got {type(module).__name__}.")
    check_readable(module)
    if type(module).forward is not kind.forward:
        raise ValueError(f"the class {type(module).__name__} overrides the forward method.")
    layer: Any = module
    names = sorted(name for name, _ in (*module.named_parameters(), *module.named_buffers()))
    if names != (["weight"] if layer.bias is None else ["bias", "weight"]) or layer.weight.ndim != 2:
        raise ValueError(
            "a linear layer must have a matrix as its weight, optionally a bias, and no other parameters or "
            f"buffers; got a weight of shape {tuple(layer.weight.shape)} among {names}."
        )
    matrix, bias = matrix_of(module)
    check_same(module, _rebuild, matrix.shape[0] - bias)


def matrix_of(module: nn.Module) -> tuple[Tensor, bool]:
    """The matrix of a linear layer, of shape (in, out), and whether the layer has a bias.

    The bias, if any, is an additional row of the matrix.
    """
    layer: Any = module
    matrix = (layer.weight.T if isinstance(module, nn.Linear) else layer.weight).detach()
    if layer.bias is None:
        return matrix, False
    return torch.cat([matrix, layer.bias.detach()[None]]), True


def halves_of(linear: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Split a linear layer into two, for the halves of its outputs; their parameters are views."""
    matrix, bias = matrix_of(linear)
    half = matrix.shape[1] // 2
    first, second = (nn.Linear(matrix.shape[0] - bias, half, bias, device="meta") for _ in range(2))
    is_trained = all(parameter.requires_grad for parameter in linear.parameters())
    for part, columns in ((first, matrix[:, :half]), (second, matrix[:, half:])):
        values = {"weight": columns[: part.in_features].T, "bias": columns[-1]}
        for name, _ in [*part.named_parameters()]:
            setattr(part, name, nn.Parameter(values[name], is_trained))
    return first, second


def layer_like(
    kind: Callable[..., L], linears: list[nn.Module], experts: int | Sequence[int], **options: Any
) -> L:
    """Make a layer whose experts equal the given linear layers, with a random gate.

    A block takes two linear layers, or three if it is gated: two to the hidden size, then the last.
    """
    matrices, biases = zip(*map(matrix_of, linears), strict=True)
    first, bias = matrices[0], biases[0]
    sizes = [first.shape[0] - bias, *(matrix.shape[1] for matrix in matrices[-2:])]
    shapes = [tuple(matrix.shape) for matrix in matrices]
    to_hidden, last = [(sizes[0] + bias, sizes[1])] * (len(shapes) - 1), (sizes[-2] + bias, sizes[-1])
    if len(set(biases)) > 1 or shapes != [*to_hidden, last]:
        raise ValueError(
            "either all or no linear layers of a block must have a bias, and the last must have as many "
            f"inputs as the others have outputs; got matrices of {shapes}, including bias rows."
        )
    trained = {parameter.requires_grad for linear in linears for parameter in linear.parameters()}
    if len(trained) > 1:
        raise ValueError(
            "either all or none of the parameters of the linear layers must be frozen, since experts store "
            "weight and bias together; set requires_grad_ first."
        )
    if len({matrix.dtype for matrix in matrices}) > 1:
        raise ValueError(
            f"the linear layers must have the same dtype, got {[str(matrix.dtype) for matrix in matrices]}."
        )
    layer: Any = kind(*sizes, experts, bias=bias, **{"device": first.device, "dtype": first.dtype, **options})
    is_meta = layer.gate.weight.is_meta
    if first.is_meta and not is_meta:
        raise ValueError("a linear layer must have values, got one on the meta device.")
    if not is_meta:
        # With equal experts, the outputs do not depend on the coefficients, so the gate need not be zero.
        nn.init.normal_(layer.gate.weight, std=layer.gate.in_features**-0.5)
        pairs = zip(layer.mixtures, matrices, strict=True)
        layer.fit_errors = tuple(fit_every_expert(experts.weight, matrix) for experts, matrix in pairs)
    for part in (layer.gate, layer.input_norm, *layer.mixtures):
        if part is not None:
            part.requires_grad_(trained == {True})
    return layer


def _rebuild(module: nn.Module) -> Callable[[Tensor], Tensor]:
    matrix, bias = matrix_of(module)
    return lambda x: x @ matrix[:-1] + matrix[-1] if bias else x @ matrix


def _kind(module: nn.Module) -> Any:
    """The class of linear layers to which a module belongs, or None."""
    # If there is a Conv1D, transformers has been imported.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return next((kind for kind in (nn.Linear, conv1d) if kind and isinstance(module, kind)), None)
