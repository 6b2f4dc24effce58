"""Which experts an output comes from."""

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
    r"""What each expert contributes to an output of its layer.

    An output is a sum over the experts of a level, so this is no estimate:

    .. math:: y^\top d = \sum_n c_n, \qquad c_n = a_n \, (W_n^\top z)^\top d,

    with the biases in :math:`W_n`. With several levels, :math:`W_n` is the mixture of the experts of the
    others. :math:`c_n` is what `ablate` takes from the output. W is not formed: with the coefficients these
    contributions take the most memory.

    Parameters
    ----------
    model : Module
        Runs as in ``eval()``, and calls the layer once. It may be the layer itself.
    layer : MuMoE or Experts
        The layer of the model. Of a block, ``block.down`` for its outputs, ``block.up`` for its hidden
        features before the activation.
    inputs : Tensor
        A batch of what the model is called with.
    output : int or Tensor of shape (out_features,)
        The number of an output of the layer, or a direction d of its outputs.
    level : int, default 0
        The level the experts belong to, 0 for the first.

    Returns
    -------
    Tensor of shape (..., N)
        With the leading shape of the inputs of the layer.

    Raises
    ------
    ValueError
        If there is no such layer, level or output, or the layer is not called once.
    TypeError
        If the level is no integer, or the output neither an integer nor a tensor.

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
    # The output is linear in the coefficients of a level: their gradient is what one more of each would add.
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
    """What a model calls experts with, by the names of the arguments."""
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
        raise ValueError(f"the model must call the layer once, it was called {len(seen)} times.")
    return seen[0]
