"""A tensor network to contract: index names of the operands, sizes of the indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, TypeAlias, TypeVar

from mumoe_tensor.formats.base import BATCH, Format, Rank, mode_names

Indices: TypeAlias = tuple[str, ...]
#: An order of contraction: nested pairs of positions of operands.
Tree: TypeAlias = "int | tuple[Tree, Tree]"
#: Name of an index, or the bit that stands for it.
Axis = TypeVar("Axis", str, int)


class Reading(NamedTuple):
    """What a network takes of a vector of shape (batch, size of the mode).

    Attributes
    ----------
    window : tuple of int, optional
        Start and stop of the entries, where it takes some of them only.
    is_summed : bool
        Whether it takes the sum of the entries, as one number.
    padding : int
        Number of zeros after the last entry.
    """

    window: tuple[int, int] | None = None
    is_summed: bool = False
    padding: int = 0


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
    readings : tuple of Reading
        One a vector.
    out_features : int or None
        Size of a split output, whose parts are joined to one axis in the end.
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
        """Whether it has an input vector: that of a bias has none."""
        return any(x[0] == "i" for axes in self.operands[self.weights :] for x in axes)

    @cached_property
    def vector_of_input(self) -> int | None:
        """Position of the input vector, the last operand of a forward pass."""
        return len(self.operands) - 1 if self.takes_input else None

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

    def with_vectors(
        self, vectors: Sequence[tuple[Indices, Reading]], output: Indices, bias: bool = False
    ) -> Network:
        """The network of a weight with vectors on some of its modes."""
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
    """Network of the weight tensor itself, contracted to those modes, or their parts, that it has.

    Parameters
    ----------
    format : Format
        One of a single term. Its declaration gives the operands.
    mode_sizes : tuple of int
        Sizes of the modes; with a bias the input mode counts its row.
    rank : tuple of int
    missing : sequence of int
        Positions of the optional factors that are missing.
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
    """Network of the forward pass: the weight with a batch of vectors on every mode but the output.

    A weight that is a bias alone has no input vector.
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
    """Axes of the vector on a mode, besides the batch, and what is taken of it; None where none is."""
    parts = format.parts(mode)
    if set(parts).isdisjoint(weight.output):
        return None if mode == "i" else ((), Reading(is_summed=True))
    window = format.window(level)
    size = mode_sizes[level] if window is None else window[1] - window[0]
    return parts, Reading(window, padding=format.held(mode, size) - size)


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


def stack_of(axes: tuple[Axis, ...], kinds: Sequence[str], batch: Axis) -> tuple[Axis, ...]:
    """The axes along which an operand is read in place as a stack of matrices, all for one other operand.

    Those of the batch and next to it, where the axes that the product sums, and the rest, come after them and
    each lie together, and it shares none with the other operand. Otherwise none.
    """
    runs = [kind for kind, _ in groupby(kinds)]
    along = axes[: kinds.index("summed")] if runs == ["free", "summed", "free"] else ()
    return along if batch in along else ()
