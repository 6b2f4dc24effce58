"""Compile a contraction order into a program: the axes that each product groups, and their memory order.

Every step is one matrix product (``mm``), one batched matrix product (``bmm``) or one elementwise product
with broadcasting (``mul``). A product reads an operand without copying it if three groups of axes are each
adjacent in memory: those that it sums, those that it keeps, and those shared with the other operand and the
result. An operand can also be a stack of matrices along the batch, all multiplied by the other operand; then
this must hold within a matrix. `Compiler` chooses which operand comes first in each product, and thereby the
memory order of every intermediate, so that as few elements as possible are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import prod
from typing import Literal, NamedTuple

from mumoe_tensor.contraction.network import Indices, Network, Reading, Tree, is_read_in_place, stack_of
from mumoe_tensor.formats.base import BATCH

Kind = Literal["mm", "bmm", "mul"]

#: Number of memory orders of an intermediate that the search keeps, the cheapest ones.
KEPT_ORDERS = 4
#: The time of a small product in a batch of products, in copied elements.
SMALL_PRODUCT = 256


@dataclass(frozen=True)
class Operand:
    """How a step reads one of its operands.

    Attributes
    ----------
    position : int
        Position of the operand in the network, or ``len(operands) + k`` for the result of step k.
    indices : tuple of str
        Its axes in memory order.
    copy_order : tuple of int or None
        Permutation for a copy, needed if axes that the product groups are not adjacent.
    groups : tuple of tuple of str
        The axes after this copy, grouped into the axes of the view.
    shape : tuple of int or None
        Shape of the view, with -1 for the axis of the batch; None if the shape does not change.
    axes : tuple of int or None
        Permutation of the view to the order that the product needs; None if it has this order.
    """

    position: int
    indices: Indices
    copy_order: tuple[int, ...] | None
    groups: tuple[Indices, ...]
    shape: tuple[int, ...] | None
    axes: tuple[int, ...] | None
    #: Whether it is read without changes. Computed once, since every call reads it.
    is_bare: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        is_bare = self.copy_order is None and self.shape is None and self.axes is None
        object.__setattr__(self, "is_bare", is_bare)

    def is_reordered(self, sizes: dict[str, int]) -> bool:
        """Whether the product reads a permuted copy. Axes of size one may be at any position."""
        read = [x for group in self.groups for x in group if sizes[x] > 1]
        return self.copy_order is not None and read != [x for x in self.indices if sizes[x] > 1]

    def is_stored_anew(self, sizes: dict[str, int]) -> bool:
        """Whether the copy is a new array, instead of a permuted view that the product itself copies.

        This is the case if axes that are not adjacent must be joined.
        """
        if self.copy_order is None:
            return False
        order = [x for x in self.indices if sizes[x] > 1]
        for group in self.groups:
            axes = [x for x in group if sizes[x] > 1]
            if axes and order[order.index(axes[0]) :][: len(axes)] != axes:
                return True
        return False


@dataclass(frozen=True)
class Bias:
    """The bias row of a step: the last entry of an operand along the input mode.

    Attributes
    ----------
    side : int
        The operand that contains the bias row: 0 for the left one, 1 for the right one.
    axis : int
        The position of the input mode among the axes of this operand.
    order : tuple of int or None
        Permutation of the axes of the row to the order of the product.
    shape : tuple of int or None
        Shape in which the row is added to the product.
    """

    side: int
    axis: int
    order: tuple[int, ...] | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Step:
    """One pairwise product.

    Attributes
    ----------
    kind : {"mm", "bmm", "mul"}
    left, right : Operand
    output : tuple of str
        Axes of the result in memory order.
    summed : tuple of str
        Axes that the product sums over.
    shape : tuple of int or None
        Shape of the result, if the product leaves axes grouped.
    bias : Bias or None
        The bias row to add, in the product of the input vector with the weights.
    """

    kind: Kind
    left: Operand
    right: Operand
    output: Indices
    summed: Indices
    shape: tuple[int, ...] | None
    bias: Bias | None = None
    #: Whether the operands and the result need no view or copy, and there is no bias row.
    is_bare: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        bare = self.left.is_bare and self.right.is_bare and self.shape is None and self.bias is None
        object.__setattr__(self, "is_bare", bare)

    @property
    def is_spread(self) -> bool:
        """Whether one matrix is multiplied by each matrix of a stack."""
        return self.kind == "bmm" and () in (self.left.groups[0], self.right.groups[0])

    @property
    def indices(self) -> tuple[str, ...]:
        """All indices of the product."""
        return tuple(dict.fromkeys(self.left.indices + self.right.indices))


class Arrangement(NamedTuple):
    """The conversion of an array to an operand, or of the last result to the output.

    The conversions are applied in this order: reading, order, shape, size. Those not needed are None.

    Attributes
    ----------
    order : tuple of int or None
        Permutation of the axes.
    shape : tuple of int or None
        Shape after the permutation: axes of size one dropped or added, a mode split into parts or joined.
    reading : Reading or None
        Selection of entries of a vector, applied first.
    size : int or None
        Number of entries of the last axis to keep, applied last.
    """

    order: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    reading: Reading | None = None
    size: int | None = None


@dataclass(frozen=True)
class Program:
    """The steps of a contraction, in execution order, for any batch size.

    Attributes
    ----------
    network : Network
        The network that is contracted.
    arrange : tuple of Arrangement or None
        The conversion of each operand to memory order, without axes of size one; None if it needs none.
    steps : tuple of Step
    output : Arrangement or None
        The conversion of the last result to the output, with axes of size one.
    """

    network: Network
    arrange: tuple[Arrangement | None, ...]
    steps: tuple[Step, ...]
    output: Arrangement | None
    #: Each step with the position of its result. Results are numbered after the operands.
    numbered: tuple[tuple[int, Step], ...] = field(init=False, compare=False, repr=False)
    #: Position of the last result.
    result: int = field(init=False, compare=False, repr=False)
    #: Positions of the results that depend only on weights.
    constant: frozenset[int] = field(init=False, compare=False, repr=False)

    @property
    def output_is_copied(self) -> bool:
        """Whether the parts of a split output are out of order, so that joining them copies the output."""
        return (
            self.network.out_features is not None
            and self.output is not None
            and self.output.order is not None
        )

    def __post_init__(self) -> None:
        numbered = tuple(enumerate(self.steps, start=len(self.network.operands)))
        weights = set(range(self.network.weights))
        constant: set[int] = set()
        for position, step in numbered:
            if {step.left.position, step.right.position} <= weights | constant:
                constant.add(position)
        object.__setattr__(self, "numbered", numbered)
        object.__setattr__(self, "result", len(self.network.operands) + len(numbered) - 1)
        object.__setattr__(self, "constant", frozenset(constant))


class _Way(NamedTuple):
    """One way to multiply two nodes of a contraction order.

    Attributes
    ----------
    swapped : bool
        Whether the second node is the left operand of the product.
    orders : pair of tuple of str
        Axes of the left and of the right operand, in memory order.
    reads : pair of tuple of str
        The same axes in the order in which the product reads them.
    summed : tuple of str
        Axes that the product sums over.
    stacks : pair of tuple of str
        Axes along which each operand is a stack of matrices: axes of both operands and the result, or axes of
        only one operand, all of whose matrices are multiplied by the other operand.
    output : tuple of str
        Axes of the result in memory order.
    """

    swapped: bool
    orders: tuple[Indices, Indices]
    reads: tuple[Indices, Indices]
    summed: Indices
    stacks: tuple[Indices, Indices]
    output: Indices

    def out_of_order(self) -> list[Indices]:
        """Axes of the operands that are copied, or that an elementwise product reads out of order."""
        reads = self.reads if self.summed else (self.output, self.output)
        pairs = zip(self.orders, reads, strict=True)
        return [order for order, read in pairs if order != tuple(x for x in read if x in order)]

    def transposed(self) -> int:
        """Number of matrices read transposed. Each costs a call but no copy, and counts as one element."""
        if not self.summed:
            return 0
        left, right = self.reads
        return (left[-1] not in self.summed) + (right[-1] in self.summed)

    def repeated(self) -> Indices:
        """Axes along which one operand is multiplied by every matrix of the other."""
        one, other = self.stacks
        return () if one and other else one or other


class _Choice(NamedTuple):
    """The cheapest way to form a node in some memory order; None for an operand of the network."""

    copied: int
    way: _Way | None


class Compiler:
    """Chooses the memory order of every intermediate, for contraction orders of one network.

    Choices are cached by node, so orders with common nodes share them.

    Parameters
    ----------
    network : Network
    batch : int
        Batch size for which copied elements are counted.
    """

    def __init__(self, network: Network, batch: int):
        self.original, self.network = network, network.squeezed
        self.sizes = network.sizes_at(batch)
        self.choices: dict[Tree, dict[Indices, _Choice]] = {
            k: {order: _Choice(0, None)} for k, order in enumerate(self.network.memory_orders)
        }

    def __call__(self, tree: Tree) -> Program:
        """The program for a contraction order, given as nested pairs of operand positions."""
        # A program consists of: 1. the conversion of each operand to memory order; 2. the steps, up to a
        # result in the memory order with the fewest copies; 3. the conversion of this result to the output.
        original, network = self.original, self.network
        readings = (*(None,) * original.weights, *original.readings)
        axes = zip(original.operands, original.memory_orders, network.memory_orders, readings, strict=True)
        self._choose(tree)
        last, size = self.choices[tree], self._size(network.output)
        order = min(last, key=lambda o: last[o].copied + (size if o != network.output else 0))
        return Program(
            network=original,
            arrange=tuple(_arranged(*each, original) for each in axes),
            steps=tuple(self._steps(tree, order)),
            output=_output(order, network.output, original),
        )

    def _choose(self, node: Tree) -> frozenset[int]:
        """Fill in the choices of a node, and return the operands of its subtree."""
        if not isinstance(node, tuple):
            return frozenset([node])
        left, right = node
        operands = self._choose(left) | self._choose(right)
        if node not in self.choices:
            others = (o for k, o in enumerate(self.network.operands) if k not in operands)
            needed = frozenset(self.network.output).union(*others)
            best: dict[Indices, _Choice] = {}
            for left_order, left_choice in self.choices[left].items():
                for right_order, right_choice in self.choices[right].items():
                    for way, copies, calls, repeated in _ways(left_order, right_order, needed):
                        copied = left_choice.copied + right_choice.copied + calls
                        copied += sum(map(self._size, copies))
                        if repeated:
                            copied += SMALL_PRODUCT * self._size(repeated)
                        if way.output not in best or copied < best[way.output].copied:
                            best[way.output] = _Choice(copied, way)
            cheapest = sorted(best, key=lambda order: best[order].copied)[:KEPT_ORDERS]
            self.choices[node] = {order: best[order] for order in cheapest}
        return operands

    def _steps(self, tree: Tree, order: Indices) -> list[Step]:
        """The chosen products. Of two branches, the one that keeps the peak lower is computed first."""
        steps: list[Step] = []

        def size(node: Tree) -> int:
            return self._size(next(iter(self.choices[node]))) if isinstance(node, tuple) else 0

        @cache
        def peak(node: Tree) -> int:
            if not isinstance(node, tuple):
                return 0
            first, second = by_peak(node)
            return max(peak(first), size(first) + peak(second), size(first) + size(second) + size(node))

        @cache
        def has_input(node: Tree) -> bool:
            branches = node if isinstance(node, tuple) else ()
            return node == self.network.vector_of_input or any(map(has_input, branches))

        def by_peak(node: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
            # The first result is in memory while the second is formed. On a tie, the input vector comes
            # first, so that its memory can be released earlier.
            def held(pair: tuple[Tree, Tree]) -> tuple[int, bool]:
                first, second = pair
                return max(peak(first), size(first) + peak(second)), not has_input(first)

            return min(node, node[::-1], key=held)

        def visit(node: Tree, order: Indices) -> int:
            if not isinstance(node, tuple):
                return node
            way = self.choices[node][order].way
            assert way is not None  # every node except an operand has one
            branches = node[::-1] if way.swapped else node
            orders = dict(zip(branches, way.orders, strict=True))
            positions = {branch: visit(branch, orders[branch]) for branch in by_peak(node)}
            steps.append(_step(self.network, way, positions[branches[0]], positions[branches[1]]))
            return len(self.network.operands) + len(steps) - 1

        visit(tree, order)
        return steps

    def _size(self, order: Indices) -> int:
        return prod(self.sizes[x] for x in order)


@lru_cache(maxsize=65_536)
def _ways(
    first: Indices, second: Indices, needed: frozenset[str]
) -> tuple[tuple[_Way, list[Indices], int, Indices], ...]:
    """Ways to multiply two nodes in these memory orders, with the copies, transposes and repeats of each."""
    ways = [*_products(False, first, second, needed), *_products(True, second, first, needed)]
    return tuple((way, way.out_of_order(), way.transposed(), way.repeated()) for way in ways)


def _products(swapped: bool, a: Indices, b: Indices, needed: frozenset[str]) -> Iterator[_Way]:
    common = [x for x in a if x in b]
    summed = tuple(x for x in common if x not in needed)
    shared = tuple(x for x in common if x in needed)
    a_only, b_only = tuple(x for x in a if x not in b), tuple(x for x in b if x not in a)
    if not summed:
        for output in dict.fromkeys((a + b_only, b_only + a)):
            yield _Way(swapped, (a, b), (a, b), summed, ((), ()), output)
        return

    def matrices(
        a_read: Indices, b_read: Indices, summed: Indices, a_stack: Indices, b_stack: Indices
    ) -> _Way:
        along = a_stack or b_stack
        output = along + tuple(x for x in a_only + b_only if x not in along)
        return _Way(swapped, (a, b), (a_read, b_read), summed, (a_stack, b_stack), output)

    a_kinds, b_kinds = (
        ["summed" if x in summed else "shared" if x in shared else "free" for x in order] for order in (a, b)
    )
    b_summed, b_shared = tuple(x for x in b if x in summed), tuple(x for x in b if x in shared)
    a_in_place, b_in_place = is_read_in_place(a_kinds), is_read_in_place(b_kinds)
    # One operand is a stack of matrices, each of which is multiplied by the other operand.
    if along := stack_of(a, a_kinds, BATCH):
        yield matrices(a, b if b_in_place and summed == b_summed else b_only + summed, summed, along, ())
    if along := stack_of(b, b_kinds, BATCH):
        yield matrices(a if a_in_place and summed == b_summed else a_only + b_summed, b, b_summed, (), along)
    # Both are read in place, one is copied into the order of the other, or both are copied.
    if a_in_place and b_in_place and summed == b_summed and shared == b_shared:
        yield matrices(a, b, summed, shared, shared)
        return
    if b_in_place:
        yield matrices(b_shared + a_only + b_summed, b, b_summed, b_shared, b_shared)
    if a_in_place:
        yield matrices(a, shared + b_only + summed, summed, shared, shared)
    if not a_in_place and not b_in_place:
        yield matrices(shared + a_only + summed, shared + b_only + summed, summed, shared, shared)


def _arranged(
    order: Indices, permuted: Indices, squeezed: Indices, reading: Reading | None, network: Network
) -> Arrangement | None:
    """The conversion of an operand to its memory order, without axes of size one; a vector is also read."""
    sizes = network.sizes_at(-1)
    is_split = reading is not None and len(order) > 2
    shape = tuple(sizes[x] for x in squeezed) if squeezed != permuted or is_split else None
    arrangement = Arrangement(_permutation(order, permuted), shape, None if reading == Reading() else reading)
    return None if arrangement == Arrangement() else arrangement


def _output(order: Indices, permuted: Indices, network: Network) -> Arrangement | None:
    """The conversion of the last result to the output, with axes of size one; a split output is joined."""
    sizes, shape, size = network.sizes_at(-1), None, None
    if network.out_features is not None:
        batch, parts = network.output[:1], network.output[1:]
        if batch != (BATCH,):
            batch, parts = (), network.output
        whole = prod(sizes[x] for x in parts)
        shape = (*(-1 for _ in batch), whole)
        size = None if whole == network.out_features else network.out_features
    elif permuted != network.output:
        shape = tuple(sizes[x] for x in network.output)
    arrangement = Arrangement(_permutation(order, permuted), shape, size=size)
    return None if arrangement == Arrangement() else arrangement


def _permutation(order: Indices, target: Indices) -> tuple[int, ...] | None:
    return None if order == target else tuple(order.index(x) for x in target)


def _step(network: Network, way: _Way, left: int, right: int) -> Step:
    sizes = network.sizes_at(-1)
    positions, orders, reads, output = (left, right), way.orders, way.reads, way.output
    if not way.summed:
        a, b = (_broadcast(p, o, output, sizes) for p, o in zip(positions, orders, strict=True))
        return Step("mul", a, b, output, (), None)

    side = None
    if network.bias and network.vector_of_input in positions:
        # This step multiplies the input vector by the weights, whose last row along the input mode is the
        # bias.
        side = 1 - positions.index(network.vector_of_input)
        sizes["i"] -= 1
    stacks, summed = way.stacks, way.summed
    along = stacks[0] or stacks[1]
    free = [tuple(x for x in read if x not in along + summed) for read in reads]
    wanted = ((stacks[0], free[0], summed), (stacks[1], summed, free[1]))
    a, b = (
        _matrix(p, o, r, w if along else w[1:], sizes)
        for p, o, r, w in zip(positions, orders, reads, wanted, strict=True)
    )
    bias = None
    if side is not None:
        row = tuple(x for x in orders[side] if x != "i")
        padded = (along, free[0], ()) if side == 0 else (along, (), free[1])
        groups = padded if along else padded[1:] if side == 0 else padded[2:]
        bias = Bias(
            side, orders[side].index("i"), _permutation(row, along + free[side]), _view(groups, sizes)
        )
    result = (along, *free) if along else tuple(free)
    return Step("bmm" if along else "mm", a, b, output, summed, _split(result, sizes), bias)


def _matrix(
    position: int, order: Indices, read: Indices, groups: tuple[Indices, ...], sizes: dict[str, int]
) -> Operand:
    """View an operand as a matrix, or a stack of matrices, whose axes are `groups`."""
    # An empty group is an axis of size one, which may be anywhere in memory and is put last. But a single
    # matrix that is multiplied by a stack is itself a stack of one.
    is_repeated = len(groups) == 3 and not groups[0]
    first, rest = (groups[:1], groups[1:]) if is_repeated else ((), groups)
    in_memory = first + tuple(sorted(rest, key=lambda g: read.index(g[0]) if g else len(read)))
    if tuple(g for g in groups if g) == tuple(g for g in in_memory if g):
        in_memory = groups
    axes = None if in_memory == groups else tuple(in_memory.index(g) for g in groups)
    return Operand(position, order, _permutation(order, read), in_memory, _view(in_memory, sizes), axes)


def _broadcast(position: int, order: Indices, output: Indices, sizes: dict[str, int]) -> Operand:
    """View an operand so that it broadcasts against `output`."""
    axes = _permutation(order, tuple(x for x in output if x in order))
    first = min(output.index(x) for x in order) if order else len(output)
    groups = tuple((x,) if x in order else () for x in output[first:])
    return Operand(position, order, axes, groups, _view(groups, sizes), None)


def _view(groups: tuple[Indices, ...], sizes: dict[str, int]) -> tuple[int, ...] | None:
    """Shape with one axis per group, or None if every group is a single index."""
    if all(len(g) == 1 for g in groups):
        return None
    return tuple(-1 if BATCH in g else prod(sizes[x] for x in g) for g in groups)


def _split(groups: tuple[Indices, ...], sizes: dict[str, int]) -> tuple[int, ...] | None:
    """Shape with one axis per index, or None if every group is a single index."""
    if all(len(g) == 1 for g in groups):
        return None
    return tuple(sizes[x] for g in groups for x in g)
