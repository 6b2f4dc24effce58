"""A shared expert: one dense matrix for all experts, plus a difference for each expert."""

from __future__ import annotations

from mumoe_tensor.formats.registry import AnyFormat, label, register
from mumoe_tensor.formats.sums import Sum, shared


@register
class SharedExpert(Sum):
    """``W[n.., i, o] = W0[i, o] + D[n.., i, o]``, with the differences D in another format (default CP)."""

    name = "shared-expert"

    def __init__(self, format: AnyFormat = "cp"):
        super().__init__([shared("dense"), format])
        self.format = self.formats[-1]

    def __repr__(self) -> str:
        return f"SharedExpert({label(self.format)!r})"
