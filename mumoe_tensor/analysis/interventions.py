"""A model whose experts get other coefficients than its gate gives: some scaled, or all drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.parts import gate_of, read_experts
from mumoe_tensor.checks import as_finite
from mumoe_tensor.nn.watch import gates_of, hooked
from mumoe_tensor.selections import Selection


def ablate(layer: nn.Module, experts: Selection, level: int = 0) -> AbstractContextManager[None]:
    """While the context lasts, a layer is without some experts: their coefficients are zero.

    The layer equals one whose weight tensor is zero in the slices of these experts, biases included. What is
    left is not normalised again (Oldfield et al., 2024). A compiled model runs eagerly in it.

    Parameters
    ----------
    layer : MuMoE, MuMoEMLP or ExpertGate
        Or a module that has one gate.
    experts : int, sequence of int, or mask of shape (N,)
        A mask selects the experts where it is true. There may be none.
    level : int, default 0
        The level they belong to, 0 for the first.

    Raises
    ------
    ValueError
        If there is no such level or expert, one occurs twice, or there is not one gate.
    TypeError
        If the level or an expert is no integer.
    """
    return scale(layer, experts, 0.0, level)


def keep_only(layer: nn.Module, experts: Selection, level: int = 0) -> AbstractContextManager[None]:
    """While the context lasts, a layer is without all experts of a level but some; see `ablate`.

    Parameters
    ----------
    layer : MuMoE, MuMoEMLP or ExpertGate
        Or a module that has one gate.
    experts : int, sequence of int, or mask of shape (N,)
        Those to keep; without any, all are removed. What is left is not normalised again.
    level : int, default 0
        The level they belong to, 0 for the first.

    Raises
    ------
    ValueError
        If there is no such level or expert, one occurs twice, or there is not one gate.
    TypeError
        If the level or an expert is no integer.
    """
    gate = gate_of(layer)
    level, kept = read_experts(gate, level, experts)
    return ablate(gate, sorted(set(range(gate.num_experts[level])) - set(kept)), level)


@contextmanager
def scale(layer: nn.Module, experts: Selection, factor: float, level: int = 0) -> Iterator[None]:
    """While the context lasts, the coefficients of some experts are a factor times what they are.

    The layer equals one whose weight tensor has this factor in the slices of these experts, biases included.
    Nothing is normalised again. A compiled model runs eagerly in it.

    Parameters
    ----------
    layer : MuMoE, MuMoEMLP or ExpertGate
        Or a module that has one gate.
    experts : int, sequence of int, or mask of shape (N,)
        A mask selects the experts where it is true. There may be none.
    factor : float
        Finite.
    level : int, default 0
        The level they belong to, 0 for the first.

    Raises
    ------
    ValueError
        If there is no such level or expert, one occurs twice, the factor is not finite, or there is not one
        gate.
    TypeError
        If the level or an expert is no integer, or the factor no number.
    """
    gate = gate_of(layer)
    level, changed = read_experts(gate, level, experts)
    factor = as_finite(factor, "factor")

    def hook(module: nn.Module, inputs: Any, coefficients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a = coefficients[level]
        factors = a.new_ones(a.shape[-1])
        factors[changed] = factor
        return *coefficients[:level], a * factors, *coefficients[level + 1 :]

    with hooked(gate, hook):
        yield


@contextmanager
def random_gate(model: nn.Module, seed: int) -> Iterator[None]:
    """While the context lasts, gates give the coefficients they found to experts drawn at random.

    Every input draws anew which expert gets which of its coefficients, so they are as sparse as before, and
    say nothing of the input. The baseline of what is found with the real gate. The k-th call of a gate draws
    the same in every such context with that seed; so do not use it with activation checkpointing, which
    calls gates twice. A compiled model runs eagerly in it.

    Parameters
    ----------
    model : Module
    seed : int

    Raises
    ------
    ValueError
        If the model has no gate.
    """

    def hook_of(place: int) -> Any:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * place)

        def hook(module: nn.Module, inputs: Any, coefficients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                a.gather(-1, torch.rand(a.shape, generator=generator).argsort(-1).to(a.device))
                for a in coefficients
            )

        return hook

    with ExitStack() as stack:
        for place, gate in enumerate(gates_of(model).values()):
            stack.enter_context(hooked(gate, hook_of(place)))
        yield
