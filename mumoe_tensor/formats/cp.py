"""CP (canonical polyadic): a sum of R rank-one tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from mumoe_tensor.formats.base import Factor, Format, Rank, Tree, stop_rule
from mumoe_tensor.formats.registry import register


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
        # Alternating least squares (Kolda and Bader 2009, figure 3.3) with a line search.
        import numpy as np
        from tensorly.base import unfold
        from tensorly.decomposition import parafac
        from tensorly.tenalg.svd import svd_interface

        (r,) = rank
        for k, generator in enumerate(generators):
            start = [generator.standard_normal((n, r)) for n in dense.shape]
            if k == 0:
                for mode, factor in enumerate(start):
                    matrix = unfold(dense, mode)
                    width = min(r, *matrix.shape)
                    factor[:, :width] = svd_interface(matrix, n_eigenvecs=width)[0]
            if k == 1:
                start = pencil_start(dense, r, generator) or start
            stop = stop_rule(tolerance)

            def callback(cp: Any, error: float, start: list[Any] = start, stop: Any = stop) -> bool:
                start[:] = cp.factors
                return stop(cp, error)

            # So small a ridge does not show, but keeps components that vanish or coincide from making a solve
            # singular; should one be, go on with more. (TensorLy calls back only if tol is not zero.)
            for ridge in (1e-14, 1e-11, 1e-8):
                options = {"l2_reg": ridge, "linesearch": True, "callback": callback}
                with suppress(np.linalg.LinAlgError):
                    parafac(dense, r, n_iter, init=(None, start), tol=1e-300, **options)
                    break
            yield [None, *start]


def pencil_start(dense: Any, r: int, generator: Any) -> list[Any]:
    """Factors from the eigenvectors of two random mixtures of slices (Leurgans et al. 1993).

    Exact where the tensor has rank r and two of its modes have r entries or more: there ALS alone gets
    stuck when the others are few. None where the eigenvectors are not real.
    """
    import numpy as np
    from tensorly.base import unfold
    from tensorly.tenalg import multi_mode_dot
    from tensorly.tenalg.svd import svd_interface

    *others, p, q = sorted(range(dense.ndim), key=lambda mode: dense.shape[mode])
    if not others or dense.shape[p] < r:
        return []
    bases = [svd_interface(unfold(dense, mode), n_eigenvecs=r)[0] for mode in (p, q)]
    slices = multi_mode_dot(dense, bases, modes=[p, q], transpose=True).transpose(*others, p, q)
    a, b = np.tensordot(generator.standard_normal((2, *slices.shape[:-2])), slices, dense.ndim - 2)
    try:
        values, left = np.linalg.eig(a @ np.linalg.inv(b))
        right = np.linalg.inv(left) @ b
        # slice = left @ diag(terms) @ right for every slice
        terms = np.einsum("ri,...ij,jr->...r", np.linalg.inv(left), slices, np.linalg.inv(right))
    except np.linalg.LinAlgError:
        return []
    if np.iscomplexobj(values):
        return []
    factors = {p: bases[0] @ left, q: bases[1] @ right.T}
    for k, mode in enumerate(others):
        rows = np.moveaxis(terms, k, 0).reshape(dense.shape[mode], -1, r)
        factors[mode] = np.einsum("nmr,mr->nr", rows, generator.standard_normal(rows.shape[1:]))
    return [factors[mode] for mode in range(dense.ndim)]
