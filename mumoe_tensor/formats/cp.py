"""CP (canonical polyadic): a sum of R rank-one tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank, Tree, register, stop_rule


@register
class CP(Format):
    """``W[n.., i, o] = sum_r w[r] U1[n1, r] ... Ui[i, r] Uo[o, r]`` (Oldfield et al. 2024, section 3.1)."""

    name = "cp"
    title = "CP"
    container = "CPTensor"

    def factors(self, modes: tuple[str, ...]) -> list[Factor]:
        return [Factor("r", unit=True), *(Factor(f"{m} r") for m in modes)]

    def reference_path(self, levels: int) -> Tree:
        # Project every vector, multiply elementwise, then the output factor.
        tree: Tree = ("i", levels + 1)
        for e in range(levels, 0, -1):
            tree = ((f"n{e}", e), tree)
        return (tree, levels + 2)

    def reference_flops(self, sizes: tuple[int, ...], rank: Rank) -> int:
        (r,) = rank
        return 2 * r * sum(sizes) + r * (len(sizes) - 2)

    def from_container(self, container: Any) -> list[Any]:
        return [container.weights, *container.factors]

    def to_container(self, factors: Sequence[Any], tl: Any) -> Any:
        from tensorly.cp_tensor import CPTensor

        return CPTensor((factors[0], list(factors[1:])))

    def decompose(
        self, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
    ) -> Iterator[list[Any]]:
        # Alternating least squares (Kolda and Bader 2009, figure 3.3).
        from tensorly.base import unfold
        from tensorly.decomposition import parafac
        from tensorly.tenalg.svd import svd_interface

        # With more components than this the normal equations are singular, and nothing is to be gained.
        r = min(rank[0], dense.size // max(dense.shape))
        for k, generator in enumerate(generators):
            start = [generator.standard_normal((n, r)) for n in dense.shape]
            if k == 0:
                for mode, factor in enumerate(start):
                    matrix = unfold(dense, mode)
                    width = min(r, *matrix.shape)
                    factor[:, :width] = svd_interface(matrix, n_eigenvecs=width)[0]
            # So small a ridge does not show, but keeps components that vanish from making a solve singular.
            fit = parafac(
                dense, r, n_iter, init=(None, start), tol=0, l2_reg=1e-14, callback=stop_rule(tolerance)
            )
            yield [None, *fit.factors]
