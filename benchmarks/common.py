"""What the asv suites share: the profile, the grids and how a benchmark is set up."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import mumoe_tensor as mt

try:
    # Here and not where it is used: asv then imports once, before it forks. The second is what the first
    # backward pass of a process imports.
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
#: Weights of more elements than this are not made: the dense format at many experts.
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
    """The profile that the environment asks for; quick unless it does."""
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
    """Have asv show a benchmark as skipped whose weight is too large."""
    if layer.weight_parameters > MOST_ELEMENTS:
        raise NotImplementedError(f"more than {MOST_ELEMENTS:,} parameters")


def need_device(device: str) -> None:
    """Have asv show a benchmark as skipped whose device is missing."""
    if torch is None:
        raise NotImplementedError("torch is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("there is no CUDA device")


def finish(device: str) -> None:
    """Wait for what the device has still to do."""
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


class Benchmark(ABC):
    """A suite, unless it says otherwise over formats, numbers of experts and levels.

    asv passes over a class with an abstract method. Old commits are told a combination by its position alone:
    the format varies the slowest, so that a new one, which is registered last, leaves theirs as they are.
    """

    timeout = 120
    #: asv sets up before every call it times, which ends with a call: all are warm.
    warmup_time = 0
    #: Calls at least and at most, and seconds after which there are no more.
    repeat = (3, 20, 1.0)
    rounds = 1
    param_names = ["format", "experts", "levels"]
    params = [list(mt.formats()), list(profile().experts), list(profile().levels)]

    def setup(self, *values: Any) -> None:
        """Prepare a combination; what old code lacks is shown as skipped."""
        try:
            self.prepare(**dict(zip(self.param_names, values, strict=True)))
        except ImportError as error:
            raise NotImplementedError(str(error)) from error

    @abstractmethod
    def prepare(self, **values: Any) -> None:
        """Make what the benchmark needs, from its parameters by name."""
