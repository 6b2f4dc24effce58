"""Shared by the asv suites: profiles, the grid of layers, and how a benchmark is set up."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

try:
    # At the top, so that asv imports once, before it forks. The first backward pass of a process imports the
    # second module.
    import torch
    import torch.fx.experimental.symbolic_shapes
except ImportError:
    torch = None

if TYPE_CHECKING:
    from mumoe_tensor import LayerSpec

BACKENDS = ("numpy", "torch")
DEVICES = ("cpu", "cuda")
#: Environment variable that chooses the profile.
VARIABLE = "MUMOE_BENCHMARK_PROFILE"
#: Larger weights are skipped, such as those of the dense format with many experts.
MOST_ELEMENTS = 2**27


@dataclass(frozen=True)
class Profile:
    """How much the suites measure."""

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
    """A layer, or a block, of at most the dense one's parameters besides those of the gate."""
    # Here and not above: a benchmark of a commit that has none is skipped.
    from mumoe_tensor import LayerSpec

    if levels == 0 and experts != profile().experts[0]:
        raise NotImplementedError("without a level there is no number of experts")
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
    """Have asv skip a benchmark whose weight is too large."""
    if layer.weight_parameters > MOST_ELEMENTS:
        raise NotImplementedError(f"more than {MOST_ELEMENTS:,} parameters")


def need_device(device: str) -> None:
    """Have asv skip a benchmark whose device is missing."""
    if torch is None:
        raise NotImplementedError("torch is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("there is no CUDA device")


def finish(device: str) -> None:
    """Wait until the device is done."""
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
        raise NotImplementedError("NumPy has the CPU only, and no bfloat16")
    return [array.astype(dtype) for array in arrays]


#: Formats of the suites. A shared expert takes the budget, the dense layer's parameters, for itself.
FORMATS = ("cp", "dense", "hadamard", "tr", "tt", "tucker", "btt", "kron", "monarch", "tt-matrix")


class Benchmark(ABC):
    """A suite; by default its parameters are formats, numbers of experts, and numbers of levels.

    asv leaves out classes with abstract methods. It stores results by the position of a combination: formats
    vary slowest, so one that is added last does not move the others.
    """

    timeout = 120
    #: The setup that asv runs before every timed call ends with a call: all are warm.
    warmup_time = 0
    #: Fewest and most calls, and seconds after which there is no further one.
    repeat = (3, 20, 1.0)
    rounds = 1
    param_names = ["format", "experts", "levels"]
    params = [list(FORMATS), list(profile().experts), list(profile().levels)]

    def setup(self, *values: Any) -> None:
        """Prepare a combination; one that needs what an old commit lacks is shown as skipped."""
        try:
            self.prepare(**dict(zip(self.param_names, values, strict=True)))
        except ImportError as error:
            raise NotImplementedError(str(error)) from error

    @abstractmethod
    def prepare(self, **values: Any) -> None:
        """Make what the benchmark needs for one combination of parameters."""
