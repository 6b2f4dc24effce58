"""From an order of contraction to a program: which axes each product groups, in which memory order.

Every step is one matrix product (``mm``), one batched matrix product (``bmm``) or one elementwise product
with broadcasting (``mul``). A product reads an operand without copying it when the axes it sums, the axes
it keeps and the axes shared with the other operand and the result each lie together in memory. `Compiler`
chooses which operand comes first in each product, and so the memory order of every intermediate, such that
as few elements as possible are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import groupby
from math import prod
from typing import Literal, NamedTuple

from mumoe_tensor.contraction.network import Indices, Network, Tree
from mumoe_tensor.formats.base import BATCH

Kind = Literal["mm", "bmm", "mul"]

#: Memory orders of an intermediate that are followed up, the cheapest ones.
KEPT_ORDERS = 4


@dataclass(frozen=True)
class Operand:
    """How a step reads one of its operands.

    Attributes
    ----------
    position : int
        Which operand of the network, or ``len(operands) + k`` for the result of step k.
    indices : tuple of str
        Its axes in memory order.
    copy_order : tuple of int or None
        Permutation to copy it into first, if its axes do not lie together as the product needs.
    groups : tuple of tuple of str
        The axes after that, those together which the view makes one.
    shape : tuple of int or None
        Shape to view it in, with -1 for the axis that carries the batch; None to take it as it is.
    axes : tuple of int or None
        Permutation of that view into the order the product takes; None if it is in order.
    """

    position: int
    indices: Indices
    copy_order: tuple[int, ...] | None
    groups: tuple[Indices, ...]
    shape: tuple[int, ...] | None
    axes: tuple[int, ...] | None
    #: Whether it is read as it is. (Looked at in every call, so found out once.)
    is_bare: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        is_bare = self.copy_order is None and self.shape is None and self.axes is None
        object.__setattr__(self, "is_bare", is_bare)

    def is_reordered(self, sizes: dict[str, int]) -> bool:
        """Whether the product reads a permuted copy; axes of size one lie anywhere."""
        read = [x for group in self.groups for x in group if sizes[x] > 1]
        return self.copy_order is not None and read != [x for x in self.indices if sizes[x] > 1]

    def is_stored_anew(self, sizes: dict[str, int]) -> bool:
        """Whether the copy is an array of its own, not a permuted view that the product copies itself.

        It is one where axes must become one that do not lie together.
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
    """Where a step finds the bias row: the last entry of an operand along the input mode.

    Attributes
    ----------
    side : int
        0 if the left operand holds it, 1 for the right.
    axis : int
        The input mode among that operand's axes.
    order : tuple of int or None
        Permutation of the row's axes into the order of the product's.
    shape : tuple of int or None
        Shape in which it is added to the product.
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
        Axes the product sums over.
    shape : tuple of int or None
        Shape of the result, if the product leaves axes grouped.
    bias : Bias or None
        The bias row to add, where the input vector meets the weights.
    """

    kind: Kind
    left: Operand
    right: Operand
    output: Indices
    summed: Indices
    shape: tuple[int, ...] | None
    bias: Bias | None = None
    #: Whether the product takes its operands and gives its result as they are, without a bias row.
    is_bare: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        bare = self.left.is_bare and self.right.is_bare and self.shape is None and self.bias is None
        object.__setattr__(self, "is_bare", bare)

    @property
    def indices(self) -> tuple[str, ...]:
        """All indices the product runs over."""
        return tuple(dict.fromkeys(self.left.indices + self.right.indices))


class Arrangement(NamedTuple):
    """A permutation of axes, then a shape with axes of size one dropped or added; None where not needed."""

    order: tuple[int, ...] | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Program:
    """Steps in the order to run them, good for every batch size.

    Attributes
    ----------
    network : Network
        What is contracted.
    arrange : tuple of Arrangement or None
        How each operand is put in memory order, without its axes of size one; None to take it as it is.
    steps : tuple of Step
    output : Arrangement or None
        How the last result becomes the output, with its axes of size one.
    """

    network: Network
    arrange: tuple[Arrangement | None, ...]
    steps: tuple[Step, ...]
    output: Arrangement | None
    #: Each step with the position of its result: results are numbered after the operands.
    numbered: tuple[tuple[int, Step], ...] = field(init=False, compare=False, repr=False)
    #: Position of the last result.
    result: int = field(init=False, compare=False, repr=False)
    #: Positions of the results that depend on weights alone.
    constant: frozenset[int] = field(init=False, compare=False, repr=False)

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


class _Choice(NamedTuple):
    """The cheapest way found to have a node in some memory order."""

    copied: int
    step: _Join | None


class _Join(NamedTuple):
    """A product of two nodes in given memory orders; swapped if the right one comes first in it."""

    swapped: bool
    left_order: Indices
    right_order: Indices
    left_read: Indices
    right_read: Indices
    summed: Indices
    shared: Indices


