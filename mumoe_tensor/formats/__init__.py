"""Formats: the base class (`base`), lookup by name (`registry`), and a short file for each format."""

from mumoe_tensor.formats.base import Factor, Format, by_kind, mode_names
from mumoe_tensor.formats.btt import BTT
from mumoe_tensor.formats.cp import CP
from mumoe_tensor.formats.cp_matrix import CPMatrix
from mumoe_tensor.formats.dense import Dense
from mumoe_tensor.formats.hadamard import Hadamard
from mumoe_tensor.formats.kronecker import Kronecker
from mumoe_tensor.formats.low_rank import LowRank
from mumoe_tensor.formats.monarch import Monarch
from mumoe_tensor.formats.registry import formats, get_format, register
from mumoe_tensor.formats.shared_expert import SharedExpert
from mumoe_tensor.formats.sums import Bias, Shared, Sliced, Sum, shared, sliced, sum_of
from mumoe_tensor.formats.tensor_ring import TensorRing
from mumoe_tensor.formats.tensor_train import TensorTrain
from mumoe_tensor.formats.tt_matrix import TTMatrix
from mumoe_tensor.formats.tucker import Tucker
from mumoe_tensor.formats.tucker_matrix import TuckerMatrix

__all__ = [
    "BTT",
    "CP",
    "Bias",
    "CPMatrix",
    "Dense",
    "Factor",
    "Format",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "Monarch",
    "Shared",
    "SharedExpert",
    "Sliced",
    "Sum",
    "TTMatrix",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "TuckerMatrix",
    "by_kind",
    "formats",
    "get_format",
    "mode_names",
    "register",
    "shared",
    "sliced",
    "sum_of",
]
