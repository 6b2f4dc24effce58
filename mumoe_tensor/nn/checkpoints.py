"""Parameters of the published layers, read and written.

Both published generations of the layers name the gate of level e ``projs.e`` (input × experts) and its batch
norm ``bn.e``. Version 1 (one layer) has ``factors.k`` and, for Tucker, ``core``; version 2 has
``MuMoE.factors.k`` and, in a block of two layers, ``MuMoE2.factors.k``. A weight's factors are those of
TensorLy's container of its format.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.tensors import FactorizedTensor

State = Mapping[str, Tensor]
#: Prefixes of the weights of one layer and of two, by version.
PREFIXES = {"v1": [""], "v2": ["MuMoE.", "MuMoE2."]}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Published(NamedTuple):
    """A published layer: its gate's weight (experts of all levels × input), its weights, its statistics."""

    gate: Tensor
    experts: tuple[int, ...]
    weights: list[FactorizedTensor]
    bias: bool
    statistics: dict[str, Tensor]


def read_published(state: State, format: str | Format, layers: int) -> Published:
    """Read the parameters of a published layer of `layers` weights.

    Raises
    ------
    ValueError
        If parameters are missing or left over, or their shapes do not fit together.
    """
    format = get_format(format)
    prefixes = PREFIXES["v2" if any(name.startswith("MuMoE") for name in state) else "v1"]
    used: set[str] = set()

    def numbered(prefix: str, suffix: str = "") -> list[Tensor]:
        found: list[Tensor] = []
        while (name := f"{prefix}{len(found)}{suffix}") in state:
            used.add(name)
            found.append(state[name])
        return found

    gates = numbered("projs.")
    if not gates or any(gate.ndim != 2 for gate in gates):
        raise ValueError(
            f"a published layer has its gates, matrices, at 'projs.0', ...; the names are {sorted(state)}."
        )
    weights = []
    for prefix in prefixes[:layers]:
        core = state.get(f"{prefix}core")
        used |= {f"{prefix}core"} if core is not None else set()
        factors = numbered(f"{prefix}factors.")
        if len(factors) != len(gates) + 2:
            raise ValueError(
                f"a published weight has a factor for each of {len(gates)} level(s), the input and the "
                f"output at '{prefix}factors.k'; found {len(factors)}."
            )
        container = SimpleNamespace(weights=None, core=core, factors=factors)
        weights.append(FactorizedTensor(format, format.from_container(container)))
    statistics = {}
    for name in STATISTICS:
        levels = numbered("bn.", f".{name}")
        if levels and name == STATISTICS[-1]:
            if any(int(level) != int(levels[0]) for level in levels):
                raise ValueError(f"all levels must have seen equally many batches, got {levels}.")
            statistics[name] = levels[0]
        elif levels:
            statistics[name] = torch.cat(levels)
    if left := sorted(set(state) - used):
        raise ValueError(f"a published layer of {layers} weight(s) has no parameters of the names {left}.")
    experts = tuple(gate.shape[1] for gate in gates)
    features = {gate.shape[0] for gate in gates}
    inputs = (gates[0].shape[0], *(weight.shape[-1] for weight in weights))
    # A bias is one more row of the input mode, of all weights or of none.
    extra = {weight.shape[-2] - n for weight, n in zip(weights, inputs, strict=False)}
    has_experts = all(weight.experts == experts for weight in weights)
    if len(features) > 1 or extra not in ({0}, {1}) or not has_experts:
        raise ValueError(
            "gates and weights must fit together; the gates have shapes "
            f"{[tuple(gate.shape) for gate in gates]} (features x experts), the weights "
            f"{[weight.shape for weight in weights]} (experts x input x output)."
        )
    return Published(torch.cat([gate.T for gate in gates]), experts, weights, extra == {1}, statistics)


@torch.no_grad()
def load_published(published: Published, gate: ExpertGate, layers: list[Experts]) -> None:
    """Copy what was read into a layer of these sizes."""
    gate.weight.copy_(published.gate)
    if gate.norm is not None:
        gate.norm.load_state_dict(published.statistics, strict=bool(published.statistics))
    for layer, weight in zip(layers, published.weights, strict=True):
        for view, array in zip(layer.weight.arrays, weight.arrays, strict=True):
            view.copy_(array)


def write_published(gate: ExpertGate, layers: list[Experts], version: str) -> dict[str, Tensor]:
    """The parameters of a layer under their published names, as copies."""
    state: dict[str, Any] = {}
    for e, weight in enumerate(gate.weight.split(gate.num_experts)):
        state[f"projs.{e}"] = weight.T
    if gate.norm is not None:
        for name, value in gate.norm.state_dict().items():
            levels = value.split(gate.num_experts) if value.ndim else [value] * len(gate.num_experts)
            state |= {f"bn.{e}.{name}": level for e, level in enumerate(levels)}
    prefixes = PREFIXES[version]
    if len(layers) > len(prefixes):
        raise ValueError(
            f"version {version!r} of the published layers has no block of {len(layers)} weights."
        )
    for prefix, layer in zip(prefixes, layers, strict=False):
        container = layer.weight.to_tensorly()
        if hasattr(container, "core"):
            state[f"{prefix}core"] = container.core
        state |= {f"{prefix}factors.{k}": factor for k, factor in enumerate(container.factors)}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}
