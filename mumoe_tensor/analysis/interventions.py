"""Interventions on the coefficients of experts: scaling, ablation, and random coefficients."""

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
    """Remove some experts of a layer within the context by setting their coefficients to zero.

    This is equivalent to setting the slices of these experts in the weight tensor to zero, including biases.
    The remaining coefficients are not renormalised (Oldfield et al., 2024). Compiled models run eagerly
    within the context.

    Parameters
    ----------
    layer : MuMoE, MuMoEMLP or ExpertGate
        The layer, or another module with exactly one gate.
    experts : int, sequence of int, or mask of shape (N,)
        The experts to remove, possibly none.
    level : int, default 0
        The level of the experts, counted from 0.

    Raises
    ------
    ValueError
        If there is no such level or expert, an expert occurs twice, or there is not exactly one gate.
    TypeError
        If the level or an expert is not an integer.
    """
    return scale(layer, experts, 0.0, level)


def keep_only(layer: nn.Module, experts: Selection, level: int = 0) -> AbstractContextManager[None]:
    """Remove all but some experts of a level within the context; see `ablate`.

    Parameters
    ----------
    layer : MuMoE, MuMoEMLP or ExpertGate
        The layer, or another module with exactly one gate.
    experts : int, sequence of int, or mask of shape (N,)
        The experts to keep, possibly none. Their coefficients are not renormalised.
    level : int, default 0
        The level of the experts, counted from 0.

    Raises
    ------
    ValueError
        If there is no such level or expert, an expert occurs twice, or there is not exactly one gate.
    TypeError
        If the level or an expert is not an integer.
    """
    gate = gate_of(layer)
    level, kept = read_experts(gate, level, experts)
    return ablate(gate, sorted(set(range(gate.num_experts[level])) - set(kept)), level)


@contextmanager
def scale(layer: nn.Module, experts: Selection, factor: float, level: int = 0) -> Iterator[None]:
    """Multiply the coefficients of some experts by a factor within the context.

    This is equivalent to scaling the slices of these experts in the weight tensor, including biases. The
    coefficients are not renormalised. Compiled models run eagerly within the context.

    Parameters
    ----------
    layer : MuMoE, MuMoEMLP or ExpertGate
        The layer, or another module with exactly one gate.
    experts : int, sequence of int, or mask of shape (N,)
        The experts to scale, possibly none.
    factor : float
        A finite number.
    level : int, default 0
        The level of the experts, counted from 0.

    Raises
    ------
    ValueError
        If there is no such level or expert, an expert occurs twice, the factor is not finite, or there is not
        exactly one gate.
    TypeError
        If the level or an expert is not an integer, or the factor is not a number.
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
    """Assign the coefficients of every input to randomly permuted experts within the context.

    Each input has its own random permutation, so the coefficients are as sparse as before but independent of
    the input. This is a baseline for results with the actual gate. The k-th call of a gate uses the same
    permutations in every context with the same seed, so do not use it with activation checkpointing, which
    calls gates twice. Compiled models run eagerly within the context.

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
