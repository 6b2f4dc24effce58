"""What a contraction will do and cost, known from subscripts and sizes alone.

FLOPs count multiply and add apart: 2mnk for a product, the size of the result for an elementwise one. A
bias row is added inside its product, at no FLOPs of its own. Everything else counts elements, or bytes
where a dtype is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, prod
from typing import Literal, NamedTuple, Unpack

from mumoe_tensor.checks import as_positive, check_choice
from mumoe_tensor.contraction.layout import Compiler, Kind, Program
from mumoe_tensor.contraction.network import Indices, Network, forward_network
from mumoe_tensor.contraction.search import (
    ELEMENT,
    Case,
    Objective,
    SearchSpace,
    best_at_any_batch,
    best_trees,
    peaks_of,
    substitute,
)
from mumoe_tensor.formats.base import BATCH, Format, Tree
from mumoe_tensor.spec import LayerSpec, Sizes, as_spec

Implementation = Literal["factorized", "reconstructed", "auto"]

#: Bytes of an element.
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
#: ``minimize="time"`` takes an order of at most this multiple of the fewest FLOPs.
EXTRA_FLOPS = 1.05
#: Batch sizes at which the order of the smallest peak is searched ahead.
PEAK_BATCHES = (1, 256, 65_536)
#: Batch sizes at which copies of weights and of intermediates are weighed against each other.
LAYOUT_BATCHES = (1, 65_536)


class PlannedStep(NamedTuple):
    """One pairwise product at a batch size.

    Attributes
    ----------
    axes : tuple of tuple of str
        Axes of both operands and of the result.
    kind : {"mm", "bmm", "mul"}
    shape : tuple of int
        Shape of the result.
    flops : int
    write : int
        Elements written: the result and the permuted copies made for it.
    copied : int
        Elements of those copies.
    saved : int
        Elements of the operands kept for the backward pass, parameters and inputs left out.
    live : int
        Elements live while the step runs, parameters and inputs left out.
    constant : bool
        True for a product of weights alone.
    """

    axes: tuple[Indices, Indices, Indices]
    kind: Kind
    shape: tuple[int, ...]
    flops: int
    write: int
    copied: int
    saved: int
    live: int
    constant: bool

    @property
    def equation(self) -> str:
        """The axes written out, e.g. ``"B n1, n1 r -> B r"``."""
        left, right, result = (" ".join(axes) for axes in self.axes)
        return f"{left}, {right} -> {result}"

    @property
    def size(self) -> int:
        """Elements of the result."""
        return prod(self.shape)


def planned_steps(program: Program, batch: int) -> tuple[PlannedStep, ...]:
    """Evaluate a program at a batch size."""
    network = program.network
    sizes = {**dict(network.sizes), BATCH: batch}
    leaves = len(network.operands)
    alive: dict[int, int] = {}
    constant = dict.fromkeys(range(network.weights), True)
    planned = []
    for position, step in enumerate(program.steps, start=leaves):
        extent = dict(sizes)
        if step.bias is not None:
            extent["i"] -= 1
        operands = (step.left, step.right)
        copied = saved = 0
        for operand in operands:
            elements = prod(extent[x] for x in operand.indices)
            # (The bias row takes its place in memory also where it takes no part.)
            if step.kind != "mul" and operand.is_reordered(sizes):
                copied += elements
            saved += elements if operand.is_stored_anew(sizes) else alive.get(operand.position, 0)
        volume = prod(extent[x] for x in step.indices)
        shape = tuple(sizes[x] for x in step.output)
        alive[position] = prod(shape)
        live = sum(alive.values()) + copied
        for operand in operands:
            alive.pop(operand.position, None)
        constant[position] = all(constant.get(o.position, False) for o in operands)
        planned.append(
            PlannedStep(
                axes=(step.left.indices, step.right.indices, step.output),
                kind=step.kind,
                shape=shape,
                flops=volume * (1 if step.kind == "mul" else 2),
                write=prod(shape) + copied,
                copied=copied,
                saved=saved,
                live=live,
                constant=constant[position],
            )
        )
    return tuple(planned)


@dataclass(frozen=True)
class ContractionPlan:
    """How a multilinear mixture of experts will be contracted, and what that costs.

    Attributes
    ----------
    program : Program
        What `execute` runs.
    batch : int
        Batch size the figures are for; the program runs at any.
    implementation : {"factorized", "reconstructed"}
    minimize : {"time", "flops", "peak"}
    constants : {"weights"} or None
        With ``"weights"`` the products of weights alone are made ahead and left out of every figure but
        those of `constant_steps`.
    dtype : str or None
        Unit of `write`, `size`, `peak` and `saved`: bytes of this dtype, or elements.
    """

    program: Program
    batch: int
    implementation: str
    minimize: str
    constants: str | None = None
    dtype: str | None = None

    @cached_property
    def _planned(self) -> tuple[PlannedStep, ...]:
        return planned_steps(self.program, self.batch)

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """Pairwise products of a call, in their order."""
        return tuple(s for s in self._planned if not (s.constant and self.constants))

    @property
    def constant_steps(self) -> tuple[PlannedStep, ...]:
        """Products of weights alone that are folded ahead."""
        return tuple(s for s in self._planned if s.constant and self.constants)

    @property
    def itemsize(self) -> int:
        """Bytes of an element, or 1 where elements are counted."""
        return ITEMSIZE[self.dtype] if self.dtype else 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return sum(s.flops for s in self.steps)

    @property
    def write(self) -> int:
        """Written by all steps, copies included."""
        return sum(s.write for s in self.steps) * self.itemsize

    @property
    def copied(self) -> int:
        """Written into permuted copies."""
        return sum(s.copied for s in self.steps) * self.itemsize

    @property
    def size(self) -> int:
        """Largest intermediate; the final result is none."""
        return max((s.size for s in self.steps[:-1]), default=0) * self.itemsize

    @property
    def peak(self) -> int:
        """Most that is live at once besides parameters and inputs."""
        return max((s.live for s in self.steps), default=0) * self.itemsize

    @property
    def saved(self) -> int:
        """Kept for the backward pass besides parameters, coefficients and inputs."""
        return sum(s.saved for s in self.steps) * self.itemsize

    def __str__(self) -> str:
        unit = "bytes" if self.dtype else "elements"
        rows = [("", "product", "kind", "FLOPs", "result", "copied", "live")]
        for k, s in enumerate(self._planned, start=1):
            shape = " x ".join(f"{n:,}" for n in s.shape)
            figures = (f"{s.copied * self.itemsize:,}", f"{s.live * self.itemsize:,}")
            ahead = "ahead" if s.constant and self.constants else str(k)
            rows.append((ahead, s.equation, s.kind, f"{s.flops:,}", shape, *figures))
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        align = (str.rjust, str.ljust, str.ljust, str.rjust, str.ljust, str.rjust, str.rjust)
        lines = ["  ".join(put(x, w) for put, x, w in zip(align, row, widths, strict=True)) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        head = f"{self.implementation}, batch {self.batch:,}, least {self.minimize}"
        totals = ("write", "size", "peak", "saved")
        foot = ", ".join(f"{name} {getattr(self, name):,}" for name in totals)
        return "\n".join([head, *(line.rstrip() for line in lines), f"FLOPs {self.flops:,}; {foot} {unit}"])


class _Candidate(NamedTuple):
    """A program with its FLOPs and its modelled time as lines ``(alpha, beta)`` in the batch size."""

    program: Program
    implementation: str
    flops: tuple[int, int]
    time: tuple[int, int]


def _candidate(program: Program, implementation: str, free: bool) -> _Candidate:
    def costs(batch: int) -> tuple[int, int]:
        sizes = {**dict(program.network.sizes), BATCH: batch}
        flops = time = 0
        for step, planned in zip(program.steps, planned_steps(program, batch), strict=True):
            if free and planned.constant:
                continue
            read = sum(prod(sizes[x] for x in operand.indices) for operand in (step.left, step.right))
            flops += planned.flops
            time += planned.flops + ELEMENT * (read + planned.write + planned.copied)
        return flops, time

    # Costs that add up over the steps are linear in the batch size: two evaluations tell them. (Not at
    # one, where the batch is an axis that needs no copy.)
    lines = [(3 * two - 2 * three, three - two) for two, three in zip(costs(2), costs(3), strict=True)]
    return _Candidate(program, implementation, *lines)


@lru_cache(maxsize=512)
def _candidates(
    network: Network,
    minimize: Objective,
    implementation: Implementation,
    free: bool,
    limit: float,
    batch: int,
) -> tuple[_Candidate, ...]:
    """Search once per network: programs among which the best for every batch size is found.

    With a memory limit what is admitted depends on the batch; only then is `batch` not zero.
    """
    trees: list[tuple[Tree, str]] = []
    if implementation in ("factorized", "auto"):
        modes = tuple(x for operand in network.operands[network.weights :] for x in operand if x != BATCH)
        space = SearchSpace(network, forbidden=(*modes, network.output[-1]), free_weights=free)
        trees += [(tree, "factorized") for tree in _trees(space, minimize, limit, batch)]
    if implementation in ("reconstructed", "auto"):
        trees += [(tree, "reconstructed") for tree in _reconstructed(network, minimize, limit, batch)]
    compilers = [Compiler(network, b) for b in ((batch,) if batch else LAYOUT_BATCHES)]
    programs = {
        (compiler(tree), implementation): None for tree, implementation in trees for compiler in compilers
    }
    return tuple(_candidate(program, implementation, free) for program, implementation in programs)


def _trees(space: SearchSpace, minimize: Objective, limit: float, batch: int) -> list[Tree]:
    elements = [0.0, ELEMENT] if minimize == "time" else [0.0]
    if batch:
        found = best_trees(space, [Case(batch, element) for element in elements], limit)
    else:
        found = [*best_at_any_batch(space, elements)]
    if minimize == "peak":
        batches = (batch,) if batch else PEAK_BATCHES
        known = found[-1] if found else None
        bounds = [inf] * len(batches) if known is None else peaks_of(space, known, batches)
        cases = [Case(b, bound=bound) for b, bound in zip(batches, bounds, strict=True)]
        found += best_trees(space, cases, limit, peak=True)
    return list(dict.fromkeys(tree for tree in found if tree is not None))


def _reconstructed(network: Network, minimize: Objective, limit: float, batch: int) -> list[Tree]:
    """Orders that form the weight tensor first."""
    vectors = network.operands[network.weights :]
    whole = (*(x for v in vectors for x in v if x != BATCH), network.output[-1])
    weight = Network(
        operands=network.operands[: network.weights],
        storage=network.storage[: network.weights],
        output=whole,
        sizes=network.sizes,
        weights=network.weights,
    )
    dense = Network(
        operands=(whole, *vectors),
        storage=(whole, *vectors),
        output=network.output,
        sizes=network.sizes,
        weights=1,
        bias=network.bias,
    )
    if network.weights > 1 and prod(dict(network.sizes)[x] for x in whole) > limit:
        return []
    formed: Tree | None = 0
    if network.weights > 1:
        (formed,) = best_trees(SearchSpace(weight), [Case(1)], limit)
    if formed is None:
        return []
    positions = {0: formed, **{k: network.weights - 1 + k for k in range(1, len(vectors) + 1)}}
    return [substitute(tree, positions) for tree in _trees(SearchSpace(dense), minimize, limit, batch)]


def plan_network(
    network: Network,
    batch: int,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    constants: str | None = None,
    dtype: str | None = None,
) -> ContractionPlan:
    """Plan the contraction of a forward network; see `plan` for the parameters."""
    check_choice(minimize, ("time", "flops", "peak"), "minimize")
    check_choice(implementation, ("factorized", "reconstructed", "auto"), "implementation")
    check_choice(constants, (None, "weights"), "constants")
    check_choice(dtype, (None, *ITEMSIZE), "dtype")
    if memory_limit is not None:
        memory_limit = as_positive(memory_limit, "memory_limit") // (ITEMSIZE[dtype] if dtype else 1)
    return _plan_network(network, batch, minimize, implementation, memory_limit, constants, dtype)


@lru_cache(maxsize=4096)
def _plan_network(
    network: Network,
    batch: int,
    minimize: Objective,
    implementation: Implementation,
    memory_limit: int | None,
    constants: str | None,
    dtype: str | None,
) -> ContractionPlan:
    free = constants == "weights"
    limited = memory_limit is not None
    size = max(batch, 1)
    candidates = _candidates(
        network, minimize, implementation, free, memory_limit if limited else inf, size if limited else 0
    )
    if not candidates:
        raise ValueError(
            f"some order must keep every intermediate within memory_limit; none does at batch {batch} "
            f"with {memory_limit} elements."
        )

    def at(line: tuple[int, int]) -> int:
        return line[0] + line[1] * size

    fewest = min(at(c.flops) for c in candidates)
    if minimize == "flops":
        best = min(candidates, key=lambda c: (at(c.flops), at(c.time)))
    elif minimize == "time":
        affordable = [c for c in candidates if at(c.flops) <= EXTRA_FLOPS * fewest]
        best = min(affordable, key=lambda c: at(c.time))
    else:
        best = min(
            candidates, key=lambda c: (max(s.live for s in planned_steps(c.program, size)), at(c.flops))
        )
    return ContractionPlan(best.program, batch, best.implementation, minimize, constants, dtype)


def plan(
    format: str | Format | LayerSpec,
    *,
    batch: int = 1,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    constants: Literal["weights"] | None = None,
    dtype: str | None = None,
    **sizes: Unpack[Sizes],
) -> ContractionPlan:
    """Plan the forward pass of a layer of experts, without its gate.

    The search is made once for all batch sizes: the orders that are best at some batch are kept, and a
    call with another batch only picks among them.

    Parameters
    ----------
    format : str, Format or LayerSpec
        A single layer: its format, with `sizes` beside it, or its spec.
    batch : int, default 1
        Number of inputs the figures are for.
    minimize : {"time", "flops", "peak"}, default "time"
        ``"time"`` weighs FLOPs and elements moved, copies included, and takes at most 5 % more FLOPs than
        the least. ``"flops"`` takes the fewest. ``"peak"`` takes the order with the fewest elements live
        at once, among those of the fewest FLOPs at any batch and of the least peak at batches 1, 256 and
        65,536.
    implementation : {"factorized", "reconstructed", "auto"}, default "factorized"
        ``"factorized"``: no intermediate carries all of the expert, input and output modes.
        ``"reconstructed"``: the weight tensor is formed first. ``"auto"``: whichever costs less.
    memory_limit : int, optional
        Largest size of an intermediate, in elements, or in bytes of `dtype`.
    constants : {"weights"}, optional
        Leave products of weights alone out of the cost: they are made ahead, once.
    dtype : {"float64", "float32", "bfloat16", "float16"}, optional
        Report bytes of this dtype instead of elements.
    **sizes
        The arguments of a `LayerSpec`, unless `format` is one.

    Returns
    -------
    ContractionPlan

    Raises
    ------
    ValueError
        If a size is not positive, the rank does not fit the format, a choice is unknown, or no order keeps
        within `memory_limit`; for a block, each of whose `layers` has its plan.
    TypeError
        If a size is not an integer.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> print(mt.plan("cp", experts=256, in_features=768, out_features=768, rank=64, batch=8))
    factorized, batch 8, least time
       product            kind    FLOPs  result   copied   live
    -----------------------------------------------------------
    1  B i, i r -> B r    mm    786,432  8 x 64        0    512
    2  B n1, n1 r -> B r  mm    262,144  8 x 64        0  1,024
    3  B r, B r -> B r    mul       512  8 x 64        0  1,536
    4  B r, o r -> B o    mm    786,432  8 x 768       0  6,656
    FLOPs 1,835,520; write 7,680, size 512, peak 6,656, saved 1,536 elements
    """
    spec = as_spec(format, **sizes)
    optional = spec.format.optional(spec.num_levels)
    network = forward_network(spec.format, spec.mode_sizes, spec.full_rank, ones=optional, bias=spec.bias)
    batch = 0 if batch == 0 else as_positive(batch, "batch, if not zero,")
    return plan_network(network, batch, minimize, implementation, memory_limit, constants, dtype)
