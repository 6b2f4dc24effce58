"""CP with split input and output, as in tensorized layers."""

from __future__ import annotations

from mumoe_tensor.formats.cp import CP
from mumoe_tensor.formats.registry import register


@register
class CPMatrix(CP):
    """`CP` with a factor for each part of the input and of the output (Kossaifi et al. 2020)."""

    name = "cp-matrix"
    title = "CP-matrix"
    container = None
    splits = {"i": 2, "o": 2}