class Compiler:
    """Chooses the memory order of every intermediate, for orders of contraction of one network.

    What is found for a part of one order serves the others that have it.

    Parameters
    ----------
    network : Network
    batch : int
        Batch size at which copied elements are weighed against each other.
    """

    def __init__(self, network: Network, batch: int):
        self.handed_over, self.network = network, network.squeezed
        self.sizes = network.sizes_at(batch)
        self.options: dict[Tree, dict[Indices, _Choice]] = {
            k: {order: _Choice(0, None)} for k, order in enumerate(self.network.memory_orders)
        }

    def __call__(self, tree: Tree) -> Program:
        """The program for nested pairs of operand positions."""
        network, sizes, handed_over = self.network, self.sizes, self.handed_over
        self._visit(tree)
        final = self.options[tree]
        extra = prod(sizes[x] for x in network.output)
        order = min(final, key=lambda o: final[o].copied + (extra if o != network.output else 0))
        return Program(
            network=handed_over,
            arrange=tuple(
                _arrangement(operand, stored, squeezed, handed_over)
                for operand, stored, squeezed in zip(
                    handed_over.operands, handed_over.memory_orders, network.memory_orders, strict=True
                )
            ),
            steps=tuple(_emit(network, tree, order, self.options, sizes)),
            output=_arrangement(order, network.output, handed_over.output, handed_over),
        )

    def _visit(self, node: Tree) -> frozenset[int]:
        """Find the options of a node; return the operands it holds."""
        if not isinstance(node, tuple):
            return frozenset([node])
        left, right = node
        held = self._visit(left) | self._visit(right)
        if node not in self.options:
            others = (o for k, o in enumerate(self.network.operands) if k not in held)
            needed = frozenset(self.network.output).union(*others)
            best: dict[Indices, _Choice] = {}
            for left_order, left_choice in self.options[left].items():
                for right_order, right_choice in self.options[right].items():
                    so_far = left_choice.copied + right_choice.copied
                    for output, join, orders, calls in _joins(left_order, right_order, needed):
                        copied = so_far + calls + sum(map(self._size, orders))
                        if output not in best or copied < best[output].copied:
                            best[output] = _Choice(copied, join)
            cheapest = sorted(best, key=lambda order: best[order].copied)[:KEPT_ORDERS]
            self.options[node] = {order: best[order] for order in cheapest}
        return held

    def _size(self, order: Indices) -> int:
        return prod(self.sizes[x] for x in order)


@lru_cache(maxsize=65_536)
def _joins(
    left_order: Indices, right_order: Indices, needed: frozenset[str]
) -> tuple[tuple[Indices, _Join, tuple[Indices, ...], int], ...]:
    """Ways to multiply two nodes: order of the result, product, and what that copies (see `_copied`)."""
    ways = [
        *_products(False, left_order, right_order, needed),
        *_products(True, right_order, left_order, needed),
    ]
    return tuple((output, join, *_copied(output, join)) for output, join in ways)


def _products(
    swapped: bool, a_order: Indices, b_order: Indices, needed: frozenset[str]
) -> Iterator[tuple[Indices, _Join]]:
    common = [x for x in a_order if x in b_order]
    summed = tuple(x for x in common if x not in needed)
    shared = tuple(x for x in common if x in needed)
    a_only = tuple(x for x in a_order if x not in b_order)
    b_only = tuple(x for x in b_order if x not in a_order)
    if not summed:
        for output in {a_order + b_only: 0, b_only + a_order: 0}:
            yield output, _Join(swapped, a_order, b_order, a_order, b_order, summed, shared)
        return
    # Read as they lie; or one copied into the other's order; or both copied.
    b_summed = tuple(x for x in b_order if x in summed)
    b_shared = tuple(x for x in b_order if x in shared)
    a_fits = _fits(a_order, shared, a_only, summed)
    b_fits = _fits(b_order, b_shared, b_only, b_summed)
    if a_fits and b_fits and summed == b_summed and shared == b_shared:
        yield shared + a_only + b_only, _Join(swapped, a_order, b_order, a_order, b_order, summed, shared)
        return
    if b_fits:
        read = b_shared + a_only + b_summed
        yield b_shared + a_only + b_only, _Join(swapped, a_order, b_order, read, b_order, b_summed, b_shared)
    read = shared + b_only + summed
    if a_fits:
        yield shared + a_only + b_only, _Join(swapped, a_order, b_order, a_order, read, summed, shared)
    elif not b_fits:
        a_read = shared + a_only + summed
        yield shared + a_only + b_only, _Join(swapped, a_order, b_order, a_read, read, summed, shared)


def _fits(order: Indices, *groups: Indices) -> bool:
    """Whether each group lies together in this order, and the innermost axis is not a shared one."""
    group = {x: k for k, members in enumerate(groups) for x in members}
    runs = [k for k, _ in groupby(order, key=group.__getitem__)]
    shared_innermost = runs[-1] == 0
    return len(runs) == len(set(runs)) and not shared_innermost


