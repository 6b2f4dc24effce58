"""Compile the kernels for a GPU that need not be there; `test_kernels` runs this in another process."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mumoe_tensor.nn.kernels import elementwise, gather, simplex

TARGET = GPUTarget("cuda", 90, 32)
WHOLE = {"ROWS": 1, "BLOCK": 1024}
CHUNKS = {"BLOCK": simplex.CHUNK}


def compiled(kernel: Any, dtype: str, warps: int, constants: dict[str, Any]) -> int:
    """Bytes of the machine code."""
    types = {name: "i32" for name in kernel.arg_names}
    types |= {name: f"*{dtype}" for name in types if name.endswith("_ptr")}
    types |= {
        "indices_ptr": "*i64",
        "of_factor_ptr": "*fp32",
        "mean": "*fp32",
        "variance": "*fp32",
        "eps": "fp32",
    }
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return len(
        triton.compile(source, target=TARGET, options={"num_warps": warps, **simplex.OPTIONS}).asm["cubin"]
    )


for norm, power, dtype in (("layer", 2, "bf16"), ("batch", 1, "fp32")):
    for kernels, shape, warps in (
        ((simplex._forward_whole, simplex._backward_whole), WHOLE, 1),
        ((simplex._forward_in_chunks, simplex._backward_in_chunks), CHUNKS, 8),
    ):
        for kernel in kernels:
            size = compiled(kernel, dtype, warps, {"NORM": norm, "POWER": power, **shape})
            print(kernel.__name__, norm, power, dtype, size, "bytes")

for dtype in ("fp32", "bf16"):
    for kernel in (gather._sum_of_rows, gather._gradients, elementwise._multiply_both):
        print(kernel.__name__, dtype, compiled(kernel, dtype, 4, {"BLOCK": 1024}), "bytes")
