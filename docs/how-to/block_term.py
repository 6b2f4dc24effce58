"""Block-term decomposition: a sum of K Tucker terms, each with its own core and factors."""

from mumoe_tensor import Factor, Format, register


@register
class BlockTerm(Format):
    """For one level: core ``k r_n1 r_i r_o`` and factors ``n1 k r_n1``, ``i k r_i``, ``o k r_o``."""

    name = "block-term"
    title = "Block-term"

    def factors(self, modes):
        ranks = [f"r_{mode}" for mode in modes]
        core = Factor(" ".join(["k", *ranks]))
        others = [Factor(f"{mode} k {rank}") for mode, rank in zip(modes, ranks, strict=True)]
        return [core, *others]
