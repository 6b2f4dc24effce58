"""Context managers for evaluation mode and for access to module calls and gate coefficients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mumoe_tensor.nn.described import check_model
from mumoe_tensor.nn.gate import ExpertGate

K = TypeVar("K")


def gates_of(model: nn.Module) -> dict[str, ExpertGate]:
    """The gates of a model by name, at least one."""
    gates = {name: module for name, module in model.named_modules() if isinstance(module, ExpertGate)}
    if not gates:
        raise ValueError(
            f"a model must have an ExpertGate, as every μMoE layer has; {type(model).__name__} has none."
        )
    return gates


def module_of(model: nn.Module, name: str) -> nn.Module:
    """A module of a model by name, or an error that lists similar names."""
    check_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules or modules[name] is model:
        last = str(name).rpartition(".")[2]
        near = [each for each in modules if each.rpartition(".")[2] == last] or [*modules][1:]
        raise ValueError(f"name must be the name of a module in the model, such as {near[:3]}; got {name!r}.")
    return modules[name]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the context, and restore the mode of every module on exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


@contextmanager
def hooked(gate: ExpertGate, hook: Callable[..., Any]) -> Iterator[None]:
    """Add a hook to a gate within the context. Compiled models run eagerly, since they would ignore it."""
    handle = gate.register_forward_hook(hook)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


@contextmanager
def watch_calls(
    modules: Mapping[K, nn.Module],
    before: Callable[[K, dict[str, Any]], object] | None = None,
    after: Callable[[K, Any], object] | None = None,
) -> Iterator[None]:
    """Pass the arguments and results of module calls to functions within the context.

    All hooks are removed on exit, even after an error. Compiled models run eagerly within the context.

    Parameters
    ----------
    modules : mapping of Module
        The modules, under arbitrary keys that are passed to the functions.
    before : callable, optional
        Called as ``before(key, arguments)`` before each call, with all arguments by their names in the
        signature of ``forward``, in this order.
    after : callable, optional
        Called as ``after(key, result)`` after each call.
    """
    with ExitStack() as stack:
        for key, module in modules.items():
            if before is not None:
                hook: Any = partial(_arguments, before, key)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(partial(_result, after, key)).remove)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _arguments(consumer: Any, key: Any, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    consumer(key, inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _result(consumer: Any, key: Any, module: nn.Module, args: Any, result: Any) -> None:
    consumer(key, result)


@contextmanager
def watch_coefficients(
    model: nn.Module, consumer: Callable[[str, tuple[Tensor, ...]], object]
) -> Iterator[None]:
    """Pass the coefficients of every gate of a model to a function within the context.

    The coefficients are detached and not stored. All hooks are removed on exit, even after an error. Compiled
    models run eagerly within the context.

    Parameters
    ----------
    consumer : callable
        Called as ``consumer(name, coefficients)`` with the name of the gate and one tensor per level, of
        shape (rows, experts).

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

    def hand_over(name: str, coefficients: tuple[Tensor, ...]) -> None:
        consumer(name, tuple(a.detach().reshape(-1, a.shape[-1]) for a in coefficients))

    with watch_calls(gates_of(model), after=hand_over):
        yield
