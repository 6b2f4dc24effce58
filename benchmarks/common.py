"""The shared parts of the asv suites: profiles, the grid of layers, and the setup of a benchmark."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.fx.experimental.symbolic_shapes  # (else the first backward pass after asv's fork imports it)

if TYPE_CHECKING:
    from mumoe_tensor import LayerSpec

BACKENDS = ("numpy", "torch")
DEVICES = ("cpu", "cuda")
#: Environment variable that selects the profile.
VARIABLE = "MUMOE_BENCHMARK_PROFILE"
#: Larger weights are skipped, such as those of the dense format with many experts.
MOST_ELEMENTS = 2**27


@dataclass(frozen=True)
class Profile:
    """The extent of the suites."""

    experts: tuple[int, ...]
    levels: tuple[int, ...]
    batch: int
    features: int
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")
    minimize: tuple[str, ...] = ("time", "flops", "peak")
    devices: tuple[str, ...] = DEVICES


PROFILES = {
    "quick": Profile((64,), (1, 2), batch=64, features=128, dtypes=("float32",), minimize=("time",)),
    "regular": Profile(experts=(16, 256), levels=(0, 1, 2, 3), batch=1024, features=768),
    "large": Profile(experts=(16, 256, 4096), levels=(0, 1, 2, 3), batch=8192, features=768),
    "cuda": Profile((256,), (1, 2), 8192, 768, dtypes=("float32", "bfloat16"), devices=("cuda",)),
}


def profile() -> Profile:
    """The profile named in the environment, or the quick one."""
    name = os.environ.get(VARIABLE, "quick")
    if name not in PROFILES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(PROFILES)}, got {name!r}.")
    return PROFILES[name]


def experts_of(total: int, levels: int) -> tuple[int, ...]:
    """About `total` experts, spread evenly over the levels."""
    return (max(2, round(total ** (1 / levels))),) * levels if levels else ()


def layer(
    format: str, experts: int, levels: int, features: int | None = None, hidden: int | None = None
) -> LayerSpec:
    """A layer, or a block, with at most the parameters of the dense one, without the gate."""
    # Imported here, so that benchmarks are skipped for commits that do not have it.
    from mumoe_tensor import LayerSpec

    if levels == 0 and experts != profile().experts[0]:
        raise NotImplementedError("experts need at least one level")
    features = features or profile().features
    spec = LayerSpec(
        format,
        experts=experts_of(experts, levels),
        in_features=features,
        hidden=hidden,
        out_features=features,
        bias=True,
    )
    return spec.fitted(rounding="down", gate=False) if spec.rank is None else spec


def need_memory(layer: LayerSpec) -> None:
    """Make asv skip a benchmark whose weight is too large."""
    if layer.weight_parameters > MOST_ELEMENTS:
        raise NotImplementedError(f"more than {MOST_ELEMENTS:,} parameters")


def need_device(device: str) -> None:
    """Make asv skip a benchmark whose device is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("there is no CUDA device")


def finish(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def inputs(backend: str, *shapes: tuple[int, ...], dtype: str = "float32", device: str = "cpu") -> list[Any]:
    """Random arrays."""
    rng = np.random.default_rng(0)
    arrays = [rng.random(shape, dtype=np.float32) for shape in shapes]
    if backend == "torch":
        need_device(device)
        return [torch.from_numpy(array).to(device, getattr(torch, dtype)) for array in arrays]
    if device != "cpu" or dtype == "bfloat16":
        raise NotImplementedError("NumPy supports only the CPU, without bfloat16")
    return [array.astype(dtype) for array in arrays]


Method = TypeVar("Method", bound=Callable[..., Any])


def settings(**values: Any) -> Callable[[Method], Method]:
    """Set attributes of a benchmark that asv reads, such as its unit."""

    def decorate(method: Method) -> Method:
        vars(method).update(values)
        return method

    return decorate


#: Formats of the suites, without shared-expert, whose shared expert would take the whole budget.
FORMATS = ("cp", "dense", "hadamard", "tr", "tt", "tucker", "btt", "kron", "monarch", "tt-matrix")


class Benchmark(ABC):
    """A suite; by default its parameters are formats, numbers of experts, and numbers of levels.

    asv ignores classes with abstract methods. It stores results by the position of a combination. Formats
    vary slowest, so that a new format at the end does not move the others.
    """

    timeout = 120
    #: No warm-up: the setup that asv runs before every timed call ends with a call.
    warmup_time = 0
    #: Minimum and maximum number of calls, and seconds after which no further call starts.
    repeat = (3, 20, 1.0)
    rounds = 1
    param_names = ["format", "experts", "levels"]
    params = [list(FORMATS), list(profile().experts), list(profile().levels)]

    def setup(self, *values: Any) -> None:
        """Prepare a combination; it is skipped if the commit lacks a feature."""
        try:
            self.prepare(**dict(zip(self.param_names, values, strict=True)))
        except ImportError as error:
            raise NotImplementedError(str(error)) from error

    @abstractmethod
    def prepare(self, *args: Any, **values: Any) -> None:
        """Prepare the benchmark for one combination of parameters."""
