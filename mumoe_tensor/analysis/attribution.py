"""Attribution of outputs to experts."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.parts import experts_of
from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.watch import evaluating
from mumoe_tensor.selections import read_number


def attribute(
    model: nn.Module, layer: nn.Module, inputs: Any, output: int | Tensor, *, level: int = 0
) -> Tensor:
    r"""Contribution of each expert to an output of its layer.

    An output is a sum over the experts of a level, so the contributions are exact:

    .. math:: y^\top d = \sum_n c_n, \qquad c_n = a_n \, (W_n^\top z)^\top d,

    where :math:`W_n` includes the bias. With several levels, :math:`W_n` is the mixture of the experts of the
    other levels. `ablate` reduces the output by :math:`c_n`. The weight tensor is never formed, so
    memory use is dominated by the coefficients and contributions.

    Parameters
    ----------
    model : Module
        The model, which is run in evaluation mode and must call the layer once. It may be the layer itself.
    layer : MuMoE or Experts
        The layer of the model. For a block, use ``block.down`` for its outputs, or ``block.up`` for its
        hidden features before the activation.
    inputs : Tensor
        A batch of inputs of the model.
    output : int or Tensor of shape (out_features,)
        The index of an output of the layer, or a direction d of its outputs.
    level : int, default 0
        The level of the experts, counted from 0.

    Returns
    -------
    Tensor of shape (..., N)
        The contributions, with the leading shape of the layer's inputs.

    Raises
    ------
    ValueError
        If there is no such layer, level or output, or the layer is not called exactly once.
    TypeError
        If the level is not an integer, or the output is neither an integer nor a tensor.

    Examples
    --------
    >>> import torch
    >>> from mumoe_tensor.nn import MuMoE
    >>> layer, x = MuMoE(4, 3, experts=8, rank=2, gate_norm="layer"), torch.randn(5, 4)
    >>> contributions = attribute(layer, layer, x, output=2)
    >>> contributions.shape, torch.allclose(contributions.sum(-1), layer(x)[:, 2], atol=1e-5)
    (torch.Size([5, 8]), True)
    """
    experts = experts_of(layer)
    level = read_number(level, len(experts.num_experts), "level")
    direction = _direction(output, experts.out_features)
    arguments = _arguments_of(experts, model, inputs)
    coefficients = [a.detach() for a in arguments["coefficients"]]
    # The output is linear in the coefficients of a level, so their gradient contains the outputs of the
    # experts.
    coefficients[level].requires_grad_()
    with torch.enable_grad():
        y = experts(**{**arguments, "coefficients": coefficients})
        total = (y @ direction.to(y)).sum()
    (each,) = torch.autograd.grad(total, coefficients[level])
    return each * coefficients[level].detach()


def _direction(output: int | Tensor, count: int) -> Tensor:
    if isinstance(output, Tensor) and output.ndim:
        if output.shape != (count,):
            raise ValueError(f"a direction must have shape {(count,)}, got {tuple(output.shape)}.")
        if output.is_complex() or not output.isfinite().all():
            raise ValueError(f"a direction must be real and finite, got {output}.")
        return output
    return nn.functional.one_hot(torch.tensor(read_number(output, count, "output")), count)


def _arguments_of(experts: Experts, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The arguments that a model passes to experts, by name."""
    seen: list[dict[str, Any]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(signature(experts.forward).bind(*args, **kwargs).arguments)

    handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), evaluating(model), torch.compiler.set_stance("force_eager"):
            model(inputs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"the model must call the layer once, got {len(seen)} calls.")
    return seen[0]
