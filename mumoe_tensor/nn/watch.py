"""A model in evaluation for a while, and the coefficients of its gates during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.nn.gate import ExpertGate


def gates_of(model: nn.Module) -> dict[str, ExpertGate]:
    """The gates of a model, at least one, by the names of their modules."""
    gates = {name: module for name, module in model.named_modules() if isinstance(module, ExpertGate)}
    if not gates:
        raise ValueError(
            f"a model must have an ExpertGate, as every μMoE layer has; {type(model).__name__} has none."
        )
    return gates


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the context lasts, a model runs as in ``eval()``; then every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


@contextmanager
def hooked(gate: ExpertGate, hook: Callable[..., Any]) -> Iterator[None]:
    """While the context lasts, a gate has a hook. Compiled models run eagerly, or would not see it."""
    handle = gate.register_forward_hook(hook)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


@contextmanager
def watch_coefficients(
    model: nn.Module, consumer: Callable[[str, tuple[Tensor, ...]], object]
) -> Iterator[None]:
    """While the context lasts, hand the coefficients of every gate of a model to a function.

    The coefficients carry no gradient, and nothing keeps them but the function. Leaving the context, also by
    an error, removes every hook. A compiled model runs eagerly in it.

    Parameters
    ----------
    consumer : callable
        Called as ``consumer(name, coefficients)`` with the name of the gate's module and one tensor a level,
        of shape (rows, experts).

    Raises
    ------
    ValueError
        If the model has no gate.

    Examples
    --------
    >>> import torch
    >>> from mumoe_tensor.nn import MuMoE
    >>> seen = []
    >>> layer = MuMoE(4, 3, experts=8, rank=2, gate_norm="none")
    >>> with watch_coefficients(layer, lambda name, a: seen.append((name, a[0].shape))):
    ...     _ = layer(torch.randn(5, 4))
    >>> seen
    [('gate', torch.Size([5, 8]))]
    """

    def hook(name: str, module: nn.Module, inputs: Any, coefficients: tuple[Tensor, ...]) -> None:
        consumer(name, tuple(a.detach().reshape(-1, a.shape[-1]) for a in coefficients))

    with ExitStack() as stack:
        for name, gate in gates_of(model).items():
            stack.enter_context(hooked(gate, partial(hook, name)))
        yield
