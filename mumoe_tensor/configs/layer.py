"""The sizes of a layer and the options of its plan, as the options of `plan`, `cost` and `fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mumoe_tensor.configs.kinds import Levels, MachineText, Rank


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The arguments of a `.LayerSpec` besides the format.

    Attributes
    ----------
    experts : tuple of int
        Number of experts, such as 64, 64x64 for two levels, or none.
    in_features : int
        Number of input features.
    out_features : int
        Number of output features.
    hidden : int or None
        Hidden size of a block of two layers.
    gated : bool
        With hidden: a gated block, with two layers to the hidden units.
    rank : tuple of int and None, or None
        Rank, one number per bond, such as 64,128,128; see `mumoe-tensor formats`. For fit, one number may be
        ?, such as 4,4,?, and is solved for; by default all are.
    bias : bool
        Whether every expert has a bias, an additional row of the input mode.
    """

    experts: Levels
    in_features: int
    out_features: int
    hidden: int | None = None
    gated: bool = False
    rank: Rank | None = None
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The options of `mumoe_tensor.plan`.

    Attributes
    ----------
    batch : int
        Number of inputs.
    minimize : {"time", "flops", "peak"}
        What the plan minimizes: time, flops or peak (memory).
    implementation : {"factorized", "reconstructed", "auto"}
        factorized (contract the factors), reconstructed (form the weight) or auto.
    memory_limit : int or None
        Limit for the largest intermediate result, in elements, or in bytes with --dtype.
    fold_weights : bool
        Do not count products of weights alone, which are computed once.
    dtype : str or None
        Count memory in bytes of float64, float32, bfloat16 or float16, instead of elements.
    machine : str
        Machine to predict times for: cpu, cuda, h200, or its speeds as JSON:
        '{"flops": 3e14, "bandwidth": 2e12, "launch": 4e-6, "dtype": "bfloat16"}'.
    """

    batch: int = 1
    minimize: Literal["time", "flops", "peak"] = "time"
    implementation: Literal["factorized", "reconstructed", "auto"] = "factorized"
    memory_limit: int | None = None
    fold_weights: bool = False
    dtype: str | None = None
    machine: MachineText = "cpu"
