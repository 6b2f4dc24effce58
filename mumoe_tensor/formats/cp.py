"""CP (canonical polyadic): a sum of R rank-one tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank
from mumoe_tensor.formats.registry import register


@register
class CP(Format):
    """``W[n.., i, o] = sum_r w[r] U1[n1, r] ... Ui[i, r] Uo[o, r]`` (Oldfield et al. 2024, section 3.1)."""

    name = "cp"
    title = "CP"
    container: str | None = "CPTensor"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor("r", optional=True), *(Factor(f"{m} r") for m in modes)]

    def reference_flops(self, mode_sizes: tuple[int, ...], rank: Rank) -> int:
        (r,) = rank
        return 2 * r * sum(mode_sizes) + r * (len(mode_sizes) - 2)

    def from_container(self, container: Any) -> list[Any]:
        return [container.weights, *container.factors]

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.cp_tensor import CPTensor

        return CPTensor((factors[0], list(factors[1:])))
