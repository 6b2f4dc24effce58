"""Cached products of weights, for layers that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.contraction.execute import fold
from mumoe_tensor.contraction.plan import ContractionPlan, plan_network
from mumoe_tensor.nn.backward import SavePolicy


class Folded:
    """A plan with folded products of weights, which are recomputed when a weight changes.

    Each call compares the weights with copies, since nothing else detects every change. For at least
    `fewest_rows` rows (possibly infinite), this and the program of `policy` are faster than the plain
    contraction.
    """

    def __init__(self, plan: ContractionPlan):
        self._plan, network = plan, plan.program.network
        ahead = plan_network(network, plan.batch, fold_weights=True, machine=plan.machine)
        self.policy = SavePolicy(ahead.program)
        # Positions of the weights that are operands of the folded products.
        self.sources = [
            operand.position
            for position, step in ahead.program.numbered
            for operand in (step.left, step.right)
            if position in ahead.program.constant and operand.position < network.weights
        ]
        sizes = dict(network.index_sizes)
        elements = sum(prod(sizes[x] for x in network.operands[p]) for p in self.sources)
        saved = (plan.flops - ahead.flops) / plan.batch
        self.fewest_rows = 2 * plan.machine.element * elements / saved if saved > 0 and self.sources else inf
        self.clear()

    def clear(self) -> None:
        """Delete the cached products."""
        # Copies and products are replaced together, since another thread may read them.
        self._cache: tuple[list[Tensor], dict[int, Tensor]] | None = None

    def products(self, weights: Sequence[Tensor]) -> dict[int, Tensor]:
        """The products by position, recomputed if a weight has changed."""
        sources = [weights[p].detach() for p in self.sources]
        cache = self._cache
        if cache is None or not all(map(_is_equal, sources, cache[0])):
            cache = [x.clone() for x in sources], fold(self.policy.program, weights)
            self._cache = cache
        return cache[1]

    def __reduce__(self) -> Any:
        return Folded, (self._plan,)


def are_comparable(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can be compared without a device synchronisation: they must be parameters on the CPU.

    A transformed tensor has no values. On other devices the CPU would wait for the comparison, and a CUDA
    graph could not be captured.
    """
    return all(type(x) is nn.Parameter and x.device.type == "cpu" for x in tensors)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
