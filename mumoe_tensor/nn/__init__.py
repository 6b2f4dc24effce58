"""Torch layers: `MuMoE` in place of a linear layer, `MuMoEMLP` in place of an MLP block."""

from mumoe_tensor.nn.adapters import (
    Adapter,
    add_experts,
    load_adapter,
    merge_experts,
    remove_experts,
    save_adapter,
)
from mumoe_tensor.nn.described import prepare_to_save, register_layer
from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.functional import entmax15
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.layers import MuMoE, MuMoEMLP
from mumoe_tensor.nn.parallel import gather, parallelize
from mumoe_tensor.nn.rates import parameter_groups
from mumoe_tensor.nn.registry import register_activation, register_gate
from mumoe_tensor.nn.routed import ChosenExperts, RoutedExperts
from mumoe_tensor.nn.saving import load, save
from mumoe_tensor.nn.stacks import replace_experts
from mumoe_tensor.nn.surgery import Replacement, replace_linear, replace_mlp

__all__ = [
    "Adapter",
    "ChosenExperts",
    "ExpertGate",
    "Experts",
    "MuMoE",
    "MuMoEMLP",
    "Replacement",
    "RoutedExperts",
    "add_experts",
    "entmax15",
    "gather",
    "load",
    "load_adapter",
    "merge_experts",
    "parallelize",
    "parameter_groups",
    "prepare_to_save",
    "register_activation",
    "register_gate",
    "register_layer",
    "remove_experts",
    "replace_experts",
    "replace_linear",
    "replace_mlp",
    "save",
    "save_adapter",
]
