"""Triton kernels for GPUs, and the operators that call them.

On other devices, and for float64, torch operations compute the same result. Triton is imported by the first
call of a kernel, not with this package.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mumoe_tensor.calls import is_exported
from mumoe_tensor.compiling import constant_under_compile
from mumoe_tensor.nn.values import is_distributed

#: Device types with kernels; callers check this first.
DEVICES = frozenset({"cuda"})
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serve(x: Tensor) -> bool:
    """Whether kernels can be used for a tensor: by its device and dtype, and if Triton is installed."""
    if x.device.type not in DEVICES or x.dtype not in DTYPES:
        return False
    return has_triton() and not is_exported() and not is_distributed(x)


@constant_under_compile
def has_triton() -> bool:
    """Whether Triton is installed and supports the GPU; the result is cached."""
    if not _HAS_TRITON:
        is_supported = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)
        _HAS_TRITON.append(is_supported and find_spec("triton") is not None)
    return _HAS_TRITON[0]


_HAS_TRITON: list[bool] = []
