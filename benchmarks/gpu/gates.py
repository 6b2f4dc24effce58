"""Times of gates relative to the time of moving their data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from benchmarks.gpu import BRIEF
from benchmarks.harness import Row, quartiles
from benchmarks.layers import entmax
from mumoe_tensor.gates import sparsemax
from mumoe_tensor.measure.timing import compare
from mumoe_tensor.nn import entmax15
from mumoe_tensor.nn.functional import _Entmax15
from mumoe_tensor.nn.kernels import serve
from mumoe_tensor.nn.kernels.coefficients import coefficients

Gate = Callable[[torch.Tensor], torch.Tensor]
#: Minimum traffic of a pass, in copies of the logits. A step reads logits and writes coefficients; then it
#: reads the coefficients and their gradient, and writes the gradient of the logits.
COPIES = {"forward": 1, "step": 2.5}


def layer_normed(logits: torch.Tensor) -> torch.Tensor:
    """entmax15 after layer norm, in one kernel if available."""
    if serve(logits):
        return coefficients(logits, power=2, norm="layer")
    return entmax15(torch.nn.functional.layer_norm(logits, logits.shape[-1:]))


def kernel_of_sparsemax(logits: torch.Tensor) -> torch.Tensor:
    """sparsemax as in the layers."""
    return coefficients(logits, power=1) if serve(logits) else sparsemax(logits)


def without_kernel(logits: torch.Tensor) -> torch.Tensor:
    """entmax15 from torch operations."""
    result: torch.Tensor = _Entmax15.apply(logits, False)
    return result


#: The gates of this library, with kernels if available and with torch operations, and softmax.
OURS: dict[str, Gate] = {
    "entmax15": entmax15,
    "layer norm, entmax15": layer_normed,
    "sparsemax": kernel_of_sparsemax,
    "entmax15 of torch": without_kernel,
    "sparsemax of torch": sparsemax,
    "softmax of torch": partial(torch.softmax, dim=-1),
}


def of_packages(device: str) -> dict[str, Gate]:
    """entmax15 of the installed packages."""
    functions: dict[str, Gate] = {}
    if entmax is not None:
        functions["entmax package"] = partial(entmax.entmax15, dim=-1)
    if device == "cuda" and find_spec("adasplash"):
        import adasplash

        functions["adasplash"] = adasplash.triton_entmax15
    return functions


def gates(device: str, toy: bool) -> Iterator[Row]:
    """All gates in eager mode, then those of this library compiled."""
    sizes = (64, 256) if toy else (64, 256, 1024, 4096, 16_384, 65_536)
    for dtype, size in product(("float32", "bfloat16"), sizes):
        yield from times(OURS, of_packages(device), dtype, size, device, toy)
    for size in () if toy else sizes:
        torch._dynamo.reset()
        compiled: dict[str, Gate] = {
            "entmax15, compiled": torch.compile(entmax15, dynamic=False),
            "entmax15 of torch, compiled": torch.compile(without_kernel, dynamic=False),
        }
        yield from times(compiled, {}, "float32", size, device, toy)


def times(
    ours: dict[str, Gate], packages: dict[str, Gate], dtype: str, size: int, device: str, toy: bool
) -> Iterator[Row]:
    """Forward passes and steps of gates over a number of experts."""
    elements = 2**12 if toy else 2**26
    logits = torch.randn(elements // size, size, device=device, dtype=getattr(torch, dtype))
    gradient, copied = torch.randn_like(logits), torch.empty_like(logits)

    def step(gate: Gate) -> None:
        leaf = logits.detach().requires_grad_()
        torch.autograd.grad(gate(leaf), leaf, gradient)

    for kind, copies in COPIES.items():
        place = {"experts": size, "dtype": dtype, "pass": kind}
        calls: dict[str, Callable[[], Any]] = {}
        for name, gate in (ours | packages).items():
            calls[name] = partial(gate, logits) if kind == "forward" else partial(step, gate)
        for name in packages:
            try:
                calls[name]()
            except Exception as error:  # a package may not support these sizes
                del calls[name]
                yield {"gate": name} | place | {"note": f"{type(error).__name__}: {error}"[:60]}
        timings = compare(calls | {"copy": partial(copied.copy_, logits)}, "copy", **BRIEF, device=device)
        speed = 2e-9 * logits.nbytes / timings.spread("copy").median
        for name in calls:
            row = {"gate": name} | place | {"ms": 1e3 * timings.spread(name).median, "copy GB/s": speed}
            yield row | quartiles(timings.ratio(name), "to limit", scale=1 / copies)
