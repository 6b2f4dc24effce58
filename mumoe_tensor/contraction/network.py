"""A tensor network to contract: index names of the operands, sizes of the indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mumoe_tensor.formats.base import BATCH, Format, Rank, mode_names

Indices = tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """Operands of a contraction, everything but the size of the batch.

    Parameters
    ----------
    operands : tuple of tuple of str
        Axes of each operand as it is handed over.
    storage : tuple of tuple of str
        The same axes in memory order, slowest first.
    output : tuple of str
        Axes of the result.
    sizes : tuple of (str, int)
        Size of every index except the batch. With `bias` the input mode counts the bias row.
    weights : int
        How many of the first operands are weights; the others are vectors with a batch.
    bias : bool
        True if the input vector is one shorter than the input mode of the weights, whose last row is the
        bias: the row is added, the vector never grows.
    """

    operands: tuple[Indices, ...]
    storage: tuple[Indices, ...]
    output: Indices
    sizes: tuple[tuple[str, int], ...]
    weights: int
    bias: bool = False

    @property
    def vector_of_input(self) -> int | None:
        """Position of the input vector, the last operand of a forward pass."""
        return len(self.operands) - 1 if len(self.operands) > self.weights else None

    @cached_property
    def squeezed(self) -> Network:
        """The same network without the indices of size one: a contraction has no use for them."""
        ones = {x for x, size in self.sizes if size == 1}

        def drop(indices: Indices) -> Indices:
            return tuple(x for x in indices if x not in ones)

        return replace(
            self,
            operands=tuple(map(drop, self.operands)),
            storage=tuple(map(drop, self.storage)),
            output=drop(self.output),
        )


def weight_network(
    format: Format, modes: tuple[int, ...], rank: Rank | None, ones: Sequence[int] = ()
) -> Network:
    """Network of the weight tensor itself, contracted to ``n1 ... nE i o``.

    Parameters
    ----------
    format : Format
        Its declaration gives the operands.
    modes : tuple of int
        Sizes of the modes; with a bias the input mode counts its row.
    rank : tuple of int
    ones : sequence of int
        Positions of the factors that are all ones and take no part.
    """
    names = mode_names(len(modes) - 2)
    factors = [f for k, f in enumerate(format.declaration(len(modes) - 2)) if k not in ones]
    return Network(
        operands=tuple(f.indices for f in factors),
        storage=tuple(f.memory_order for f in factors),
        output=names,
        sizes=tuple(format.index_sizes(modes, rank).items()),
        weights=len(factors),
    )


def forward_network(
    format: Format, modes: tuple[int, ...], rank: Rank | None, ones: Sequence[int] = (), bias: bool = False
) -> Network:
    """Network of the forward pass: the weight with a batch of vectors on every mode but the output."""
    weight = weight_network(format, modes, rank, ones)
    *attached, o = weight.output
    vectors = tuple((BATCH, mode) for mode in attached)
    return Network(
        operands=weight.operands + vectors,
        storage=weight.storage + vectors,
        output=(BATCH, o),
        sizes=weight.sizes,
        weights=weight.weights,
        bias=bias,
    )
