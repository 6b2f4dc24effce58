"""What a format is (`base`), formats by name (`registry`), and one short file for each format."""

from mumoe_tensor.formats.base import Factor, Format, mode_names
from mumoe_tensor.formats.cp import CP
from mumoe_tensor.formats.dense import Dense
from mumoe_tensor.formats.hadamard import Hadamard
from mumoe_tensor.formats.registry import formats, get_format, register
from mumoe_tensor.formats.tensor_ring import TensorRing
from mumoe_tensor.formats.tensor_train import TensorTrain
from mumoe_tensor.formats.tucker import Tucker

__all__ = [
    "CP",
    "Dense",
    "Factor",
    "Format",
    "Hadamard",
    "TensorRing",
    "TensorTrain",
    "Tucker",
    "formats",
    "get_format",
    "mode_names",
    "register",
]
