"""Count the experts that a layer uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mumoe_tensor.analysis.usage import Usage
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.watch import evaluating, gates_of, watch_coefficients
from mumoe_tensor.replace.activations import ActivationRows

#: Rows per forward pass.
BATCH = 1024


class ExpertUse(NamedTuple):
    """Counts of used experts.

    Attributes
    ----------
    active : float or None
        Average number of experts with a nonzero coefficient for a row, summed over levels; None without
        experts.
    dead : tuple of int
        Experts whose coefficient is zero for every row. Levels are numbered consecutively.
    """

    active: float | None
    dead: tuple[int, ...]


@torch.no_grad()
def usage(layer: nn.Module, rows: ActivationRows) -> ExpertUse:
    """Count the experts that a layer, which may have any number of gates, uses for given rows."""
    device = next((p.device for p in layer.parameters()), None)
    with counted(layer) as usages, evaluating(layer):
        for numbers in torch.arange(len(rows), device="cpu").split(BATCH):
            layer(rows.batch(numbers)[0].to(device))
    return use_of(usages)


@contextmanager
def counted(layer: nn.Module) -> Iterator[list[Usage]]:
    """A context that counts the use of a layer's experts, per level; a layer may have none."""
    if not any(isinstance(module, ExpertGate) for module in layer.modules()):
        yield []
        return
    usages = {name: [*map(Usage, gate.num_experts)] for name, gate in gates_of(layer).items()}

    def count(name: str, coefficients: tuple[Tensor, ...]) -> None:
        for usage, of_level in zip(usages[name], coefficients, strict=True):
            usage.update(of_level)

    with watch_coefficients(layer, count):
        yield [usage for of_gate in usages.values() for usage in of_gate]


def use_of(usages: Sequence[Usage]) -> ExpertUse:
    """Summarise the counts of `counted`."""
    if not usages:
        return ExpertUse(None, ())
    dead = (torch.cat([usage.uses for usage in usages]) == 0).nonzero().flatten()
    return ExpertUse(sum(float(usage.uses.sum()) / usage.rows for usage in usages), tuple(dead.tolist()))
