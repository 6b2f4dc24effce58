"""How many experts of a layer are used."""

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

#: Rows that are mapped at once.
BATCH = 1024


class ExpertUse(NamedTuple):
    """How many experts are used.

    Attributes
    ----------
    active : float or None
        Experts of all levels with a coefficient other than zero, on average over the rows; None without
        experts.
    dead : tuple of int
        Experts that no row gave a coefficient other than zero. Levels are counted one after the other.
    """

    active: float | None
    dead: tuple[int, ...]


@torch.no_grad()
def usage(layer: nn.Module, rows: ActivationRows) -> ExpertUse:
    """How many experts of a layer some rows use.

    Parameters
    ----------
    layer : Module
        Runs as in ``eval()``. All its gates are counted; it may have none.
    rows : ActivationRows
    """
    device = next((p.device for p in layer.parameters()), None)
    with counted(layer) as usages, evaluating(layer):
        for numbers in torch.arange(len(rows), device="cpu").split(BATCH):
            layer(rows.batch(numbers)[0].to(device))
    return use_of(usages)


@contextmanager
def counted(layer: nn.Module) -> Iterator[list[Usage]]:
    """While the context lasts, count the use of a layer's experts, level by level; a layer may have none."""
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
    """The figures of what `counted` counted."""
    if not usages:
        return ExpertUse(None, ())
    dead = (torch.cat([usage.uses for usage in usages]) == 0).nonzero().flatten()
    return ExpertUse(sum(float(usage.uses.sum()) / usage.rows for usage in usages), tuple(dead.tolist()))
