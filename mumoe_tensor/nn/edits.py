"""Biases added to experts after training, stored separately from the weight so that they can be removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class BiasEdit(nn.Module):
    """An additional bias of every expert: the product of its means, one per level, times a vector of outputs.

    The buffers ``mean_0``, ... have shape (N_e,), and `outputs` has shape (out_features,).
    """

    outputs: Tensor

    def __init__(self, means: Sequence[Tensor], outputs: Tensor):
        super().__init__()
        for e, mean in enumerate(means):
            self.register_buffer(f"mean_{e}", mean)
        self.register_buffer("outputs", outputs)

    def forward(self, coefficients: Sequence[Tensor]) -> Tensor:
        """The bias to add to the outputs, given the coefficients."""
        weight = self.outputs.new_ones(())
        for e, a in enumerate(coefficients):
            weight = weight * (a @ getattr(self, f"mean_{e}"))
        return weight.unsqueeze(-1) * self.outputs


class BiasEdits(nn.ModuleDict):
    """The edits of one layer of experts, by name."""

    def forward(self, y: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """Add all edits to the outputs, in the dtype of the outputs."""
        for edit in self.values():
            y = y + edit(coefficients).to(y.dtype)
        return y


def check_edit_name(name: str) -> None:
    """Raise an error unless a `BiasEdits` can have a child with this name."""
    if not isinstance(name, str):
        raise TypeError(f"the name of an edit must be a string, got {name!r}.")
    if not name or "." in name or hasattr(BiasEdits(), name):
        raise ValueError(f"the name of an edit must be a valid module name without dots, got {name!r}.")


def edits_in(state: Mapping[str, Any], prefix: str) -> dict[str, set[str]]:
    """The edits in the state of an `Experts`, by name, each with the names of its entries."""
    start, edits = f"{prefix}edits.", dict[str, set[str]]()
    for key in state:
        if key.startswith(start):
            name, _, entry = key.removeprefix(start).partition(".")
            edits.setdefault(name, set()).add(entry)
    return edits
