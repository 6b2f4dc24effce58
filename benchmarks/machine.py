"""Measure the speeds of a device: the `Machine` entry for each dtype.

python -m benchmarks.machine [--device cuda] [--dtypes float32,bfloat16] [--threads 1]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import prod
from time import perf_counter, process_time

import torch

from benchmarks.common import DEVICES
from benchmarks.harness import threads
from mumoe_tensor import Machine
from mumoe_tensor.contraction.machine import ITEMSIZE
from mumoe_tensor.measure.timing import Comparison, compare
from mumoe_tensor.nn import Experts, entmax15

#: Rows, columns and inner size of a product, and elements of three arrays; on a CPU as large as in a layer.
PRODUCT = {"cpu": (1024, 512, 768), "cuda": (8192, 8192, 8192)}
ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
#: Rows and experts of logits.
LOGITS = {"cpu": (1024, 512), "cuda": (8192, 4096)}
#: Number of products in a CP layer of one level.
STEPS = 4


def calls(device: str, dtype: str) -> dict[str, Callable[[], object]]:
    """A matrix product, an elementwise product of large arrays, a layer of small ones, and a normed gate."""
    place = {"device": device, "dtype": getattr(torch, dtype)}
    m, n, k = PRODUCT[device]
    left, right = torch.rand(m, k, **place), torch.rand(k, n, **place)
    one, other = torch.rand(ELEMENTS[device], **place), torch.rand(ELEMENTS[device], **place)
    logits, size = torch.randn(LOGITS[device], **place), LOGITS[device][1:]
    small = Experts(8, 8, 4, "cp", 4, **place).requires_grad_(False)
    row, coefficients = torch.rand(1, 8, **place), [torch.rand(1, 4, **place)]
    return {
        "product": lambda: left @ right,  # (results are allocated, as in a layer)
        "moves": lambda: one * other,
        "small layer": torch.no_grad()(lambda: small(row, coefficients)),
        "gate": lambda: entmax15(torch.nn.functional.layer_norm(logits, size)),
    }


def machine_of(timings: Comparison, device: str, dtype: str) -> Machine:
    """The machine computed from the timings of `calls`, which may be part of a larger comparison."""
    m, n, k = PRODUCT[device]
    seconds = {name: spread.median for name in timings.seconds if (spread := timings.spread(name))}
    launch = seconds["small layer"] / STEPS
    moved = 3 * ELEMENTS[device] * ITEMSIZE[dtype]
    machine = Machine(
        flops=rounded(2 * m * n * k / (seconds["product"] - launch)),
        bandwidth=rounded(moved / (seconds["moves"] - launch)),
        launch=rounded(launch),
        dtype=dtype,
    )
    once = machine.seconds(0, 2 * prod(LOGITS[device]))
    return replace(machine, gate_passes=round(seconds["gate"] / once))


def clock_of(device: str, count: int) -> Callable[[], float]:
    """A clock: CPU time for one thread, independent of other processes, or wall time."""
    return process_time if device == "cpu" and count == 1 else perf_counter


def measure(device: str, dtype: str, count: int = 1) -> Machine:
    """Measure a device in a dtype; `count` is the number of threads."""
    timings = compare(
        calls(device, dtype), "product", rounds=25, limit=10, device=device, clock=clock_of(device, count)
    )
    return machine_of(timings, device, dtype)


def rounded(value: float) -> float:
    """Round to two digits; more would be noise."""
    return float(f"{value:.1e}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table entry for each dtype."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute; default: cpu")
    parser.add_argument("--dtypes", default=",".join(ITEMSIZE), help="comma-separated; default: all")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads; default: 1")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no CUDA device")
    names = options.dtypes.split(",")
    if not set(names) <= set(ITEMSIZE):
        parser.error(f"argument --dtypes: must be from {', '.join(ITEMSIZE)}, got {options.dtypes!r}")
    with threads(options.threads):
        for name in names:
            machine = asdict(measure(options.device, name, options.threads))
            print(f'"{name}": Machine({", ".join(f"{key}={value!r}" for key, value in machine.items())}),')


if __name__ == "__main__":
    main()
