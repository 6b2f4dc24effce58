"""A Triton kernel for the products of one array with two others, which reads the first only once.

Import this module only inside functions, since it imports Triton. Triton's interpreter does not support
string annotations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Number of entries per program.
BLOCK = 1024


def multiply_both(x: Tensor, left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor) -> None:
    """Write ``x * right`` to `of_left` and ``x * left`` to `of_right`, all contiguous and of one shape."""
    size = x.numel()
    if size:
        with torch.cuda.device_of(x):
            _multiply_both[(triton.cdiv(size, BLOCK),)](x, left, right, of_left, of_right, size, BLOCK=BLOCK)


@triton.jit
def _multiply_both(x_ptr, left_ptr, right_ptr, of_left_ptr, of_right_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    x = tl.load(x_ptr + place, mask=inside).to(tl.float32)
    left = tl.load(left_ptr + place, mask=inside).to(tl.float32)
    right = tl.load(right_ptr + place, mask=inside).to(tl.float32)
    tl.store(of_left_ptr + place, (x * right).to(of_left_ptr.dtype.element_ty), mask=inside)
    tl.store(of_right_ptr + place, (x * left).to(of_right_ptr.dtype.element_ty), mask=inside)
