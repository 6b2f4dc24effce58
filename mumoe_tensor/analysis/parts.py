"""Access to the gate and the experts of a layer."""

from __future__ import annotations

from torch import nn

from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.watch import gates_of
from mumoe_tensor.selections import Selection, read_number, read_selection


def gate_of(layer: nn.Module) -> ExpertGate:
    """The gate of a layer. The layer may be a gate itself, or a module with exactly one gate.

    Raises
    ------
    ValueError
        If it has no gate, or several.
    """
    gates = gates_of(layer)
    if len(gates) > 1:
        raise ValueError(f"a layer must have one gate; {type(layer).__name__} has {sorted(gates)}.")
    (gate,) = gates.values()
    return gate


def read_experts(gate: ExpertGate, level: int, experts: Selection) -> tuple[int, list[int]]:
    """Check a level and some of its experts; see `read_number` and `read_selection` for the errors."""
    level = read_number(level, len(gate.num_experts), "level")
    return level, read_selection(experts, gate.num_experts[level], f"experts of level {level}")


def experts_of(layer: nn.Module) -> Experts:
    """The experts of a layer. The layer may be an `Experts` itself, or a module with exactly one.

    Raises
    ------
    ValueError
        If the layer has no `Experts`, or several, as a block has.
    """
    mixtures = {name: module for name, module in layer.named_modules() if isinstance(module, Experts)}
    if len(mixtures) != 1:
        raise ValueError(
            "a layer must have one module Experts (for a block, pass its up or down); "
            f"{type(layer).__name__} has {sorted(mixtures)}."
        )
    (experts,) = mixtures.values()
    return experts