def _copied(output: Indices, join: _Join) -> tuple[tuple[Indices, ...], int]:
    """Orders of the operands that are copied, or in an elementwise product read out of order.

    A matrix read transposed costs no copy, but a call; these are counted too, as one element each.
    """
    orders = tuple(
        order
        for order, read in ((join.left_order, join.left_read), (join.right_order, join.right_read))
        if order != tuple(x for x in (read if join.summed else output) if x in order)
    )
    if not join.summed:
        return orders, 0
    left_free_last = join.left_read[-1] not in join.summed
    right_summed_last = join.right_read[-1] in join.summed
    return orders, left_free_last + right_summed_last


def _emit(
    network: Network,
    tree: Tree,
    order: Indices,
    options: dict[Tree, dict[Indices, _Choice]],
    sizes: dict[str, int],
) -> list[Step]:
    """Write the chosen products down; of two branches first the one that keeps the peak lower."""
    steps: list[Step] = []

    def held(node: Tree) -> int:
        return prod(sizes[x] for x in next(iter(options[node]))) if isinstance(node, tuple) else 0

    @cache
    def peak(node: Tree) -> int:
        if not isinstance(node, tuple):
            return 0
        first, second = by_peak(node)
        return max(peak(first), held(first) + peak(second), held(first) + held(second) + held(node))

    def by_peak(node: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        # Holding one result while the other branch runs is what costs.
        left, right = node
        left_first = max(peak(left), held(left) + peak(right))
        return (left, right) if left_first <= max(peak(right), held(right) + peak(left)) else (right, left)

    def visit(node: Tree, order: Indices) -> int:
        if not isinstance(node, tuple):
            return node
        join = options[node][order].step
        assert join is not None
        first, second = reversed(node) if join.swapped else node
        orders = {first: join.left_order, second: join.right_order}
        positions = {branch: visit(branch, orders[branch]) for branch in by_peak(node)}
        steps.append(_step(network, join, positions[first], positions[second], order))
        return len(network.operands) + len(steps) - 1

    visit(tree, order)
    return steps


def _arrangement(order: Indices, permuted: Indices, shaped: Indices, network: Network) -> Arrangement | None:
    """Take axes in one order to another, and then drop or add those of size one."""
    sizes = network.sizes_at(-1)
    shape = None if permuted == shaped else tuple(sizes[x] for x in shaped)
    arrangement = Arrangement(_permutation(order, permuted), shape)
    return None if arrangement == (None, None) else arrangement


def _permutation(order: Indices, target: Indices) -> tuple[int, ...] | None:
    return None if order == target else tuple(order.index(x) for x in target)


def _step(network: Network, join: _Join, left: int, right: int, output: Indices) -> Step:
    sizes = network.sizes_at(-1)
    positions, orders = (left, right), (join.left_order, join.right_order)
    reads = (join.left_read, join.right_read)
    if not join.summed:
        a, b = (_broadcast(p, o, output, sizes) for p, o in zip(positions, orders, strict=True))
        return Step("mul", a, b, output, (), None)

    side = None
    if network.bias and network.vector_of_input in positions:
        # The input vector meets the weights here: their last row along the input mode is the bias.
        side = 1 - positions.index(network.vector_of_input)
        sizes["i"] -= 1
    shared, summed = join.shared, join.summed
    free = [tuple(x for x in read if x not in shared + summed) for read in reads]
    wanted = ((shared, free[0], summed), (shared, summed, free[1]))
    a, b = (
        _matrix(p, o, r, w if shared else w[1:], sizes)
        for p, o, r, w in zip(positions, orders, reads, wanted, strict=True)
    )
    bias = None
    if side is not None:
        row = tuple(x for x in orders[side] if x != "i")
        padded = (shared, free[0], ()) if side == 0 else (shared, (), free[1])
        groups = padded if shared else padded[1:] if side == 0 else padded[2:]
        bias = Bias(
            side, orders[side].index("i"), _permutation(row, shared + free[side]), _view(groups, sizes)
        )
    result = (shared, *free) if shared else tuple(free)
    return Step("bmm" if shared else "mm", a, b, output, summed, _split(result, sizes), bias)


def _matrix(
    position: int, order: Indices, read: Indices, groups: tuple[Indices, ...], sizes: dict[str, int]
) -> Operand:
    """View an operand as a matrix, or a stack of them, whose axes are `groups`."""
    # An empty group is an axis of size one: it lies anywhere, so it comes last in memory.
    in_memory = tuple(sorted(groups, key=lambda g: read.index(g[0]) if g else len(read)))
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
    """Shape with one axis a group, or None if every group is one index already."""
    if all(len(g) == 1 for g in groups):
        return None
    return tuple(-1 if BATCH in g else prod(sizes[x] for x in g) for g in groups)


def _split(groups: tuple[Indices, ...], sizes: dict[str, int]) -> tuple[int, ...] | None:
    """Shape with one axis an index, or None if it has that shape already."""
    if all(len(g) == 1 for g in groups):
        return None
    return tuple(sizes[x] for g in groups for x in g)
