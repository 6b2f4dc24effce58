"""Device-dependent helpers: capture calls as CUDA graphs, count kernels, set the precision of products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from mumoe_tensor.measure.timing import WARM_UP

#: Dtype and precision of matrix products, by name.
PRECISIONS = {
    "float32": (torch.float32, "highest"),
    "TF32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Set the precision of float32 products in a context; yields the dtype for tensors."""
    dtype, of_products = PRECISIONS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(of_products)
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before)


def graphed(call: Callable[[], object], device: str) -> Callable[[], object]:
    """A call captured as a CUDA graph; on a CPU the call itself."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP[device]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(call: Callable[[], object], device: str) -> int:
    """Count the kernels a call launches, with copies; without a GPU, the operations that would launch one."""
    call()
    if device != "cuda":
        with _Operations() as operations:
            call()
        return operations.count
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events())


class _Operations(TorchDispatchMode):
    """Counts the operations that write a result, without views and uninitialized memory."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = operation._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        package, _, name = operation._schema.name.partition("::")
        writes = not (is_view or package == "prim" or name in ("detach", "_unsafe_view") or "empty" in name)
        self.count += writes
        return operation(*args, **(kwargs or {}))
