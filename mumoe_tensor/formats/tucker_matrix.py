"""Tucker with split input and output, as in tensorized layers."""

from __future__ import annotations

from mumoe_tensor.formats.registry import register
from mumoe_tensor.formats.tucker import Tucker


@register
class TuckerMatrix(Tucker):
    """`Tucker` with a factor for each part of the input and of the output (Kossaifi et al. 2020)."""

    name = "tucker-matrix"
    title = "Tucker-matrix"
    container = None
    splits = {"i": 2, "o": 2}
