"""Dense: the weight tensor itself, as in a soft mixture of experts. A baseline and test reference."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank
from mumoe_tensor.formats.registry import register


@register
class Dense(Format):
    """``W[n.., i, o]``, with a separate matrix for each expert."""

    name = "dense"
    title = "Dense"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor(" ".join(modes))]

    def reference_flops(self, mode_sizes: tuple[int, ...], rank: Rank) -> int:
        *experts, _, o = mode_sizes
        return 2 * (prod(mode_sizes) + sum(prod(experts[: e + 1]) * o for e in range(len(experts))))

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        return factors[0]
