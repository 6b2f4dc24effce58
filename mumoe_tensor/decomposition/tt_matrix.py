"""TT-matrix: TensorLy's TT-SVD (Oseledets 2011, algorithm 1) over pairs of parts of input and output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mumoe_tensor.decomposition.alternating import fits
from mumoe_tensor.decomposition.kronecker import pair_parts
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.tt_matrix import TTMatrix


@fits.register(TTMatrix)
def tt_matrix(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """A single fit, whose error is at most sqrt(d - 1) times the smallest for d cores."""
    import tensorly.decomposition

    paired = pair_parts(format, dense)
    cores = [paired]
    if paired.ndim > 1:
        cores = tensorly.decomposition.tensor_train(paired, (1, *rank, 1)).factors
    shapes = format.shapes(dense.shape, [len(core) for core in cores[1:]])
    yield [core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)]
