"""Multilinear mixtures of experts: layers whose experts are one factorized weight tensor."""

from mumoe_tensor.contraction.machine import Machine
from mumoe_tensor.contraction.plan import ContractionPlan, SumPlan, plan
from mumoe_tensor.cost import Cost, cost
from mumoe_tensor.decomposition import decompose
from mumoe_tensor.dense import expert_matrix, to_dense
from mumoe_tensor.formats import Factor, Format, formats, get_format, register, shared, sliced, sum_of
from mumoe_tensor.gates import (
    entmax15,
    jumprelu,
    relu_top_k,
    sigmoid_top_k,
    softmax,
    sparsemax,
    top_k,
    uniform_top_k,
)
from mumoe_tensor.multilinear import bind, multilinear_moe
from mumoe_tensor.spec import LayerSpec, dense_parameters, fit_rank
from mumoe_tensor.tensors import FactorizedTensor

__version__ = "0.1.0"

__all__ = [
    "ContractionPlan",
    "Cost",
    "Factor",
    "FactorizedTensor",
    "Format",
    "LayerSpec",
    "Machine",
    "SumPlan",
    "bind",
    "cost",
    "decompose",
    "dense_parameters",
    "entmax15",
    "expert_matrix",
    "fit_rank",
    "formats",
    "get_format",
    "jumprelu",
    "multilinear_moe",
    "plan",
    "register",
    "relu_top_k",
    "shared",
    "sigmoid_top_k",
    "sliced",
    "softmax",
    "sparsemax",
    "sum_of",
    "to_dense",
    "top_k",
    "uniform_top_k",
]
