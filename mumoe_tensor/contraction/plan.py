"""Plans: the steps of a contraction and their cost, computed from index names and sizes.

FLOPs count multiplications and additions separately: 2mnk for a matrix product, and the size of the result
for an elementwise product. A bias row is added within its product and has no separate FLOPs. All other
figures are numbers of elements, or of bytes if a dtype is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import inf, prod
from typing import Any, Literal, NamedTuple, Unpack, get_args

from mumoe_tensor.checks import as_integer, as_positive, check_choice, check_flag
from mumoe_tensor.contraction.layout import Compiler, Kind, Program
from mumoe_tensor.contraction.machine import CPU, ITEMSIZE, AnyMachine, Machine, as_machine, predicted
from mumoe_tensor.contraction.network import Indices, Network, forward_networks
from mumoe_tensor.contraction.order import Objective, Orders, Search
from mumoe_tensor.formats.registry import AnyFormat
from mumoe_tensor.spec import LayerSpec, Sizes, as_spec
from mumoe_tensor.text_table import text_table

Implementation = Literal["factorized", "reconstructed", "auto"]

#: ``minimize="time"`` accepts at most this multiple of the fewest FLOPs.
EXTRA_FLOPS = 1.05


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
    read : int
        Elements of both operands.
    write : int
        Elements written: the result and the permuted copies made for it.
    copied : int
        Elements of these copies.
    saved : int
        Elements of the operands stored for the backward pass, without parameters and inputs.
    live : int
        Elements in memory while the step runs, without parameters and inputs.
    constant : bool
        Whether the step multiplies only weights.
    spread : int
        Elements of an elementwise product that repeats a split vector along further indices. A later product
        then reads smaller matrices, which costs about as much as a copy.
    """

    axes: tuple[Indices, Indices, Indices]
    kind: Kind
    shape: tuple[int, ...]
    flops: int
    read: int
    write: int
    copied: int
    saved: int
    live: int
    constant: bool
    spread: int

    @property
    def equation(self) -> str:
        """The product in index notation, e.g. ``"B n1, n1 r -> B r"``."""
        left, right, result = (" ".join(axes) for axes in self.axes)
        return f"{left}, {right} -> {result}"

    @property
    def size(self) -> int:
        """Elements of the result."""
        return prod(self.shape)

    @property
    def moved(self) -> int:
        """Elements read or written, including the reads for copies and the equivalent of `spread`."""
        return self.read + self.write + self.copied + 2 * self.spread


def planned_steps(program: Program, batch: int) -> tuple[PlannedStep, ...]:
    """Shapes, FLOPs and memory traffic of a program's steps at a batch size."""
    sizes = program.network.sizes_at(batch)
    network = program.network
    padded = {network.weights + k for k, reading in enumerate(network.readings) if reading.padding}
    vectors = list(enumerate(network.squeezed.operands))[network.weights :]
    split_vectors = {k: axes for k, axes in vectors if len(axes) > 2}
    alive: dict[int, int] = {}
    planned = []
    for position, step in program.numbered:
        extent = dict(sizes)
        if step.bias is not None:
            extent["i"] -= 1
        operands = (step.left, step.right)
        read = copied = saved = 0
        for side, operand in enumerate(operands):
            has_row = step.bias is not None and step.bias.side == side
            read += prod((sizes if has_row else extent)[x] for x in operand.indices)
            elements = prod(extent[x] for x in operand.indices)
            # The bias row is in memory even if it is not part of the product.
            if operand.position in padded:
                copied += elements
            if step.kind != "mul" and operand.is_reordered(sizes):
                copied += elements
            saved += elements if operand.is_stored_anew(sizes) else alive.get(operand.position, 0)
        if position == program.result and program.output_is_copied:
            copied += prod(sizes[x] for x in step.output)
        volume = prod(extent[x] for x in step.indices)
        shape = tuple(sizes[x] for x in step.output)
        alive[position] = prod(shape)
        live = sum(alive.values()) + copied
        is_spread = step.kind == "mul" and any(
            len(step.output) > len(split_vectors.get(operand.position, step.output)) for operand in operands
        )
        for operand in operands:
            alive.pop(operand.position, None)
        planned.append(
            PlannedStep(
                axes=(step.left.indices, step.right.indices, step.output),
                kind=step.kind,
                shape=shape,
                flops=volume * (1 if step.kind == "mul" else 2),
                read=read,
                write=prod(shape) + copied,
                copied=copied,
                saved=saved,
                live=live,
                constant=position in program.constant,
                spread=prod(shape) if is_spread else 0,
            )
        )
    return tuple(planned)


