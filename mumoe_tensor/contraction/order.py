"""Search for the cheapest pairwise order in which to contract a network, for one batch size.

The search is a dynamic program: the cheapest product of a set of operands joins the cheapest products of two
parts of that set. It is exact up to `EXACT` operands. A larger network is first reduced to `EXACT` parts by
multiplying the cheapest pairs. This is done both directly and after multiplying each mode's vector by the
mode's factor, and the better result is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations, product
from math import inf
from typing import Literal, NamedTuple

from mumoe_tensor.contraction.machine import CPU, Machine
from mumoe_tensor.contraction.network import Network, Tree, is_read_in_place, stack_of
from mumoe_tensor.formats.base import BATCH

Objective = Literal["time", "flops", "peak"]
#: The orders that were searched: all; those that first multiply each mode's vector by the mode's factor;
#: or those that start with the cheapest products.
Search = Literal["exact", "vectors first", "greedy"]

#: Weight of an element of the peak relative to a FLOP: FLOPs only decide between orders with the same peak.
MORE_THAN_FLOPS = 1 << 128
#: The largest number of operands for which the search is exact.
EXACT = 12


class Part(NamedTuple):
    """A product of some operands. Sets of operands and of indices are integers with one bit per member.

    Attributes
    ----------
    operands, indices : int
        The operands of the product, and the indices of its result.
    cost : int
        Total cost of its steps.
    halves : tuple of Part
        The two parts that the last step joins; empty for an operand.
    """

    operands: int
    indices: int
    cost: int
    halves: tuple[Part, ...] = ()

    @property
    def tree(self) -> Tree:
        """The order in which the product is formed."""
        if not self.halves:
            return self.operands.bit_length() - 1
        first, second = sorted(self.halves, key=lambda part: part.operands & -part.operands)
        return first.tree, second.tree


#: Cost of a product including its two parts, as a function of the parts and the result's indices.
Cost = Callable[[Part, Part, int], int]


class Orders:
    """The pairwise orders of a network at one batch size.

    Parameters
    ----------
    network : Network
    batch : int
    implementation : {"factorized", "reconstructed"}, optional
        ``"factorized"``: no intermediate has all modes of the weight. ``"reconstructed"``: the weights are
        multiplied by each other before any vector. By default every order is allowed.
    fold_weights : bool, default False
        Whether products that involve only weights are free.
    limit : float, optional
        Largest number of elements of an intermediate.
    machine : Machine, optional
        The machine that determines the cost of moving an element in FLOPs; by default a CPU.
    """

    def __init__(
        self,
        network: Network,
        batch: int,
        implementation: str | None = None,
        fold_weights: bool = False,
        limit: float = inf,
        machine: Machine = CPU,
    ):
        self.element = machine.element
        sizes, network = network.sizes_at(batch), network.squeezed
        bit = {x: 1 << k for k, x in enumerate(sizes)}

        def bits(names: Iterable[str]) -> int:
            return sum({bit[x] for x in names})

        self.extents, self.limit = list(sizes.values()), limit
        self.leaves = [Part(1 << k, bits(axes), 0) for k, axes in enumerate(network.operands)]
        self.everything, self.weights = (1 << len(self.leaves)) - 1, (1 << network.weights) - 1
        vectors = list(enumerate(network.operands))[network.weights :]
        self.split_vectors = {1 << k for k, axes in vectors if len(axes) > 2}
        self.batch, self.output = bit[BATCH], bits(network.output)
        self.modes = bits(x for axes in network.operands[network.weights :] for x in axes) & ~self.batch
        self.memory_orders = [tuple(bit[x] for x in axes) for axes in network.memory_orders]
        self.free = self.weights if fold_weights else 0
        self.forms_weight = implementation == "reconstructed"
        # Intermediates must not have all modes of the weight, unless there is only one mode, or a factor
        # already has all modes.
        whole = self.modes | self.output & ~self.batch
        weights = self.leaves[: network.weights]
        is_formed = not whole & (whole - 1) or any(leaf.indices & whole == whole for leaf in weights)
        self.forbidden = whole if implementation == "factorized" and not is_formed else 0
        # The bias row is added in the product of the input vector, one entry shorter than the mode, with the
        # weights of the input mode.
        self.biased = 1 << len(self.leaves) - 1 if network.bias else 0
        self.input, self.rows = bit.get("i", 0), sizes.get("i", 1)
        self.size, self.indices, self.is_read = cache(self._size), cache(self._indices), cache(self._is_read)

    def best(self, minimize: Objective, worse: Tree | None = None) -> tuple[Tree, Search] | None:
        """Find the cheapest order, and return it with the kind of search.

        Parameters
        ----------
        minimize : {"time", "flops", "peak"}
            ``"flops"``: FLOPs. ``"time"``: FLOPs plus the cost of moving elements, except those that every
            order moves. ``"peak"``: the peak number of elements in memory, without the operands.
        worse : Tree, optional
            An order to improve on.

        Returns
        -------
        tuple of Tree and str, or None
            None if no order is allowed, or none is cheaper than `worse`.
        """
        cost = {"time": self._time, "flops": self._flops, "peak": self._peak}[minimize]
        bound = inf if worse is None else self._formed(worse, cost).cost
        fixed = self._vectors_first(cost)
        if len(self.leaves) > EXACT:
            best: Part | None = None
            search: Search = "vectors first"
            for start in [fixed, self.leaves] if fixed != self.leaves else [fixed]:
                parts = self._cheapest_first(start, cost)
                better = self._cheapest(parts, cost, best.cost if best else bound)
                if better:
                    best, search = better, "greedy" if parts is not fixed else "vectors first"
            return (best.tree, search) if best else None
        # The best of these few orders is usually close to the optimum. As a bound, it eliminates most parts.
        near = self._cheapest(fixed, cost, inf) if worse is None and len(fixed) < len(self.leaves) else None
        best = self._cheapest(self.leaves, cost, near.cost if near else bound) or near
        return (best.tree, "exact") if best else None

    def _cheapest(self, parts: list[Part], cost: Cost, bound: float) -> Part | None:
        """The cheapest product of all parts, if it costs less than the bound."""
        formed = [[], parts[::-1]]  # products, by their number of parts
        for count in range(2, len(parts) + 1):
            best: dict[int, Part] = {}
            for few in range(1, count // 2 + 1):
                some, others = formed[few], formed[count - few]
                for left, right in combinations(some, 2) if some is others else product(some, others):
                    if left.operands & right.operands:
                        continue
                    both = left.operands | right.operands
                    kept = self._kept(left.indices, right.indices, both)
                    if kept is None:
                        continue
                    total = cost(left, right, kept)
                    # On a tie, keep the first order: it joins a small and a large part, so its peak
                    # is lower.
                    if total < (best[both].cost if both in best else bound):
                        best[both] = Part(both, kept, total, (left, right))
            formed.append([*best.values()])
        return formed[-1][0] if formed[-1] else None

    def _vectors_first(self, cost: Cost) -> list[Part]:
        """Multiply each vector by the factor of its mode, if this factor has no other mode with a vector."""
        split = self.weights.bit_length()
        parts, vectors = self.leaves[:split], self.leaves[split:]
        for vector in vectors:
            mode = vector.indices & ~self.batch
            holders = [part for part in parts[:split] if part.indices & mode]
            joined = None
            if len(holders) == 1 and holders[0].indices & self.modes == mode:
                joined = self._joined(holders[0], vector, cost)
            if joined is None:
                parts.append(vector)
            else:
                parts[parts.index(holders[0])] = joined
        return parts

    def _cheapest_first(self, parts: list[Part], cost: Cost) -> list[Part]:
        """Multiply the cheapest pairs until `EXACT` parts are left, or no product is allowed."""
        while len(parts) > EXACT:
            joined = [self._joined(left, right, cost) for left, right in combinations(parts, 2)]
            first = min(filter(None, joined), key=lambda part: part.cost, default=None)
            if first is None:
                break
            parts = [part for part in parts if part not in first.halves] + [first]
        return parts

    def _formed(self, tree: Tree, cost: Cost) -> Part:
        """The product formed by an order."""
        if not isinstance(tree, tuple):
            return self.leaves[tree]
        left, right = (self._formed(branch, cost) for branch in tree)
        joined = self._joined(left, right, cost)
        assert joined is not None
        return joined

    def _joined(self, left: Part, right: Part, cost: Cost) -> Part | None:
        """The product of two parts, or None if it is not allowed."""
        both = left.operands | right.operands
        kept = self._kept(left.indices, right.indices, both)
        return None if kept is None else Part(both, kept, cost(left, right, kept), (left, right))

    # ---- costs of two parts and of their product, which keeps some of their indices --------------------

    def _flops(self, left: Part, right: Part, kept: int) -> int:
        if self.free and not (left.operands | right.operands) & ~self.free:
            return 0
        union = left.indices | right.indices
        flops = self.size(union) if kept == union else 2 * self.size(union)
        if self.biased and self.biased in (left.operands, right.operands):
            flops -= flops // self.rows
        return left.cost + right.cost + flops

    def _time(self, left: Part, right: Part, kept: int) -> int:
        flops, both = self._flops(left, right, kept), left.operands | right.operands
        # A copy and an intermediate are written and read once; a folded product is read in every call.
        moved = 0 if left.halves and right.halves else 2 * self._copied(left, right, kept)
        if self.split_vectors and kept == left.indices | right.indices:
            moved += sum(2 * self.size(kept) for part in (left, right) if self._is_spread(part, kept))
        if both != self.everything:
            moved += 2 * self.size(kept)
        if self.free:
            if not both & ~self.free:
                return 0
            moved += sum(self.size(part.indices) for part in (left, right) if not part.operands & ~self.free)
        return flops + self.element * moved

    def _peak(self, left: Part, right: Part, kept: int) -> int:
        held, other = (self.size(part.indices) if part.halves else 0 for part in (left, right))
        first, second = left.cost // MORE_THAN_FLOPS, right.cost // MORE_THAN_FLOPS
        # The part that leads to the lower peak is formed first.
        forming = min(max(first, held + second), max(second, other + first))
        peak = max(forming, held + other + self.size(kept) + self._copied(left, right, kept))
        return MORE_THAN_FLOPS * peak + self._flops(left, right, kept) % MORE_THAN_FLOPS

    def _copied(self, left: Part, right: Part, kept: int) -> int:
        """Elements of operands that a product copies because it cannot read them in place."""
        copied = 0
        for part, other in ((left, right), (right, left)):
            summed, shared = part.indices & ~kept, part.indices & other.indices & kept
            if not part.halves and not self.is_read(part.operands, summed, shared):
                copied += self.size(part.indices)
        return copied

    def _is_spread(self, part: Part, kept: int) -> bool:
        """Whether an elementwise product repeats a split vector along further indices.

        A later product over one of its parts then reads smaller matrices, which costs about as much as a
        copy.
        """
        return part.operands in self.split_vectors and kept != part.indices

    def _is_read(self, operand: int, summed: int, shared: int) -> bool:
        axes = self.memory_orders[operand.bit_length() - 1]
        kinds = ["summed" if x & summed else "shared" if x & shared else "free" for x in axes]
        return is_read_in_place(kinds) or bool(stack_of(axes, kinds, self.batch))

    # ---- the indices of a product, and whether it is allowed -------------------------------------------

    def _kept(self, left: int, right: int, both: int) -> int | None:
        """Indices of the product of two parts with these indices; None if it is not allowed.

        If the parts share no index, joining them to the rest one after the other never costs more, unless no
        index of one part is summed later, all indices of both are summed later, or the weight is formed.
        """
        both_are_summed = left & ~self.output and right & ~self.output
        if (
            left & right
            or self.forms_weight
            or not both_are_summed
            or not (self._lasting(left) or self._lasting(right))
        ):
            return self.indices(both)
        return None

    def _lasting(self, indices: int) -> int:
        """Indices that are not summed soon: of the result (except a batch of one row) and of the weight."""
        batch = self.batch if self.extents[0] == 1 else 0
        return indices & (self.output & ~batch | (0 if indices & self.batch else self.modes))

    def _indices(self, operands: int) -> int | None:
        """Indices of a product: those of its operands that other operands need; None if it is not allowed."""
        inside, outside = 0, self.output
        for leaf in self.leaves:
            if leaf.operands & operands:
                inside |= leaf.indices
            else:
                outside |= leaf.indices
        kept, weights = inside & outside, operands & self.weights
        is_admitted = operands == self.everything or not (
            self.size(kept) > self.limit
            or (self.forbidden and kept & self.forbidden == self.forbidden)
            or (operands & self.biased and kept & self.input)
            or (self.forms_weight and weights not in (0, self.weights, operands))
        )
        return kept if is_admitted else None

    def _size(self, indices: int) -> int:
        if not indices:
            return 1
        last = indices.bit_length() - 1
        return self.extents[last] * self.size(indices ^ 1 << last)
