"""A model without some of its experts, or with a gate that knows nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.coefficients import gate_of, gates_of, hooked, level_of


@contextmanager
def ablate(layer: nn.Module, experts: Sequence[int], level: int = 0) -> Iterator[None]:
    """While the context lasts, a layer is without some experts: their coefficients are zero.

    The layer equals one whose weight tensor is zero in the slices of these experts, biases included. What is
    left is not normalised again (Oldfield et al., 2024). A compiled model runs eagerly in it.

    Parameters
    ----------
    layer : MuMoE, MuMoEMLP or ExpertGate
        Or a module that has one gate.
    experts : sequence of int
    level : int, default 0
        The level they belong to, 0 for the first.

    Raises
    ------
    ValueError
        If there is no such level or expert, or not one gate.
    """
    gate = gate_of(layer)
    count = gate.experts[level_of(gate, level)]
    removed = sorted({int(k) for k in experts})
    if removed and not 0 <= removed[0] <= removed[-1] < count:
        raise ValueError(f"experts must be some of the {count} of level {level}, got {list(experts)}.")

    def hook(module: nn.Module, inputs: Any, coefficients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = list(coefficients)
        index = torch.tensor(removed, device=changed[level].device, dtype=torch.long)
        changed[level] = changed[level].index_fill(-1, index, 0.0)
        return tuple(changed)

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