@dataclass(frozen=True)
class ContractionPlan:
    """The plan of a contraction for a multilinear mixture of experts, with its cost.

    Attributes
    ----------
    program : Program
        The program for `execute`.
    batch : int
        Batch size for which the figures are computed; the program runs at any batch size.
    implementation : {"factorized", "reconstructed"}
    minimize : {"time", "flops", "peak"}
    search : {"exact", "vectors first", "greedy"}
        The orders that were searched: all; those that first multiply each mode's vector by the mode's factor;
        or those that start with the cheapest products.
    fold_weights : bool
        Whether products that involve only weights are computed in advance. If so, only `constant_steps`
        includes them.
    dtype : str or None
        Unit of `write`, `size`, `peak` and `saved`: bytes in this dtype, or elements if None.
    machine : Machine
        The machine for `time` and `seconds`.
    """

    program: Program
    batch: int
    implementation: str
    minimize: Objective
    search: Search = "exact"
    fold_weights: bool = False
    dtype: str | None = None
    machine: Machine = CPU

    @cached_property
    def _planned(self) -> tuple[PlannedStep, ...]:
        return planned_steps(self.program, self.batch)

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """Pairwise products of a call, in order."""
        return tuple(s for s in self._planned if not (s.constant and self.fold_weights))

    @property
    def constant_steps(self) -> tuple[PlannedStep, ...]:
        """Products of weights that are computed in advance."""
        return tuple(s for s in self._planned if s.constant and self.fold_weights)

    @property
    def itemsize(self) -> int:
        """Bytes per element, or 1 if the unit is elements."""
        return ITEMSIZE[self.dtype] if self.dtype else 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return sum(s.flops for s in self.steps)

    @property
    def time(self) -> int:
        """The objective of ``minimize="time"``: FLOPs, plus ``machine.element`` for each element moved."""
        return sum(s.flops + self.machine.element * s.moved for s in self.steps)

    @property
    def seconds(self) -> float:
        """Predicted time in seconds: for each step the longer of computing and moving, plus a launch."""
        return sum(self.machine.seconds(s.flops, s.moved) for s in self.steps)

    @property
    def write(self) -> int:
        """Elements (or bytes) written by all steps, including copies."""
        return sum(s.write for s in self.steps) * self.itemsize

    @property
    def copied(self) -> int:
        """Elements (or bytes) written to permuted copies."""
        return sum(s.copied for s in self.steps) * self.itemsize

    @property
    def size(self) -> int:
        """Size of the largest intermediate; the final result is not an intermediate."""
        return max((s.size for s in self.steps[:-1]), default=0) * self.itemsize

    @property
    def peak(self) -> int:
        """Peak memory, without parameters and inputs."""
        return max((s.live for s in self.steps), default=0) * self.itemsize

    @property
    def saved(self) -> int:
        """Memory kept for the backward pass, without parameters, coefficients and inputs."""
        return sum(s.saved for s in self.steps) * self.itemsize

    @property
    def terms(self) -> tuple[ContractionPlan, ...]:
        """The plans of the terms of a sum, as in `SumPlan`; for a single network, only this plan."""
        return (self,)

    def __str__(self) -> str:
        unit = "bytes" if self.dtype else "elements"
        rows = [("", "product", "kind", "FLOPs", "result", "copied", "live")]
        for k, s in enumerate(self._planned, start=1):
            shape = " x ".join(f"{n:,}" for n in s.shape)
            figures = (f"{s.copied * self.itemsize:,}", f"{s.live * self.itemsize:,}")
            ahead = "ahead" if s.constant and self.fold_weights else str(k)
            rows.append((ahead, s.equation, s.kind, f"{s.flops:,}", shape, *figures))
        head = f"{self.implementation}, batch {self.batch:,}, least {self.minimize}"
        if self.search != "exact":
            head += f" ({self.search})"
        totals = ("write", "size", "peak", "saved")
        foot = ", ".join(f"{name} {getattr(self, name):,}" for name in totals)
        total = f"FLOPs {self.flops:,}; {foot} {unit}"
        table = text_table(rows, "><<><>>")
        return "\n".join([head, table, total, predicted(self.seconds, self.machine)])


