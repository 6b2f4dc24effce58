"""The gate and the experts of one layer, for functions that take a layer."""

from __future__ import annotations

from torch import nn

from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.watch import gates_of
from mumoe_tensor.selections import Selection, read_number, read_selection


def gate_of(layer: nn.Module) -> ExpertGate:
    """The gate of one layer: the layer may be a gate itself, or have one and no more.

    Raises
    ------
    ValueError
        If it has none or several.
    """
    gates = gates_of(layer)
    if len(gates) > 1:
        raise ValueError(f"a layer has one gate; {type(layer).__name__} has several: {sorted(gates)}.")
    (gate,) = gates.values()
    return gate


def read_experts(gate: ExpertGate, level: int, experts: Selection) -> tuple[int, list[int]]:
    """A level and some of its experts; for errors see `read_number` and `read_selection`."""
    level = read_number(level, len(gate.num_experts), "level")
    return level, read_selection(experts, gate.num_experts[level], f"experts of level {level}")


def experts_of(layer: nn.Module) -> Experts:
    """The experts of one layer: the layer may be these themselves, or have them and no others.

    Raises
    ------
    ValueError
        If it has none, or several as a block has.
    """
    mixtures = {name: module for name, module in layer.named_modules() if isinstance(module, Experts)}
    if len(mixtures) != 1:
        raise ValueError(
            "a layer has one module Experts, and of a block (up, down) it must be said which; "
            f"{type(layer).__name__} has {sorted(mixtures)}."
        )
    (experts,) = mixtures.values()
    return experts
