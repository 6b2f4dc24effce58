"""All layers of two factors (Potapczynski et al. 2024, arXiv 2410.02117), with experts on their bond."""

from mumoe_tensor import Factor, Format, register
from mumoe_tensor.formats import by_kind


@register
class TwoFactor(Format):
    """``W[n.., i, o] = sum_r U1[n1, r] ... A[i1, i3, r, o1, o3] B[o1, i1, r, i2, o2]``.

    The first part of the input and of the output is in both factors, the second in B, the third in A.
    """

    name = "two-factor"
    title = "Two factors"
    splits = {"i": 3, "o": 3}

    def factors(self, modes):
        experts, (i1, i2, i3), (o1, o2, o3) = by_kind(modes)
        bonds = [Factor(f"{n} r") for n in experts]
        return [*bonds, Factor(f"{i1} {i3} r {o1} {o3}"), Factor(f"{o1} {i1} r {i2} {o2}")]