@dataclass(frozen=True)
class SumPlan:
    """The plan of a sum of tensor networks: one plan per term, whose results are added.

    The figures are as in `ContractionPlan`, summed over the terms (for `size` and `peak`, the maximum), and
    include the additions.

    Attributes
    ----------
    terms : tuple of ContractionPlan
    out_features : int
    """

    terms: tuple[ContractionPlan, ...]
    out_features: int

    @property
    def batch(self) -> int:
        """Batch size for which the figures are computed."""
        return self.terms[0].batch

    @property
    def minimize(self) -> Objective:
        """The objective of the plan of each term."""
        return self.terms[0].minimize

    @property
    def implementation(self) -> str:
        """The implementations of the terms, each named once."""
        return ", ".join(dict.fromkeys(plan.implementation for plan in self.terms))

    @property
    def dtype(self) -> str | None:
        """Unit of memory: bytes in this dtype, or elements if None."""
        return self.terms[0].dtype

    @property
    def itemsize(self) -> int:
        """Bytes per element, or 1 if the unit is elements."""
        return self.terms[0].itemsize

    @property
    def machine(self) -> Machine:
        """The machine for `time` and `seconds`."""
        return self.terms[0].machine

    @property
    def _added(self) -> int:
        """Number of additions, and of the elements that they write."""
        return (len(self.terms) - 1) * self.batch * self.out_features

    @property
    def _held(self) -> int:
        """Memory for the result of a term, or for the sum so far."""
        return self.batch * self.out_features * self.itemsize

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """Pairwise products of a call, in order."""
        return tuple(step for plan in self.terms for step in plan.steps)

    @property
    def constant_steps(self) -> tuple[PlannedStep, ...]:
        """Products of weights that are computed in advance."""
        return tuple(step for plan in self.terms for step in plan.constant_steps)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return sum(plan.flops for plan in self.terms) + self._added

    @property
    def time(self) -> int:
        """FLOPs, plus ``machine.element`` for each element moved."""
        return sum(plan.time for plan in self.terms) + (1 + 3 * self.machine.element) * self._added

    @property
    def seconds(self) -> float:
        """Predicted time in seconds of all terms and their additions."""
        once = self.machine.seconds(0, 3 * self.batch * self.out_features)
        return sum(plan.seconds for plan in self.terms) + (len(self.terms) - 1) * once

    @property
    def write(self) -> int:
        """Elements (or bytes) written by all steps, including copies."""
        return sum(plan.write for plan in self.terms) + self._added * self.itemsize

    @property
    def copied(self) -> int:
        """Elements (or bytes) written to permuted copies."""
        return sum(plan.copied for plan in self.terms)

    @property
    def size(self) -> int:
        """Size of the largest intermediate; the result of a term is an intermediate."""
        return max(self._held, *(plan.size for plan in self.terms))

    @property
    def peak(self) -> int:
        """Peak memory, including the partial sum, without parameters and inputs."""
        return max(plan.peak + (self._held if k else 0) for k, plan in enumerate(self.terms))

    @property
    def saved(self) -> int:
        """Memory kept for the backward pass, without parameters, coefficients and inputs."""
        return sum(plan.saved for plan in self.terms)

    def __str__(self) -> str:
        unit = "bytes" if self.dtype else "elements"
        totals = ", ".join(f"{name} {getattr(self, name):,}" for name in ("write", "size", "peak", "saved"))
        parts = [f"term {k}: {plan}" for k, plan in enumerate(self.terms)]
        total = f"sum of {len(self.terms)} terms: FLOPs {self.flops:,}; {totals} {unit}"
        return "\n\n".join([*parts, f"{total}\n{predicted(self.seconds, self.machine)}"])


Plan = ContractionPlan | SumPlan


def plan_network(
    network: Network,
    batch: int,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    fold_weights: bool = False,
    dtype: str | None = None,
    machine: AnyMachine = "cpu",
) -> ContractionPlan:
    """Plan the contraction of a forward network; see `plan` for the parameters."""
    check_choice(minimize, get_args(Objective), "minimize")
    check_choice(implementation, get_args(Implementation), "implementation")
    check_flag(fold_weights, "fold_weights")
    check_choice(dtype, (None, *ITEMSIZE), "dtype")
    if memory_limit is not None:
        memory_limit = as_positive(memory_limit, "memory_limit") // (ITEMSIZE[dtype] if dtype else 1)
    options = (memory_limit, fold_weights, dtype, as_machine(machine, dtype))
    return _plan_network(network, batch, minimize, implementation, *options)


