"""Which order to contract in: exact search over the pairwise orders, for every batch size at once.

The cost of an order is ``alpha + beta * B`` in the batch size B, so over all B the best orders form the
lower envelope of a set of lines. `best_at_any_batch` finds it by asking `best_trees` only at the two ends and
where the lowest of the lines known so far cross.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from opt_einsum.paths import ssa_greedy_optimize

from mumoe_tensor.contraction.network import Network
from mumoe_tensor.formats.base import BATCH, Tree

#: An element read or written takes about the time of this many FLOPs where memory is the limit.
ELEMENT = 16
#: Beyond this batch only the term that grows with the batch matters.
LARGEST_BATCH = 2.0**40

Objective = Literal["flops", "time", "peak"]
Line = tuple[float, float]
Sets = npt.NDArray[np.int64]
Figures = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class SearchSpace:
    """The pairwise orders of a network that an implementation admits.

    A set of operands is an integer with one bit an operand, a set of indices one with a bit an index.

    Parameters
    ----------
    network : Network
        What to contract. Its indices of size one are left out.
    forbidden : tuple of str, optional
        No intermediate may carry all of these indices.
    free_weights : bool, default False
        Products of weights alone cost nothing (they are folded ahead).
    """

    def __init__(self, network: Network, forbidden: tuple[str, ...] = (), free_weights: bool = False):
        network, sizes = network.squeezed, dict(network.sizes)
        bit = {name: 1 << k for k, name in enumerate((BATCH, *sizes))}
        leaves = [sum(bit[x] for x in operand) for operand in network.operands]
        self.network = network
        self.count = len(leaves)
        self.extents = (*sizes.values(),)
        sets = np.arange(1 << self.count)
        holds = [(sets >> k & 1).astype(bool) for k in range(self.count)]
        self.everything = int(sets[-1])
        self.is_leaf: Flags = sets & (sets - 1) == 0
        # Of every set of operands the indices of its product: those that something outside of it needs.
        self.output, self.batch = sum(bit[x] for x in network.output), bit[BATCH]
        self.modes = sum(bit[x] for o in network.operands[network.weights :] for x in o if x != BATCH)
        inside, outside = np.zeros_like(sets), np.full_like(sets, self.output)
        for leaf, held in zip(leaves, holds, strict=True):
            inside[held] |= leaf
            outside[~held] |= leaf
        self.indices = inside & outside
        self.folds_weights = free_weights
        self.is_free: Flags = (sets >> network.weights == 0) & free_weights
        # The bias row takes no part in the product that adds it.
        self.biased = 1 << network.vector_of_input if network.bias and network.vector_of_input else 0
        self.without_bias = 1 - 1 / sizes["i"] if self.biased else 1.0
        # Not admitted: too large an intermediate, and one in which the input vector has met something
        # else than the weights of the input mode, because there the bias row is added.
        self.is_admitted: Flags = (sets & self.biased == 0) | (self.indices & bit.get("i", 0) == 0)
        large = [bit[x] for x in forbidden if sizes[x] > 1]
        if len(large) > 1:
            self.is_admitted &= (self.indices & sum(large)) != sum(large)
        # Operands and the result are no intermediates.
        self.is_inner = self.is_leaf | (sets == self.everything)
        self.is_admitted |= self.is_inner
        # By set the axes in memory order of an operand that a product may have to copy to read it.
        longest = max(map(len, network.storage))
        self.axes = np.zeros((len(sets), longest), dtype=int)
        for k, order in enumerate(network.storage):
            if len(order) > 2:
                self.axes[1 << k] = [bit[x] for x in order] + [bit[order[-1]]] * (longest - len(order))
        self.is_rigid: Flags = np.any(self.axes != 0, axis=1)


class Case(NamedTuple):
    """What the best order is asked for.

    Attributes
    ----------
    batch : float
        Batch size.
    element : float, default 0
        FLOPs an element read or written counts for. The operands and the result are left out, as every
        order reads and writes them once; but not folded weights.
    bound : float
        Known cost of some order, which is to be beaten.
    """

    batch: float
    element: float = 0.0
    bound: float = inf


class _Sizes:
    """Numbers of elements by case, of sets of indices and of the products of sets of operands."""

    def __init__(self, space: SearchSpace, batches: Sequence[float]):
        # Two small tables, one for each half of the indices, instead of one large one.
        self.half = len(space.extents) // 2 + 1
        of_batch = np.array([[1.0, batch] for batch in batches])
        self.first = _products(of_batch, space.extents[: self.half - 1])
        self.rest = _products(np.ones((1, 1)), space.extents[self.half - 1 :])
        self.of_product = self.of_indices(space.indices)

    def of_indices(self, indices: Sets) -> Figures:
        return self.first[:, indices & ((1 << self.half) - 1)] * self.rest[:, indices >> self.half]


def _products(table: Figures, extents: Sequence[int]) -> Figures:
    """Every entry of a table times the product of every subset of some numbers, along the last axis."""
    for extent in extents:
        table = np.concatenate([table, table * extent], axis=1)
    return table


def best_trees(
    space: SearchSpace, cases: Sequence[Case], limit: float = inf, peak: bool = False
) -> list[Tree | None]:
    """Cheapest order of each case, by dynamic programming over the sets of operands.

    Exact over all pairwise orders, products that share only the batch included. A product of two parts
    that share no index is considered only where all of both or nothing of one is summed later: anywhere
    else contracting them one after the other costs less.

    Parameters
    ----------
    space : SearchSpace
        The orders to choose from.
    cases : sequence of Case
        Searched all at once, which is quicker than one after the other.
    limit : float
        Largest number of elements an intermediate may have.
    peak : bool
        Minimise the elements live at once instead of the FLOPs.

    Returns
    -------
    list of Tree or None
        Nested pairs of operand positions; None if no order fits the limit and the bound.
    """
    batches, elements, bounds = (
        np.array(column, dtype=float)[:, None] for column in zip(*cases, strict=True)
    )
    sizes = _Sizes(space, batches[:, 0].tolist())
    admitted = space.is_admitted & (space.is_inner | (sizes.of_product.max(axis=0) <= limit))
    costs = np.where(space.is_leaf, 0.0, bounds)
    left_parts = np.zeros(costs.shape, dtype=int)
    first_of_case = costs.shape[1] * np.arange(len(costs))[:, None]
    # What is not summed soon: modes of weights alone, and of the result (unless it has one row).
    lasting = space.indices & (space.output & ~space.batch if batches.min() == 1 else space.output)
    lasting |= np.where(space.indices & space.batch, 0, space.indices & space.modes)
    sums_nothing, sums_all = space.indices & ~space.output == 0, lasting == 0
    # By how many operands they have, the sets that some order forms within the bound.
    formed = [np.array([], dtype=int), 1 << np.arange(space.count)]
    for count in range(2, space.count + 1):
        halves = range(1, count // 2 + 1)
        pairs = [pair for k in halves for pair in _disjoint(formed[k], formed[count - k])]
        left, right = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        cost = np.maximum(costs[:, left], costs[:, right]) if peak else costs[:, left] + costs[:, right]
        considered = space.indices[left] & space.indices[right] != 0
        considered |= sums_nothing[left] | sums_nothing[right] | (sums_all[left] & sums_all[right])
        considered &= admitted[left | right] & (cost < bounds).any(axis=0)
        left, right, cost = left[considered], right[considered], cost[:, considered]
        if peak:
            cost = _peak(space, sizes, left, right, costs)
        else:
            cost += _price(space, sizes, left, right, elements)
        whole = left | right
        # (All cases in one call: `at` takes long to begin.)
        np.minimum.at(costs.reshape(-1), (first_of_case + whole).reshape(-1), cost.reshape(-1))
        case, pair = np.nonzero((cost == costs[:, whole]) & (cost < bounds))
        left_parts[case, whole[pair]] = left[pair]
        is_formed = np.zeros(len(space.indices), dtype=bool)
        is_formed[whole[pair]] = True
        formed.append(np.flatnonzero(is_formed))

    def tree(parts: Sets, part: int) -> Tree:
        left = int(parts[part])
        if not left:
            return part.bit_length() - 1
        first, second = sorted((left, part ^ left), key=lambda branch: branch & -branch)
        return (tree(parts, first), tree(parts, second))

    return [
        tree(parts, space.everything) if parts[space.everything] or space.count == 1 else None
        for parts in left_parts
    ]


def _disjoint(some: Sets, others: Sets) -> Iterator[tuple[Sets, Sets]]:
    """Pairs without a common operand, from some thousand sets at a time."""
    for start in range(0, len(some) or 1, 1024):
        part = some[start : start + 1024]
        row, column = np.nonzero(part[:, None] & others == 0)
        yield part[row], others[column]


def _price(space: SearchSpace, sizes: _Sizes, left: Sets, right: Sets, elements: Figures) -> Figures:
    """What it costs to join pairs of parts, and to write the result and read it once."""
    whole = left | right
    of_left, of_right, kept = space.indices[left], space.indices[right], space.indices[whole]
    union = of_left | of_right
    factor = np.where(kept == union, 1.0, 2.0)
    if space.biased:
        factor[(left == space.biased) | (right == space.biased)] *= space.without_bias
    price = sizes.of_indices(union) * factor
    if elements.any():
        moved = sizes.of_product[:, whole] * np.where(whole == space.everything, 0, 2)
        for part, others in ((left, of_right), (right, of_left)):
            moved += 2 * _copied(space, sizes, part, others, kept)
            if space.folds_weights:
                moved += sizes.of_product[:, part] * space.is_free[part]
        price += elements * moved
    return price * ~space.is_free[whole] if space.folds_weights else price


def _copied(space: SearchSpace, sizes: _Sizes, part: Sets, others: Sets, kept: Sets) -> Figures:
    """Elements of the operands of the network that a product must copy to read them.

    It need not where the axes it sums, shares and keeps for itself each lie together in memory.
    """
    copied = np.zeros((1, len(part)))
    here = np.flatnonzero(space.is_rigid[part])
    if len(here):
        axes = space.axes[part[here]]
        group = np.where(kept[here, None] & axes, others[here, None] & axes != 0, 2)
        runs = 1 + np.count_nonzero(np.diff(group), axis=1)
        sums, shares, keeps = (np.any(group == kind, axis=1) for kind in (2, 1, 0))
        scattered: Flags = sums & (runs > 1 + shares.astype(int) + keeps)
        copied[:, here] = sizes.of_product[:1, part[here]] * scattered
    return copied


def _peak(space: SearchSpace, sizes: _Sizes, left: Sets, right: Sets, peaks: Figures) -> Figures:
    """Elements live at once while two parts are formed, the better first, and joined."""
    of_left, of_right, kept = space.indices[left], space.indices[right], space.indices[left | right]
    held_left, held_right = (sizes.of_product[:, part] * ~space.is_leaf[part] for part in (left, right))
    left_first = np.maximum(peaks[:, left], held_left + peaks[:, right])
    right_first = np.maximum(peaks[:, right], held_right + peaks[:, left])
    joined = held_left + held_right + sizes.of_product[:, left | right]
    joined += _copied(space, sizes, left, of_right, kept) + _copied(space, sizes, right, of_left, kept)
    return np.maximum(np.minimum(left_first, right_first), joined)


def _joins(tree: Tree) -> list[tuple[int, int]]:
    """The pairs of sets that an order joins, in turn."""
    joins: list[tuple[int, int]] = []

    def visit(node: Tree) -> int:
        if not isinstance(node, tuple):
            return 1 << node
        left, right = visit(node[0]), visit(node[1])
        joins.append((left, right))
        return left | right

    visit(tree)
    return joins


def peaks_of(space: SearchSpace, tree: Tree, batches: Sequence[int]) -> list[float]:
    """Elements live at once in an order of contraction, copies of network operands counted but not these."""
    sizes, peaks = _Sizes(space, batches), np.zeros((len(batches), space.everything + 1))
    for left, right in _joins(tree):
        peaks[:, left | right] = _peak(space, sizes, np.array([left]), np.array([right]), peaks)[:, 0]
    return [float(peak) for peak in peaks[:, space.everything]]


def cost_lines(
    space: SearchSpace, trees: Sequence[Tree], elements: Sequence[float] = (0.0,)
) -> list[list[Line]]:
    """Costs of orders as lines ``(alpha, beta)`` of ``alpha + beta * B``, by element; see `best_trees`."""
    left, right = np.array([_joins(tree) for tree in trees], dtype=int).reshape(-1, 2).T
    # Two batch sizes tell a line.
    sizes, column = _Sizes(space, [1, 2] * len(elements)), np.repeat(elements, 2)[:, None]
    prices = _price(space, sizes, left, right, column).reshape(len(elements), 2, len(trees), space.count - 1)
    return [
        [(2 * one - two, two - one) for one, two in zip(*costs, strict=True)]
        for costs in prices.sum(axis=3).tolist()
    ]


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
    nodes: list[tuple[int, Tree]] = [(1 << k, k) for k in range(space.count)]
    for first, second in path:
        (left, left_tree), (right, right_tree) = nodes[first], nodes[second]
        if not space.is_admitted[left | right]:
            return None
        nodes.append((left | right, (left_tree, right_tree)))
    return nodes[-1][1]


class _Envelope:
    """The lower envelope of the cost lines of the orders known so far, and where it is known to be exact."""

    def __init__(self, element: float):
        self.element = element
        self.lines: dict[Tree, Line] = {}
        self.exact: set[float] = set()

    def lowest(self) -> list[tuple[float, Tree]]:
        """The orders on the envelope, each with the batch size from which on it is the cheapest."""
        if not self.lines:
            return []
        start, tree = 1.0, min(self.lines, key=lambda t: (sum(self.lines[t]), self.lines[t][1]))
        found = []
        while True:
            found.append((start, tree))
            alpha, beta = self.lines[tree]
            crossings = [
                ((a - alpha) / (beta - b), b, other) for other, (a, b) in self.lines.items() if b < beta
            ]
            if not crossings:
                return found
            start, _, tree = min(crossings, key=lambda crossing: crossing[:2])

    def cases(self) -> list[Case]:
        """What is to be asked: whether an order is better at an end, or where two of these lines cross.

        If none is, none is better anywhere.
        """
        batches = {1.0, LARGEST_BATCH, *(batch for batch, _ in self.lowest())} - self.exact
        self.exact |= batches
        # A search that must beat what is known is quick, because the bound drops most sets.
        bounds = {
            b: min((alpha + beta * b for alpha, beta in self.lines.values()), default=inf) for b in batches
        }
        return [Case(batch, self.element, (1 - 1e-9) * bound) for batch, bound in sorted(bounds.items())]


def best_at_any_batch(space: SearchSpace, elements: Sequence[float]) -> list[Tree]:
    """Orders among which the cheapest at every batch size is found.

    Parameters
    ----------
    space : SearchSpace
    elements : sequence of float
        FLOPs an element read or written counts for: the best orders for every one of these.
    """
    envelopes = [_Envelope(element) for element in elements]
    trees = [greedy_tree(space, batch) for batch in (1, LARGEST_BATCH)]
    while True:
        new = list(dict.fromkeys(tree for tree in trees if tree is not None))
        for envelope, lines in zip(envelopes, cost_lines(space, new, elements), strict=True):
            envelope.lines.update(zip(new, lines, strict=True))
        cases = [case for envelope in envelopes for case in envelope.cases()]
        if not cases:
            return [tree for envelope in envelopes for _, tree in envelope.lowest()]
        trees = best_trees(space, cases)
