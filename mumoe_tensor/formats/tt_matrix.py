"""TT-matrix (BlockTT): a chain of cores, each with a part of the input and a part of the output."""

from __future__ import annotations

from mumoe_tensor.formats.base import Factor, Format, Rank, by_kind
from mumoe_tensor.formats.registry import register


@register
class TTMatrix(Format):
    """``W[n.., i, o] = U1[n1, :] ... A1[:, i1, o1, :] A2[:, i2, o2, :] ...`` (Oseledets 2010)."""

    name = "tt-matrix"
    title = "TT-matrix"
    splits = {"i": 2, "o": 2}

    def default_rank(self, mode_sizes: tuple[int, ...], t: int) -> Rank:
        parts = 2 * len(self.parts("i"))
        return (*(4,) * (len(mode_sizes) - parts), *(t,) * (parts // 2 - 1))

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        experts, inputs, outputs = by_kind(modes)
        pairs = list(zip(inputs, outputs, strict=True))
        count = len(experts) + len(pairs)
        bonds = ["", *(f"b{k}" for k in range(1, count)), ""]
        factors = [Factor(f"{bonds[k]} {n} {bonds[k + 1]}") for k, n in enumerate(experts)]
        # The input is first multiplied by the last core. Each result is a matrix, the input of the next core.
        for k, (i, o) in enumerate(pairs, start=len(experts)):
            before, after = bonds[k : k + 2]
            order = f"{before} {o} {i} {after}" if after else f"{i} {before} {o}"
            factors.append(Factor(f"{before} {i} {o} {after}", order))
        return factors
