"""Multilinear mixtures of experts: layers whose experts are one factorized weight tensor."""

from mumoe_tensor.contraction.plan import ContractionPlan, plan
from mumoe_tensor.formats import Factor, Format, formats, get_format, register
from mumoe_tensor.multilinear import bind, expert_matrix, multilinear_moe, to_dense
from mumoe_tensor.tensors import FactorizedTensor

__version__ = "0.1.0.dev0"

__all__ = [
    "ContractionPlan",
    "Factor",
    "FactorizedTensor",
    "Format",
    "bind",
    "expert_matrix",
    "formats",
    "get_format",
    "multilinear_moe",
    "plan",
    "register",
    "to_dense",
]
