"""Which order to contract in: exact search over the pairwise orders, for every batch size at once.

The cost of an order is ``alpha + beta * B`` in the batch size B, so over all B the best orders form the
lower envelope of a set of lines. `envelope` finds it by asking `best_tree` only at the two ends and where
two lines known to be optimal cross.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import inf
from typing import Literal

from opt_einsum.paths import ssa_greedy_optimize

from mumoe_tensor.contraction.network import BATCH, Network
from mumoe_tensor.formats.base import Tree

#: An element read or written takes about the time of this many FLOPs where memory is the limit.
ELEMENT = 16
#: Beyond this batch only the term that grows with the batch matters.
LARGEST_BATCH = 2**40

Objective = Literal["flops", "time", "peak"]
Line = tuple[float, float]


class SearchSpace:
    """The pairwise orders of a network that an implementation admits.

    A set of operands is an integer with one bit an operand, a set of indices one with a bit an index.

    Parameters
    ----------
    network : Network
        What to contract.
    forbidden : tuple of str, optional
        No intermediate may carry all of these indices.
    free_weights : bool, default False
        Products of weights alone cost nothing (they are folded ahead).
    """

    def __init__(self, network: Network, forbidden: tuple[str, ...] = (), free_weights: bool = False):
        sizes = dict(network.sizes)
        names = [BATCH, *sizes]
        bit = {name: 1 << k for k, name in enumerate(names)}
        self.network = network
        self.count = len(network.operands)
        self.leaves = [sum(bit[x] for x in operand) for operand in network.operands]
        self.output = sum(bit[x] for x in network.output)
        self.forbidden = sum(bit[x] for x in forbidden)
        self.dimension = {bit[name]: sizes[name] for name in sizes}
        self.batch = bit[BATCH]
        self.of_size_one = sum(bit[x] for x in sizes if sizes[x] == 1)
        self.weights = (1 << network.weights) - 1 if free_weights else 0
        self.biased = (
            1 << network.vector_of_input if network.bias and network.vector_of_input is not None else 0
        )
        self.input = bit.get("i", 0)
        # The bias row takes no part in the product that adds it.
        self.without_bias = 1 - 1 / sizes["i"] if self.biased else 1.0
        # Operands whose axes may lie in an order that a product cannot read without a copy.
        self.rigid = {
            1 << k: tuple(bit[x] for x in order) for k, order in enumerate(network.storage) if len(order) > 2
        }
        # For each set of operands, the indices that something outside of it still needs.
        self.outside = [self.output] * (1 << self.count)
        everything = (1 << self.count) - 1
        for subset in range(1, 1 << self.count):
            low = subset & -subset
            previous = self.outside[everything ^ (subset ^ low)]
            self.outside[everything ^ subset] = previous | self.leaves[low.bit_length() - 1]

    def size_table(self, batch: float) -> Callable[[int], float]:
        """A function from a set of indices to its number of elements at this batch."""
        dimension = {**self.dimension, self.batch: batch}
        table: dict[int, float] = {0: 1.0}

        def size(indices: int) -> float:
            known = table.get(indices)
            if known is None:
                low = indices & -indices
                known = table[indices] = dimension[low] * size(indices ^ low)
            return known

        return size

    def is_copied(self, part: int, other_indices: int, kept: int) -> bool:
        """Whether a product must copy an operand of the network to read it.

        It need not where the axes it sums, shares and keeps for itself each lie together in memory.
        """
        order = self.rigid.get(part)
        if order is None:
            return False
        groups = [2 if not axis & kept else bool(axis & other_indices) for axis in order]
        runs = sum(a != b for a, b in pairwise(groups)) + 1
        return 2 in groups and runs > len(set(groups))

    def admits(self, subset: int, indices: int) -> bool:
        """Whether an order may form the product of these operands, which has these indices."""
        if self.forbidden and indices & self.forbidden == self.forbidden:
            return False
        # A bias row is added where the input vector meets the input mode, so that must be its first step.
        return not (subset & self.biased and indices & self.input)


def best_tree(
    space: SearchSpace,
    batch: float,
    element: float = 0.0,
    bound: float = inf,
    limit: float = inf,
    peak: bool = False,
) -> Tree | None:
    """Cheapest order at one batch size, by dynamic programming over the sets of operands.

    Exact over all pairwise orders, products that share only the batch included. A product of two parts
    that share no index is considered only where nothing of it is summed later, or one of them has
    an axis of size one: anywhere else contracting them one after the other costs less.

    Parameters
    ----------
    space : SearchSpace
        The orders to choose from.
    batch : float
        Batch size.
    element : float, default 0
        FLOPs an element read or written counts for.
    bound : float
        Known cost of some order: sets that cost more are dropped.
    limit : float
        Largest number of elements an intermediate may have.
    peak : bool
        Minimise the elements live at once instead of the FLOPs.

    Returns
    -------
    Tree or None
        Nested pairs of operand positions; None if no order fits the limit and the bound.
    """
    size = space.size_table(batch)
    outside, output, free, of_size_one = space.outside, space.output, space.weights, space.of_size_one
    biased, without_bias, rigid = space.biased, space.without_bias, space.rigid
    everything = (1 << space.count) - 1
    trees: dict[int, Tree] = {1 << k: k for k in range(space.count)}
    found: list[list[tuple[int, int, float]]] = [[], [(1 << k, x, 0.0) for k, x in enumerate(space.leaves)]]
    for count in range(2, space.count + 1):
        best: dict[int, tuple[float, int, int, int]] = {}
        refused: set[int] = set()
        for first in range(1, count // 2 + 1):
            for left, left_indices, left_cost in found[first]:
                apart = [part for part in found[count - first] if not left & part[0]]
                for right, right_indices, right_cost in apart:
                    subset = left | right
                    known = best[subset][0] if subset in best else bound
                    cost = max(left_cost, right_cost) if peak else left_cost + right_cost
                    if cost >= known:
                        continue
                    union = left_indices | right_indices
                    if not left_indices & right_indices and not union & of_size_one and union & ~output:
                        continue
                    kept = union & outside[subset]
                    if peak:
                        one, other = (left, left_indices, left_cost), (right, right_indices, right_cost)
                        cost = _peak(space, size, one, other, kept)
                    elif subset | free != free:
                        volume = size(union)
                        if left == biased or right == biased:
                            volume *= without_bias
                        cost += volume if kept == union else 2 * volume
                        if element:
                            cost += element * (size(left_indices) + size(right_indices) + size(kept))
                            if left in rigid and space.is_copied(left, right_indices, kept):
                                cost += 2 * element * size(left_indices)
                            if right in rigid and space.is_copied(right, left_indices, kept):
                                cost += 2 * element * size(right_indices)
                    if cost >= known or subset in refused:
                        continue
                    if subset != everything and (size(kept) > limit or not space.admits(subset, kept)):
                        refused.add(subset)
                        continue
                    best[subset] = (cost, kept, left, right)
        for subset, (_, _, left, right) in best.items():
            trees[subset] = (trees[left], trees[right])
        found.append([(subset, kept, cost) for subset, (cost, kept, _, _) in best.items()])
    return trees.get(everything)


def _peak(
    space: SearchSpace,
    size: Callable[[int], float],
    left: tuple[int, int, float],
    right: tuple[int, int, float],
    kept: int,
) -> float:
    """Elements live at once while two parts (set, indices, peak) are formed, the better first, and joined."""
    held = [0.0 if part & (part - 1) == 0 else size(indices) for part, indices, _ in (left, right)]
    one_by_one = min(max(left[2], held[0] + right[2]), max(right[2], held[1] + left[2]))
    joined = sum(held) + size(kept)
    for (part, indices, _), (_, others, _) in ((left, right), (right, left)):
        if part in space.rigid and space.is_copied(part, others, kept):
            joined += size(indices)
    return max(one_by_one, joined)


def peak_of(space: SearchSpace, tree: Tree, batch: float) -> float:
    """Elements live at once in an order of contraction, copies of network operands counted but not these."""
    size = space.size_table(batch)

    def visit(node: Tree) -> tuple[int, int, float]:
        if not isinstance(node, tuple):
            return 1 << node, space.leaves[node], 0.0
        left, right = visit(node[0]), visit(node[1])
        subset = left[0] | right[0]
        kept = (left[1] | right[1]) & space.outside[subset]
        return subset, kept, _peak(space, size, left, right, kept)

    return visit(tree)[2]


def cost_line(space: SearchSpace, tree: Tree, element: float = 0.0) -> Line:
    """Cost of an order as the line ``(alpha, beta)`` of ``alpha + beta * B``."""
    size = space.size_table(1)
    line = [0.0, 0.0]

    def visit(node: Tree) -> tuple[int, int]:
        if not isinstance(node, tuple):
            return 1 << node, space.leaves[node]
        (left, left_indices), (right, right_indices) = visit(node[0]), visit(node[1])
        subset, union = left | right, left_indices | right_indices
        kept = union & space.outside[subset]
        if subset | space.weights != space.weights:
            volume = size(union) * (1 if kept == union else 2)
            if space.biased in (left, right):
                volume *= space.without_bias
            line[bool(union & space.batch)] += volume
            for indices in (left_indices, right_indices, kept):
                line[bool(indices & space.batch)] += element * size(indices)
            if space.is_copied(left, right_indices, kept):
                line[0] += 2 * element * size(left_indices)
            if space.is_copied(right, left_indices, kept):
                line[0] += 2 * element * size(right_indices)
        return subset, kept

    visit(tree)
    return line[0], line[1]


def substitute(tree: Tree, positions: dict[int, Tree]) -> Tree:
    """The tree with every leaf replaced by what stands for it."""
    if isinstance(tree, tuple):
        return (substitute(tree[0], positions), substitute(tree[1], positions))
    return positions[tree]


def greedy_tree(space: SearchSpace, batch: float) -> Tree | None:
    """A quick order by opt_einsum's greedy search, if the implementation admits it."""
    sizes = {**dict(space.network.sizes), BATCH: batch}
    inputs = [frozenset(operand) for operand in space.network.operands]
    path = ssa_greedy_optimize(inputs, frozenset(space.network.output), sizes)
    nodes: list[tuple[int, int, Tree]] = [(1 << k, leaf, k) for k, leaf in enumerate(space.leaves)]
    for first, second in path:
        (left, left_indices, left_tree), (right, right_indices, right_tree) = nodes[first], nodes[second]
        subset = left | right
        kept = (left_indices | right_indices) & space.outside[subset]
        if len(nodes) < 2 * space.count - 2 and not space.admits(subset, kept):
            return None
        nodes.append((subset, kept, (left_tree, right_tree)))
    return nodes[-1][2]


