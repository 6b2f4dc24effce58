"""Tensor networks: the index names of the operands, and the sizes of the indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, TypeAlias, TypeVar

from mumoe_tensor.formats.base import BATCH, Format, Rank, mode_names

Indices: TypeAlias = tuple[str, ...]
#: A contraction order: nested pairs of operand positions.
Tree: TypeAlias = "int | tuple[Tree, Tree]"
#: An index, by its name or as a bit.
Axis = TypeVar("Axis", str, int)


class Reading(NamedTuple):
    """How a network reads a vector of shape (batch, size of the mode).

    Attributes
    ----------
    window : tuple of int, optional
        Start and stop of the entries, if only some are read.
    is_summed : bool
        Whether the sum of the entries is read, as a single number.
    padding : int
        Number of zeros to append.
    """

    window: tuple[int, int] | None = None
    is_summed: bool = False
    padding: int = 0


@dataclass(frozen=True)
class Network:
    """The operands of a contraction and their sizes, except the batch size.

    Parameters
    ----------
    operands : tuple of tuple of str
        Axes of each operand, in the order of the array that is passed.
    memory_orders : tuple of tuple of str
        The same axes in memory order, slowest first.
    output : tuple of str
        Axes of the result.
    index_sizes : tuple of (str, int)
        Size of every index except the batch. With `bias` the input mode includes the bias row.
    weights : int
        Number of weights, which come first. The other operands are vectors, one per mode.
    bias : bool
        Whether the last row of the input mode of the weights is a bias, which is added to the product with
        the input vector. The input vector is then one entry shorter than the mode.
    readings : tuple of Reading
        One reading per vector.
    out_features : int or None
        Size of a split output, whose parts are joined into one axis at the end.
    """

    operands: tuple[Indices, ...]
    memory_orders: tuple[Indices, ...]
    output: Indices
    index_sizes: tuple[tuple[str, int], ...]
    weights: int
    bias: bool = False
    readings: tuple[Reading, ...] = ()
    out_features: int | None = None

    @cached_property
    def takes_input(self) -> bool:
        """Whether there is an input vector; a bias term has none."""
        return any(x[0] == "i" for axes in self.operands[self.weights :] for x in axes)

    @cached_property
    def vector_of_input(self) -> int | None:
        """Position of the input vector, the last operand of a forward pass."""
        return len(self.operands) - 1 if self.takes_input else None

    @cached_property
    def squeezed(self) -> Network:
        """The same network without indices of size one, which do not affect the contraction."""
        return self.without({x for x, size in self.index_sizes if size == 1})

    def sizes_at(self, batch: int) -> dict[str, int]:
        """Size of every index, the batch first."""
        return {BATCH: batch, **dict(self.index_sizes)}

    def without(self, indices: set[str]) -> Network:
        """The same network without some indices."""

        def drop(axes: Indices) -> Indices:
            return tuple(x for x in axes if x not in indices)

        return replace(
            self,
            operands=tuple(map(drop, self.operands)),
            memory_orders=tuple(map(drop, self.memory_orders)),
            output=drop(self.output),
        )

    def with_vectors(
        self, vectors: Sequence[tuple[Indices, Reading]], output: Indices, bias: bool = False
    ) -> Network:
        """The network of a weight with vectors attached to some of its modes."""
        operands = tuple(axes for axes, _ in vectors)
        return replace(
            self,
            operands=self.operands + operands,
            memory_orders=self.memory_orders + operands,
            output=output,
            bias=bias,
            readings=tuple(reading for _, reading in vectors),
        )


def weight_network(
    format: Format, mode_sizes: tuple[int, ...], rank: Rank | None, missing: Sequence[int] = ()
) -> Network:
    """The network of the weight tensor of a single term, contracted to its modes or their parts.

    The input mode in `mode_sizes` includes any bias row. `missing` contains the positions of optional factors
    that are missing.
    """
    num_levels = len(mode_sizes) - 2
    factors = [f for k, f in enumerate(format.declaration(num_levels)) if k not in missing]
    present = {x for f in factors for x in f.indices}
    return Network(
        operands=tuple(f.indices for f in factors),
        memory_orders=tuple(f.memory_order for f in factors),
        output=tuple(x for x in format.modes(num_levels) if x in present),
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
    """The network of the forward pass: the weight with a batch of vectors on every mode but the output.

    A bias term has no input vector.
    """
    weight = weight_network(format, mode_sizes, rank, missing)
    *attached, _ = mode_names(len(mode_sizes) - 2)
    each = [vector_of(format, weight, mode, level, mode_sizes) for level, mode in enumerate(attached)]
    vectors = [((BATCH, *axes), reading) for axes, reading in filter(None, each)]
    outputs = format.parts("o")
    output = ((BATCH,) if vectors else ()) + outputs
    network = weight.with_vectors(vectors, output, bias)
    return network if outputs == ("o",) else replace(network, out_features=mode_sizes[-1])


def forward_networks(
    format: Format,
    mode_sizes: tuple[int, ...],
    rank: Rank | None,
    missing: Sequence[int] = (),
    bias: bool = False,
) -> tuple[Network, ...]:
    """The network of each term of a weight; see `forward_network`."""
    row = bias and not format.has_bias_term
    return tuple(
        forward_network(term.format, term.mode_sizes, term.rank, term.positions(missing), row)
        for term in format.terms(mode_sizes, rank)
    )


def vector_of(
    format: Format, weight: Network, mode: str, level: int, mode_sizes: tuple[int, ...]
) -> tuple[Indices, Reading] | None:
    """Axes of the vector on a mode, without the batch, and its reading; None if the mode has no vector."""
    parts = format.parts(mode)
    if set(parts).isdisjoint(weight.output):
        return None if mode == "i" else ((), Reading(is_summed=True))
    window = format.window(level)
    size = mode_sizes[level] if window is None else window[1] - window[0]
    return parts, Reading(window, padding=format.held(mode, size) - size)


def is_read_in_place(kinds: Sequence[str]) -> bool:
    """Whether a matrix product reads an operand in place, given the kind of each axis in memory order.

    This is the case if the summed axes, the axes shared with the other operand and the result (which form a
    batch of products), and the remaining ("free") axes are each adjacent, and the shared axes are not
    innermost. If no axis is summed, the product is elementwise and reads any order.
    """
    runs = [kind for kind, _ in groupby(kinds)]
    return "summed" not in runs or (len(runs) == len(set(runs)) and runs[-1] != "shared")


def stack_of(axes: tuple[Axis, ...], kinds: Sequence[str], batch: Axis) -> tuple[Axis, ...]:
    """The axes along which an operand is read in place as a stack of matrices, all multiplied by one operand.

    These are the batch and the axes next to it, if the summed axes and the remaining axes follow and are each
    adjacent, and no axis is shared with the other operand. Otherwise the result is empty.
    """
    runs = [kind for kind, _ in groupby(kinds)]
    along = axes[: kinds.index("summed")] if runs == ["free", "summed", "free"] else ()
    return along if batch in along else ()