@lru_cache(maxsize=4096)
def _plan_network(
    network: Network,
    batch: int,
    minimize: Objective,
    implementation: Implementation,
    memory_limit: int | None,
    fold_weights: bool,
    dtype: str | None,
    machine: Machine,
) -> ContractionPlan:
    rows = max(batch, 1)
    limit = inf if memory_limit is None else memory_limit
    compiler = Compiler(network, rows)
    plans = []
    for name in ("factorized", "reconstructed"):
        if implementation in (name, "auto"):
            # Folding does not change the reconstructed order: the weight is formed at the lowest cost anyway.
            orders = Orders(network, rows, name, fold_weights and name == "factorized", limit, machine)
            fewest = orders.best("flops")
            if not fewest and limit == inf:
                # Every order has an intermediate with all modes of the weight, because its factors do.
                orders = Orders(network, rows, None, fold_weights, machine=machine)
                fewest = orders.best("flops")
            better = orders.best(minimize, fewest[0]) if fewest and minimize != "flops" else None
            plans += [
                ContractionPlan(compiler(tree), rows, name, minimize, search, fold_weights, None, machine)
                for tree, search in filter(None, (fewest, better))
            ]
    if not plans:
        raise ValueError(
            f"some order must keep every intermediate within memory_limit; none does at batch {batch} "
            f"with {memory_limit} elements."
        )
    if minimize == "flops":
        best = min(plans, key=lambda plan: (plan.flops, plan.time))
    elif minimize == "time":
        most = EXTRA_FLOPS * min(plan.flops for plan in plans)
        best = min((plan for plan in plans if plan.flops <= most), key=lambda plan: plan.time)
    else:
        best = min(plans, key=lambda plan: (plan.peak, plan.flops))
    return replace(best, batch=batch, dtype=dtype)


def plan(
    format: AnyFormat | LayerSpec,
    *,
    batch: int = 1,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    fold_weights: bool = False,
    dtype: str | None = None,
    machine: AnyMachine = "cpu",
    **sizes: Unpack[Sizes],
) -> Plan:
    """Plan the forward pass of a layer of experts, without its gate.

    The plan is made for one batch size, but its program runs at any batch size. The search is exact for up to
    12 factors and vectors. For larger networks, the attribute ``search`` of the plan names the search that
    was used.

    Parameters
    ----------
    format : str, Format or LayerSpec
        A single layer: its spec, or its format together with `sizes`.
    batch : int, default 1
        Batch size.
    minimize : {"time", "flops", "peak"}, default "time"
        ``"time"`` minimises FLOPs plus the cost of moving elements on the machine, including copies, with at
        most 5 % more FLOPs than the minimum. ``"flops"`` minimises FLOPs. ``"peak"`` minimises the peak
        number of elements in memory.
    implementation : {"factorized", "reconstructed", "auto"}, default "factorized"
        ``"factorized"``: no intermediate has all of the expert, input and output modes.
        ``"reconstructed"``: the weight tensor is formed first. ``"auto"``: the cheaper of the two.
    memory_limit : int, optional
        Largest size of an intermediate, in elements, or in bytes of `dtype`.
    fold_weights : bool, default False
        Exclude products of weights from the cost, since they are computed once, before the calls.
    dtype : {"float64", "float32", "bfloat16", "float16"}, optional
        Report bytes in this dtype instead of elements. A machine given by name computes in this dtype, by
        default float32.
    machine : str, Machine or mapping, default "cpu"
        The machine to plan for: ``"cpu"`` (one core), ``"cuda"``, ``"h200"``, a `Machine` or its attributes.
    **sizes
        The arguments of a `LayerSpec`, unless `format` is one.

    Returns
    -------
    ContractionPlan, or SumPlan for a format that is a sum

    Raises
    ------
    ValueError
        If a size is not positive, the rank does not fit the format, an option is unknown, the machine has
        another dtype, no order stays within `memory_limit`, or the spec describes a block (plan each of its
        `layers`).
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
    predicted time 74.4 us at 160 GFLOP/s, 20 GB/s, float32
    """
    spec = as_spec(format, **sizes)
    batch = as_integer(batch, "batch") and as_positive(batch, "batch, if not zero,")
    options = (minimize, implementation, memory_limit, fold_weights, dtype, machine)
    return plan_terms(networks_of(spec), batch, *options)


def networks_of(spec: LayerSpec) -> tuple[Network, ...]:
    """The network of each term of a single layer, without optional factors."""
    format = spec.weight_format
    return forward_networks(
        format, spec.mode_sizes, spec.full_rank, format.optional(spec.num_levels), spec.bias
    )


def plan_terms(networks: Sequence[Network], *options: Any) -> Plan:
    """Plan each term of a weight; for the options, see `plan_network`."""
    plans = tuple(plan_network(network, *options) for network in networks)
    if len(plans) == 1:
        return plans[0]
    sizes = dict(networks[0].index_sizes)
    out = networks[0].out_features or sizes["o"]
    return SumPlan(plans, out)
