"""Reading and writing the parameters of the published layers.

In both published versions, the gate of level e is ``projs.e`` (input × experts) and its batch norm ``bn.e``.
Version 1 (a single layer) has ``factors.k`` and, for Tucker, ``core``; version 2 has ``MuMoE.factors.k`` and,
in a block of two layers, ``MuMoE2.factors.k``. The factors of a weight are the factors of TensorLy's
container of its format.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from mumoe_tensor.checks import check_choice
from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.spec import LayerSpec
from mumoe_tensor.tensors import FactorizedTensor

#: Prefixes of the weights of a single layer or a block, by version.
PREFIXES = {"v1": [""], "v2": ["MuMoE.", "MuMoE2."]}


class Published(NamedTuple):
    """The parameters of a published layer, and its spec."""

    gate: Tensor  #: of shape (experts of all levels, in_features)
    weights: list[FactorizedTensor]
    statistics: dict[str, Tensor]  #: of batch norm, of all levels
    spec: LayerSpec

    @torch.no_grad()
    def copy_to(self, gate: ExpertGate, layers: list[Experts]) -> None:
        """Copy the parameters to a layer of the same sizes."""
        gate.weight.copy_(self.gate)
        if gate.norm is not None:
            gate.norm.load_state_dict(self.statistics, strict=bool(self.statistics))
        elif self.statistics:
            raise ValueError(
                "gate_norm must be 'batch' for parameters with statistics of batch norm, got "
                f"gate_norm={gate.gate_norm!r} for {sorted(self.statistics)}."
            )
        for layer, weight in zip(layers, self.weights, strict=True):
            layer.weight = weight


def read_published(state: Mapping[str, Tensor], format: str | Format, num_weights: int) -> Published:
    """Read the parameters of a published layer; see `MuMoE.from_published`."""
    format, unread = get_format(format), dict(state)
    if format.splits:
        raise ValueError(f"the format of a published layer must not split modes, got {format!r}.")

    def take(prefix: str, suffix: str = "") -> list[Tensor]:
        names = (f"{prefix}{k}{suffix}" for k in count())
        return [unread.pop(name) for name in takewhile(unread.__contains__, names)]

    gates = take("projs.")
    if not gates or any(gate.ndim != 2 for gate in gates):
        raise ValueError(
            f"a published layer must have gate matrices 'projs.0', ...; the names are {sorted(state)}."
        )
    weights = []
    version = "v2" if any(name.startswith("MuMoE") for name in state) else "v1"
    for prefix in PREFIXES[version][:num_weights]:
        core, factors = unread.pop(f"{prefix}core", None), take(f"{prefix}factors.")
        if len(factors) != len(gates) + 2:
            raise ValueError(
                f"a published weight has a factor for each of {len(gates)} level(s), the input and the "
                f"output at '{prefix}factors.k', got {len(factors)}."
            )
        container = SimpleNamespace(weights=None, core=core, factors=factors)
        weights.append(FactorizedTensor(format, format.from_container(container)))
    norms = {name: take("bn.", f".{name}") for name in ("running_mean", "running_var", "num_batches_tracked")}
    batches = norms.pop("num_batches_tracked")
    if any(int(number) != int(batches[0]) for number in batches):
        raise ValueError(f"num_batches_tracked must be the same for all levels, got {batches}.")
    if unread:
        raise ValueError(
            f"a published layer of {num_weights} weight(s) has no parameters named {sorted(unread)}."
        )
    num_experts = tuple(gate.shape[1] for gate in gates)
    features = {gate.shape[0] for gate in gates}
    inputs = (gates[0].shape[0], *(weight.shape[-1] for weight in weights))
    # A bias is an additional row of the input mode of all weights.
    extra_rows = {weight.shape[-2] - n for weight, n in zip(weights, inputs, strict=False)}
    has_experts = all(weight.experts == num_experts for weight in weights)
    if len(features) > 1 or extra_rows not in ({0}, {1}) or not has_experts:
        raise ValueError(
            "the shapes of gates and weights must be consistent; the gates have shapes "
            f"{[tuple(gate.shape) for gate in gates]} (features x experts), the weights "
            f"{[weight.shape for weight in weights]} (experts x input x output)."
        )
    ranks = {weight.rank for weight in weights}
    if len(ranks) > 1:
        raise ValueError(f"all weights of a layer must have the same rank, got {sorted(ranks)}.")
    statistics = {}
    if batches or any(norms.values()):
        shapes = {name: [tuple(level.shape) for level in levels] for name, levels in norms.items()}
        if any(of_levels != [(n,) for n in num_experts] for of_levels in shapes.values()):
            raise ValueError(
                f"batch norm must have a mean and a variance for every expert, {num_experts} per level, or "
                f"none, got statistics of shapes {shapes}."
            )
        statistics = {name: torch.cat(levels) for name, levels in norms.items()}
        if batches:
            statistics["num_batches_tracked"] = batches[0]
    spec = LayerSpec(
        format, experts=num_experts, in_features=inputs[0], hidden=inputs[1] if len(weights) > 1 else None,
        out_features=inputs[-1], rank=ranks.pop(), bias=extra_rows == {1},
    )  # fmt: skip
    return Published(torch.cat([gate.T for gate in gates]), weights, statistics, spec)


def write_published(gate: ExpertGate, layers: list[Experts], version: str) -> dict[str, Tensor]:
    """Copies of the parameters of a layer, under their published names; see `MuMoE.to_published`."""
    prefixes = PREFIXES[check_choice(version, PREFIXES, "version")]
    if edits := [name for layer in layers for name in layer.edits or ()]:
        raise ValueError(f"published layers must have no bias edits: remove them first; got {edits}.")
    if gate.per_expert or gate.reads_input:
        raise ValueError(f"the gate of a published layer must have only a weight, got {gate.per_expert}.")
    if len(layers) > len(prefixes):
        raise ValueError(
            f"version {version!r} of the published layers has no block of {len(layers)} weights."
        )
    state = {f"projs.{e}": weight.T for e, weight in enumerate(gate.weight.split(gate.num_experts))}
    for name, value in gate.norm.state_dict().items() if gate.norm is not None else ():
        levels = value.split(gate.num_experts) if value.ndim else [value] * len(gate.num_experts)
        state |= {f"bn.{e}.{name}": level for e, level in enumerate(levels)}
    for prefix, layer in zip(prefixes, layers, strict=False):
        container = layer.weight.to_tensorly()
        if hasattr(container, "core"):
            state[f"{prefix}core"] = container.core
        state |= {f"{prefix}factors.{k}": factor for k, factor in enumerate(container.factors)}
    return {name: value.detach().clone().contiguous() for name, value in state.items()}
