"""Products of weights alone, made ahead for a layer that is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.contraction.execute import fold
from mumoe_tensor.contraction.network import Network
from mumoe_tensor.contraction.plan import plan_network
from mumoe_tensor.contraction.search import ELEMENT
from mumoe_tensor.nn.contraction import BACKEND, Recipe
from mumoe_tensor.recording import is_recorded


class Folded:
    """The products of weights that are worth making ahead, and made again once a weight has changed.

    Whether one has is found by comparing the weights with copies: nothing else sees every change. That reads
    both once, which is counted in whether it is worth it.

    Parameters
    ----------
    network : Network
        A forward network.
    batch : int
        The number of rows it is planned for.

    Attributes
    ----------
    recipe : Recipe
        The contraction that takes the products up.
    fewest_rows : float
        From this number of rows on it takes less time than the plain contraction; may be infinite.
    """

    def __init__(self, network: Network, batch: int):
        self._made_for = (network, batch)
        plain, ahead = (plan_network(network, batch, constants=c) for c in (None, "weights"))
        self.recipe = Recipe(ahead.program, frozenset())
        # The weights that go into these products.
        constant, sizes = set(range(network.weights)), dict(network.sizes)
        self.sources: list[int] = []
        for position, step in enumerate(ahead.program.steps, start=len(network.operands)):
            pair = {step.left.position, step.right.position}
            if pair <= constant:
                constant.add(position)
                self.sources += [p for p in pair if p < network.weights]
        elements = sum(prod(sizes[x] for x in network.operands[p]) for p in self.sources)
        saved = (plain.flops - ahead.flops) / max(batch, 1)
        self.fewest_rows = 2 * ELEMENT * elements / saved if saved > 0 and self.sources else inf
        self.clear()

    def clear(self) -> None:
        """Forget the products."""
        # Copies and products are exchanged together: another thread may be looking.
        self._kept: tuple[list[Tensor], dict[int, Tensor]] | None = None

    def products(self, weights: Sequence[Tensor]) -> dict[int, Tensor]:
        """The products by the position of their step, made again if a weight has changed."""
        read = [weights[p].detach() for p in self.sources]
        kept = self._kept
        if kept is None or not all(map(_is_equal, read, kept[0])):
            kept = [x.clone() for x in read], fold(self.recipe.program, [*weights], BACKEND)
            self._kept = kept
        return kept[1]

    def __reduce__(self) -> Any:
        return Folded, self._made_for


def is_frozen(module: nn.Module) -> bool:
    """Whether a module runs in evaluation and without gradients."""
    return not (module.training or torch.is_grad_enabled() or is_recorded())


def are_values_known(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are parameters on the CPU.

    The tensor of a transform has no values to compare. Those on another device do, but the processor would
    wait for it, and a CUDA graph cannot be captured then.
    """
    return all(type(x) is nn.Parameter and x.device.type == "cpu" for x in tensors)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
