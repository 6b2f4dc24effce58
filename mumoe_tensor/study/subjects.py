"""The modules that a study compares: a dense layer, and mixtures that can replace it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from mumoe_tensor.contraction.machine import ITEMSIZE, as_machine
from mumoe_tensor.cost import cost
from mumoe_tensor.formats.registry import label
from mumoe_tensor.formats.text import format_text, read_format
from mumoe_tensor.nn import MuMoE, MuMoEMLP
from mumoe_tensor.spec import LayerSpec, as_budget
from mumoe_tensor.study.layers import features
from mumoe_tensor.study.mixtures import SparseMixture

#: Roles of a subject.
MIXTURE, BASELINE, SPARSE = "mixture", "baseline", "sparse"
DTYPE = "float32"
ITEM = ITEMSIZE[DTYPE]


@dataclass(frozen=True)
class Subject:
    """One module to measure.

    Attributes
    ----------
    spec : LayerSpec
        The format of the dense layer and of the sparse mixture is "dense".
    role : {"mixture", "baseline", "sparse"}
        A factorized mixture, the dense layer itself, or a mixture of dense experts, of which each input uses
        only a few.
    budget : int
        Number of parameters that the rank was fitted to, with gate and biases; 0 without a rank.
    top_k : int
        Active experts per input in the sparse mixture.
    """

    spec: LayerSpec
    role: str = MIXTURE
    budget: int = 0
    top_k: int = 2

    @property
    def name(self) -> str:
        """The text of the format, or ``"baseline"`` or ``"sparse"``."""
        return format_text(self.spec.format) if self.role == MIXTURE else self.role

    @property
    def title(self) -> str:
        """Name in tables and plots; for a format with settings its expression, as titles do not show them."""
        if self.role == BASELINE:
            return "Linear layer" if self.spec.hidden is None else "Dense MLP"
        if self.role == SPARSE:
            return f"Sparse mixture, top {self.top_k}"
        format = self.spec.format
        if not isinstance(label(format), str):
            return repr(format)
        is_mixture = self.spec.experts and len(format.declaration(1)) == 1
        return f"{format.title} mixture" if is_mixture else format.title

    @property
    def key(self) -> str:
        """A key that identifies the subject within a study."""
        spec = self.spec
        numbers = (features(spec), spec.experts, spec.full_rank)
        return " ".join([self.name, *("x".join(map(str, part)) or "-" for part in numbers)])

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """Make the module, initialized with torch's global random numbers."""
        spec = self.spec
        if self.role == SPARSE:
            return SparseMixture(spec, self.top_k, device=device)
        if self.role == BASELINE:
            first, *second = (
                nn.Linear(p.in_features, p.out_features, bias=p.bias, device=device) for p in spec.layers
            )
            return nn.Sequential(first, nn.GELU(), *second) if second else first
        make: Any = MuMoE if spec.hidden is None else MuMoEMLP
        return make.from_spec(spec, device=device)

    def figures(self, batch: int) -> dict[str, float]:
        """Parameters and the cost per input, by formula, for a batch; units as in `UNITS`."""
        if self.role == SPARSE:
            return self._sparse_figures(batch)
        total = cost(self.spec, gate=True, batch=batch, dtype=DTYPE)
        # Minimum traffic: every operand is read once and every result written once.
        vectors = batch * (self.spec.in_features + sum(self.spec.experts))
        traffic = ITEM * (total.parameters + vectors) + total.write
        return {
            "parameters": total.parameters,
            "gate parameters": total.gate_parameters,
            "FLOPs": total.flops / batch,
            "intensity": total.flops / traffic,
            # The dense layer saves its input and, if it is a single linear layer, nothing else.
            "saved": (total.saved + ITEM * batch * self.spec.in_features) / batch,
            "expert rank": total.max_expert_rank,
        }

    def predicted(self, batch: int, machine: str) -> float:
        """Predicted seconds of a forward pass on a machine, such as "cpu" (one core) or "cuda".

        See `.Cost`. For the sparse mixture, the prediction is a single roofline of all its FLOPs and traffic.
        """
        computing = as_machine(machine, DTYPE)
        if self.role != SPARSE:
            return cost(self.spec, gate=True, batch=batch, machine=computing).seconds
        figures = self.figures(batch)
        flops = batch * figures["FLOPs"]
        return computing.seconds(flops, flops / figures["intensity"] / ITEM)

    def _sparse_figures(self, batch: int) -> dict[str, float]:
        spec, k, count = self.spec, self.top_k, prod(self.spec.experts)
        expert = cost(replace(spec, experts=()), batch=batch, dtype=DTYPE)
        outputs = [part.out_features for part in spec.layers]
        gate = spec.in_features * count
        # The outputs of active experts are weighted and added.
        flops = k * (expert.flops + 2 * batch * spec.out_features) + 2 * batch * gate
        # At best, every active expert is read once.
        read = min(count, k * batch) * expert.parameters + gate + batch * (spec.in_features + count)
        # For each active expert of an input: a copy of the input, two activations between layers, and the
        # output before and after weighting.
        saved = k * (spec.in_features + 2 * sum(outputs))
        return {
            "parameters": count * expert.parameters + gate,
            "gate parameters": gate,
            "FLOPs": flops / batch,
            "intensity": flops / (ITEM * read + k * expert.write),
            "saved": ITEM * (saved + spec.in_features + count),
            "expert rank": expert.max_expert_rank,
        }


#: Units of computed and measured quantities.
UNITS = {
    "parameters": "1",
    "gate parameters": "1",
    "FLOPs": "FLOP/input",
    "intensity": "FLOP/byte",
    "saved": "byte/input",
    "expert rank": "1",
    "predicted forward": "s",
    "weight error": "1",
    "output error": "1",
    "output error, plain fit": "1",
    "forward": "s",
    "step": "s",
    "forward peak": "byte",
    "step peak": "byte",
    "accuracy": "1",
    "loss": "nat",
    "training time": "s",
    "active experts": "1",
    "dead experts": "1",
    "largest share": "1",
    "polysemanticity": "1",
    "polysemanticity, random gate": "1",
}


def fitted(
    layer: LayerSpec, experts: Sequence[int], formats: Sequence[str], parameters: int | str = "match"
) -> tuple[list[Subject], dict[str, str]]:
    """Mixtures to replace a dense layer, each with the rank whose parameters are closest to a budget.

    Parameters
    ----------
    layer : LayerSpec
        The dense layer.
    experts : sequence of int
        Number of experts per level.
    formats : sequence of str
        Names or, for formats with settings, config entries as JSON.
    parameters : int or str, default "match"
        The budget; see `.LayerSpec.fitted`.

    Returns
    -------
    list of Subject
        Includes formats without a rank, whatever their number of parameters.
    dict of str to str
        Formats that have no rank for the budget, or cannot split a size, with the reason.
    """
    budget = as_budget(parameters, layer.dense_parameters)
    subjects, unfitted = [], {}
    for name in formats:
        format = read_format(name)
        try:
            spec = replace(layer, format=format, experts=tuple(experts), rank=None)
            if spec.rank is None:
                subjects.append(Subject(spec.fitted(budget, rounding="nearest"), budget=budget))
            else:
                subjects.append(Subject(spec))
        except ValueError as error:
            unfitted[name] = str(error)
    return subjects, unfitted