def envelope(space: SearchSpace, element: float = 0.0) -> dict[Tree, Line]:
    """Orders among which the cheapest at every batch size is found, with their cost lines.

    Parameters
    ----------
    space : SearchSpace
    element : float, default 0
        FLOPs an element read or written counts for.
    """
    known: dict[Tree, Line] = {}
    best: dict[Tree, Line] = {}
    for batch in (1, LARGEST_BATCH):
        tree = greedy_tree(space, batch)
        if tree is not None:
            known[tree] = cost_line(space, tree, element)

    def at(batch: float) -> Line | None:
        # A search that must beat what is known is quick, because the bound drops most sets.
        tree = min(known, key=lambda t: known[t][0] + known[t][1] * batch, default=None)
        bound = inf if tree is None else (known[tree][0] + known[tree][1] * batch) * (1 - 1e-9)
        better = best_tree(space, batch, element, bound)
        if better is not None:
            tree = better
            known[tree] = cost_line(space, tree, element)
        if tree is None:
            return None
        best[tree] = known[tree]
        return known[tree]

    def between(few: Line, many: Line) -> None:
        # `few` is the best line at some batch, `many` at a larger one: only below their crossing can a
        # third line be better than both.
        if few[1] <= many[1]:
            return
        crossing = (many[0] - few[0]) / (few[1] - many[1])
        below = at(crossing)
        if below is not None and below not in (few, many):
            between(few, below)
            between(below, many)

    few, many = at(1), at(LARGEST_BATCH)
    if few is not None and many is not None:
        between(few, many)
    return best
