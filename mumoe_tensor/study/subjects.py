"""What is compared: a dense layer, and mixtures that may take its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn

from mumoe_tensor.contraction.plan import ITEMSIZE
from mumoe_tensor.cost import Cost, cost
from mumoe_tensor.formats.registry import get_format
from mumoe_tensor.nn import MuMoE, MuMoEMLP
from mumoe_tensor.spec import as_budget, dense_parameters, fit_rank
from mumoe_tensor.study.mixtures import SparseMixture

#: Names of what is no factorized format: the dense layer itself, and the sparse mixture.
BASELINE, SPARSE = "baseline", "sparse"
DTYPE = "float32"
ITEM = ITEMSIZE[DTYPE]


@dataclass(frozen=True)
class Subject:
    """One thing to be measured.

    Attributes
    ----------
    name : str
        The format's, or ``"baseline"`` or ``"sparse"``.
    sizes : tuple of int
        From the input to the output: two for a linear layer, three for a block of two.
    experts : tuple of int
        One number a level.
    rank : tuple of int
    budget : int
        Parameters that were asked for, gate and biases counted; 0 for what has no rank to be fitted.
    top_k : int
        Experts that an input of the sparse mixture uses.
    skip : str
        Why it is not run; empty if it is.
    """

    name: str
    sizes: tuple[int, ...]
    experts: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()
    budget: int = 0
    top_k: int = 2
    skip: str = ""

    @property
    def title(self) -> str:
        """What it is called in tables and plots."""
        if self.name == BASELINE:
            return "Linear layer" if len(self.sizes) == 2 else "Dense MLP"
        if self.name == SPARSE:
            return f"Sparse mixture, top {self.top_k}"
        format = get_format(self.name)
        return f"{format.title} mixture" if len(format.declaration(1)) == 1 else format.title

    @property
    def key(self) -> str:
        """Tells it apart from all others of a study."""
        parts = (self.name, self.sizes, self.experts, self.rank)
        return " ".join(part if isinstance(part, str) else "x".join(map(str, part)) or "-" for part in parts)

    def build(self, device: torch.device | str = "cpu") -> nn.Module:
        """The module, its weights drawn by torch's generator.

        Parameters
        ----------
        device : torch.device or str, default "cpu"
        """
        sizes: Any = self.sizes
        if self.name == SPARSE:
            return SparseMixture(sizes, prod(self.experts), self.top_k, device=device)
        if self.name == BASELINE:
            layers = [nn.Linear(inner, outer, device=device) for inner, outer in pairwise(sizes)]
            return layers[0] if len(layers) == 1 else nn.Sequential(layers[0], nn.GELU(), layers[1])
        make: Any = MuMoE if len(sizes) == 2 else MuMoEMLP
        return make(*sizes, self.experts, self.name, self.rank or None, device=device)

    def figures(self, batch: int) -> dict[str, float]:
        """What it costs by formula: parameters, and the cost of one input.

        Parameters
        ----------
        batch : int
            Inputs that come at once.

        Returns
        -------
        dict of str to float
            Units as in `UNITS`.
        """
        if self.name == SPARSE:
            return self._sparse_figures(batch)
        found = self._cost(batch)
        # Every operand read once, every result written once: no product moves less.
        vectors = batch * (self.sizes[0] + sum(self.experts))
        traffic = ITEM * (found.parameters + vectors) + found.write
        return {
            "parameters": found.parameters,
            "gate parameters": found.gate_parameters,
            "FLOPs": found.flops / batch,
            "intensity": found.flops / traffic,
            # The dense layer keeps its input and, if it is a single one, nothing else.
            "saved": (found.saved + ITEM * batch * self.sizes[0]) / batch,
            "expert rank": found.max_expert_rank,
        }

    def _cost(self, batch: int) -> Cost:
        is_mixture = self.name != BASELINE
        return cost(
            self.name if is_mixture else "dense",
            experts=self.experts,
            **_named(self.sizes),
            rank=self.rank or None,
            bias=True,
            gate=is_mixture,
            batch=batch,
            dtype=DTYPE,
        )

    def _sparse_figures(self, batch: int) -> dict[str, float]:
        dense, k, count = (
            replace(self, name=BASELINE, experts=())._cost(batch),
            self.top_k,
            prod(self.experts),
        )
        gate = self.sizes[0] * count
        # The outputs that are used are weighted and added.
        flops = k * (dense.flops + 2 * batch * self.sizes[-1]) + 2 * batch * gate
        # At best every expert that is used is read once.
        read = min(count, k * batch) * dense.parameters + gate + batch * (self.sizes[0] + count)
        # Of every input used: its copy, two activations between layers, the output with and without weight.
        kept = k * (self.sizes[0] + 2 * sum(self.sizes[1:]))
        return {
            "parameters": count * dense.parameters + gate,
            "gate parameters": gate,
            "FLOPs": flops / batch,
            "intensity": flops / (ITEM * read + k * dense.write),
            "saved": ITEM * (kept + self.sizes[0] + count),
            "expert rank": dense.max_expert_rank,
        }


#: Units of what is computed and measured.
UNITS = {
    "parameters": "1",
    "gate parameters": "1",
    "FLOPs": "FLOP/input",
    "intensity": "FLOP/byte",
    "saved": "byte/input",
    "expert rank": "1",
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
    sizes: Sequence[int],
    experts: Sequence[int],
    formats: Sequence[str],
    parameters: str = "match",
) -> tuple[list[Subject], dict[str, str]]:
    """Every format with the rank that comes nearest to a budget; what has no rank as it is.

    Parameters
    ----------
    sizes : sequence of int
        See `Subject`.
    experts : sequence of int
    formats : sequence of str
    parameters : str, default "match"
        See `budget_of`.

    Returns
    -------
    list of Subject
    dict of str to str
        Formats that cannot be had for the budget, and why.
    """
    budget = budget_of(parameters, sizes)
    subjects, unfitted = [], {}
    for name in formats:
        rank: tuple[int, ...] = ()
        if has_rank := bool(get_format(name).bonds(len(experts))):
            try:
                found = fit_rank(
                    name, experts=experts, **_named(sizes), parameters=budget, bias=True, gate=True,
                    rounding="nearest",
                )  # fmt: skip
            except ValueError as error:
                unfitted[name] = str(error)
                continue
            rank = (found,) if isinstance(found, int) else found
        subjects.append(Subject(name, tuple(sizes), tuple(experts), rank, budget if has_rank else 0))
    return subjects, unfitted


def budget_of(parameters: str, sizes: Sequence[int]) -> int:
    """The number of parameters that a text asks for.

    Parameters
    ----------
    parameters : str
        ``"match"`` for the parameters of the dense layer with its biases, a multiple of them as ``"0.5x"``,
        or a number.
    sizes : sequence of int

    Raises
    ------
    ValueError
        If it is none of these, or not positive.
    """
    return as_budget(parameters, dense_parameters(**_named(sizes), bias=True))


def _named(sizes: Sequence[int]) -> dict[str, Any]:
    return {
        "in_features": sizes[0],
        "hidden": sizes[1] if len(sizes) == 3 else None,
        "out_features": sizes[-1],
    }
