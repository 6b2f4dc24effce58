"""A tensor network to contract: index names of the operands, sizes of the indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TypeAlias

from mumoe_tensor.formats.base import BATCH, Format, Rank, mode_names

Indices: TypeAlias = tuple[str, ...]
#: An order of contraction: nested pairs of positions of operands.
Tree: TypeAlias = "int | tuple[Tree, Tree]"


@dataclass(frozen=True)
class Network:
    """Operands of a contraction, everything but the size of the batch.

    Parameters
    ----------
    operands : tuple of tuple of str
        Axes of each operand as it is passed.
    memory_orders : tuple of tuple of str
        The same axes in memory order, slowest first.
    output : tuple of str
        Axes of the result.
    index_sizes : tuple of (str, int)
        Size of every index except the batch. With `bias` the input mode counts the bias row.
    weights : int
        How many of the first operands are weights; the others are vectors, one a mode.
    bias : bool
        True if the input vector is one shorter than the input mode of the weights, whose last row is the
        bias: the row is added, the vector never grows.
    """

    operands: tuple[Indices, ...]
    memory_orders: tuple[Indices, ...]
    output: Indices
    index_sizes: tuple[tuple[str, int], ...]
    weights: int
    bias: bool = False

    @property
    def vector_of_input(self) -> int | None:
        """Position of the input vector, the last operand of a forward pass."""
        return len(self.operands) - 1 if len(self.operands) > self.weights else None

    @cached_property
    def squeezed(self) -> Network:
        """The same network without the indices of size one, which have no effect on a contraction."""
        return self.without({x for x, size in self.index_sizes if size == 1})

    def sizes_at(self, batch: int) -> dict[str, int]:
        """Size of every index, the batch first."""
        return {BATCH: batch, **dict(self.index_sizes)}

    def without(self, indices: set[str]) -> Network:
        """The network of the operands without some of their axes."""

        def drop(axes: Indices) -> Indices:
            return tuple(x for x in axes if x not in indices)

        return replace(
            self,
            operands=tuple(map(drop, self.operands)),
            memory_orders=tuple(map(drop, self.memory_orders)),
            output=drop(self.output),
        )

    def with_vectors(self, vectors: Sequence[Indices], output: Indices, bias: bool = False) -> Network:
        """The network of a weight with vectors on some of its modes."""
        return replace(
            self,
            operands=self.operands + tuple(vectors),
            memory_orders=self.memory_orders + tuple(vectors),
            output=output,
            bias=bias,
        )


def weight_network(
    format: Format, mode_sizes: tuple[int, ...], rank: Rank | None, missing: Sequence[int] = ()
) -> Network:
    """Network of the weight tensor itself, contracted to ``n1 ... nE i o``.

    Parameters
    ----------
    format : Format
        Its declaration gives the operands.
    mode_sizes : tuple of int
        Sizes of the modes; with a bias the input mode counts its row.
    rank : tuple of int
    missing : sequence of int
        Positions of the optional factors that are missing.
    """
    factors = [f for k, f in enumerate(format.declaration(len(mode_sizes) - 2)) if k not in missing]
    return Network(
        operands=tuple(f.indices for f in factors),
        memory_orders=tuple(f.memory_order for f in factors),
        output=mode_names(len(mode_sizes) - 2),
        index_sizes=tuple(format.index_sizes(mode_sizes, rank).items()),
        weights=len(factors),
    )


def forward_network(
    format: Format,
    mode_sizes: tuple[int, ...],
    rank: Rank | None,
    missing: Sequence[int] = (),
    bias: bool = False,
) -> Network:
    """Network of the forward pass: the weight with a batch of vectors on every mode but the output."""
    weight = weight_network(format, mode_sizes, rank, missing)
    *attached, o = weight.output
    return weight.with_vectors([(BATCH, mode) for mode in attached], (BATCH, o), bias)


def is_read_in_place(kinds: Sequence[str]) -> bool:
    """Whether a matrix product reads an operand as it lies in memory, without a copy.

    It does where the axes that it sums, those it shares with the other operand and the result, and the rest
    each lie together, and those it shares, along which it is a stack of products, are not innermost.

    Parameters
    ----------
    kinds : sequence of {"summed", "shared", "free"}
        Kind of each axis, in memory order. Where none is summed the product is elementwise, and reads any.
    """
    runs = [kind for kind, _ in groupby(kinds)]
    return "summed" not in runs or (len(runs) == len(set(runs)) and runs[-1] != "shared")
