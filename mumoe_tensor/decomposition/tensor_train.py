"""Tensor Train: TensorLy's TT-SVD (Oseledets 2011, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mumoe_tensor.decomposition.alternating import fits
from mumoe_tensor.decomposition.terms import split
from mumoe_tensor.formats.base import Format, Rank
from mumoe_tensor.formats.tensor_train import TensorTrain


@fits.register(TensorTrain)
def tensor_train(
    format: Format, dense: Any, rank: Rank, generators: Sequence[Any], n_iter: int, tolerance: float
) -> Iterator[list[Any]]:
    """A single fit, whose error is at most sqrt(E + 1) times the smallest."""
    import tensorly.decomposition

    yield format.from_container(tensorly.decomposition.tensor_train(split(format, dense), (1, *rank, 1)))
