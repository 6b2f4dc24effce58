"""What the asv suites share: the profile, the grids and how a benchmark is set up."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

import mumoe_tensor as mt

try:
    import torch  # here and not where it is used: asv then imports it once, before it forks
except ImportError:
    torch = None

BACKENDS = ("numpy", "torch")
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
    minimize: tuple[str, ...] = ("time", "flops", "peak")


PROFILES = {
    "quick": Profile(experts=(64,), levels=(1, 2), batch=64, features=256, minimize=("time",)),
    "regular": Profile(experts=(16, 256), levels=(0, 1, 2, 3), batch=1024, features=768),
    "large": Profile(experts=(16, 256, 4096), levels=(0, 1, 2, 3), batch=8192, features=768),
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


def layer(format: str, total: int, levels: int) -> dict[str, Any]:
    """Arguments that describe a layer: its rank is fitted to the parameters of the dense layer."""
    features = profile().features
    sizes: dict[str, Any] = {
        "format": format,
        "experts": experts_of(total, levels),
        "in_features": features,
        "out_features": features,
        "bias": True,
    }
    rank = mt.fit_rank(**sizes, rounding="down") if mt.get_format(format).bonds(levels) else None
    return sizes | {"rank": rank}


def on(backend: str, array: np.ndarray) -> Any:
    """The array on a backend."""
    if backend == "numpy":
        return array
    if torch is None:
        raise NotImplementedError("torch is not installed")
    return torch.from_numpy(array)


def inputs(backend: str, *shapes: tuple[int, ...]) -> list[Any]:
    """Random float32 arrays."""
    rng = np.random.default_rng(0)
    return [on(backend, rng.random(shape, dtype=np.float32)) for shape in shapes]


class Benchmark(ABC):
    """A suite over formats, numbers of experts and levels. asv skips what has an abstract method."""

    timeout = 120
    param_names: ClassVar[list[str]] = ["format", "experts", "levels"]
    params: ClassVar[list[Any]] = [list(mt.formats()), list(profile().experts), list(profile().levels)]

    def setup(self, format: str, experts: int, levels: int, *further: Any) -> None:
        """Skip what is the same as another combination, then prepare."""
        if levels == 0 and experts != profile().experts[0]:
            raise NotImplementedError("without a level there is no number of experts")
        self.prepare(layer(format, experts, levels), *further)

    @abstractmethod
    def prepare(self, layer: dict[str, Any], *further: Any) -> None:
        """Make what the benchmark needs, from the arguments that describe a layer and further parameters."""
