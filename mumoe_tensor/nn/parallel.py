"""Tensor parallelism: experts divided over a group of processes along one bond of their format."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.norm import LogitBatchNorm
from mumoe_tensor.tensors import FactorizedTensor

Module = TypeVar("Module", bound=nn.Module)


class CopyToGroup(torch.autograd.Function):
    """Tensors that every process uses with its shard; their gradients are summed over the group."""

    # A single function for all tensors: processes whose shards differ in size may contract in different
    # orders, but must communicate in the same order.
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        views = tuple(tensor.view_as(tensor) for tensor in tensors)
        needed = zip(views, ctx.needs_input_grad[1:], strict=True)
        ctx.mark_non_differentiable(*(view for view, need in needed if not need))
        return views

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(gradients, ctx.needs_input_grad[1:], strict=True)
        return None, *(ReduceFromGroup.apply(ctx.group, dy) if need else None for dy, need in needed)


class ReduceFromGroup(torch.autograd.Function):
    """The sum of a tensor over the group. Everything after it is the same on all processes."""

    @staticmethod
    def forward(ctx: Any, group: Any, term: Tensor) -> Tensor:
        ctx.group = group
        total = term.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *CopyToGroup.apply(ctx.group, gradient)


class ShardedExperts(Experts):
    """The shard of `Experts` on one process of a group: a range of one bond.

    The output is a sum over the bond. Every process computes its part of this sum, from its slices of the
    factors with the bond and from the other factors, which all processes have. The first process adds terms
    of the format without the bond, such as the bias of a format that splits the input.

    The bond is the largest of the format; on a tie, the one whose factors have the most parameters.
    """

    def __init__(self, whole: Experts, group: distributed.ProcessGroup | None):
        num_processes, index = distributed.get_world_size(group), distributed.get_rank(group)
        bonds = whole.spec.weight_format.bonds(len(whole.num_experts))
        if not bonds:
            raise ValueError(f"a format must have a bond to divide; format {whole.format.name!r} has none.")
        sizes = dict(zip(bonds, whole.rank, strict=True))

        def entries(bond: str) -> int:
            pairs = zip(whole.axes, whole.factors, strict=True)
            return sum(factor.numel() for axes, factor in pairs if bond in axes)

        bond = max(bonds, key=lambda x: (sizes[x], entries(x)))
        whole_size = sizes[bond]
        if whole_size < num_processes:
            raise ValueError(
                f"the largest bond must be at least as large as the group of processes; bond {bond!r} of "
                f"rank {whole.rank} has size {whole_size}, the group {num_processes} processes."
            )
        start, stop = (whole_size * k // num_processes for k in (index, index + 1))
        rank = tuple((sizes | {bond: stop - start}).values())
        # On the meta device no values are drawn, so the random states of all processes stay the same.
        super().__init__(
            whole.in_features, whole.out_features, whole.num_experts, whole.format, rank,
            bias=whole.bias, **whole.options, device="meta",
        )  # fmt: skip
        self.group, self.whole_spec, self.bond = group, whole.spec, bond
        self.start, self.size, self.whole_size = start, stop - start, whole_size
        for k, factor in enumerate(whole.factors):
            shard = self._shard_of(k, factor.detach()).clone(memory_format=torch.contiguous_format)
            setattr(self, f"factor_{k}", nn.Parameter(shard, factor.requires_grad))
        self.edits = copy.deepcopy(whole.edits)
        self.train(whole.training)

    def _shard_of(self, k: int, factor: Tensor) -> Tensor:
        """The slice of a whole factor that belongs to this process, as a view."""
        if self.bond not in self.axes[k]:
            return factor
        return factor.narrow(self.axes[k].index(self.bond), self.start, self.size)

    @torch.no_grad()
    def gathered(self) -> Experts:
        """The whole experts, on every process."""
        like = self.factors[0]
        whole = Experts.from_spec(self.whole_spec, **self.options, device="meta", dtype=like.dtype)
        whole.to_empty(device=like.device)
        for k, (factor, shard) in enumerate(zip(whole.factors, self.factors, strict=True)):
            factor.requires_grad_(shard.requires_grad)
            self._shard_of(k, factor.zero_()).copy_(shard)
            if self.bond in self.axes[k]:
                # Shards may differ in size, so each process contributes its shard padded with zeros to a sum.
                distributed.all_reduce(factor.data, group=self.group)
        whole.edits = copy.deepcopy(self.edits)
        return whole.train(self.training)

    @property
    def weight(self) -> FactorizedTensor:
        raise ValueError(
            f"a weight must be whole to be read, set, initialised or saved; this process has a part of bond "
            f"{self.bond!r}, from {self.start} on of {self.whole_size}. Use gather(layer) on every process."
        )

    @weight.setter
    def weight(self, weight: Any) -> None:
        _ = self.weight  # raises the error

    def _mix(
        self, factors: list[Tensor], inputs: tuple[Tensor, ...], coefficients: Sequence[Any], *options: Any
    ) -> Tensor:
        whole = [k for k, axes in enumerate(self.axes) if self.bond not in axes]
        copied = iter(CopyToGroup.apply(self.group, *inputs, *coefficients, *(factors[k] for k in whole)))
        inputs = tuple(islice(copied, len(inputs)))
        coefficients = tuple(islice(copied, len(coefficients)))
        factors = list(factors)
        for k, factor in zip(whole, copied, strict=True):
            factors[k] = factor
        for part in self._terms:
            # A term without the bond is complete on every process: all but the first add zero instead.
            of_term = range(len(factors))[part.factors]
            if distributed.get_rank(self.group) > 0 and set(of_term) <= set(whole):
                factors[of_term[0]] = factors[of_term[0]] * 0
        term = super()._mix(factors, inputs, coefficients, *options)
        total: Tensor = ReduceFromGroup.apply(self.group, term)
        return total

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedExperts:
        memo[id(self.group)] = self.group  # a group cannot be copied
        memo[id(self)] = copied = self.__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bond {self.bond!r} from {self.start} of {self.whole_size}"


def parallelize(module: Module, group: distributed.ProcessGroup | None = None) -> Module:
    """Divide the experts of a layer, or of all layers of a model, over the processes of a group.

    Every process of the group must call this with the same module, and then call the new module with the same
    rows. Each process has a range of the largest bond of all experts (the rank of CP). Outputs and gradients
    equal those of the whole module. Modules other than `Experts` are copied, and have the same gradients on
    every process. Dropout must be the same on every process, so use the same seed. Hooks on `Experts` are
    lost.

    In a sum, one bond of one term is divided; the other terms are complete on every process.

    Parameters
    ----------
    module : Module
        `MuMoE`, `MuMoEMLP`, `Experts`, or a model that contains such layers. It is not changed. All processes
        use the parameters of the first process of the group.
    group : ProcessGroup, optional
        The group of processes, by default all.

    Returns
    -------
    Module
        A new module of the same class. `gather` makes it whole again.

    Raises
    ------
    ValueError
        If the module has no experts, they are already divided, their format has no bond (Hadamard), or the
        largest bond is smaller than the number of processes; or if there is no process group, or it does not
        contain this process.
    """
    if distributed.get_rank(group) < 0:
        raise ValueError(
            f"a process must be in the group to divide a module; process {distributed.get_rank()} is not."
        )
    whole = copy.deepcopy(module)
    experts = [child for child in whole.modules() if isinstance(child, Experts)]
    if not experts or any(isinstance(child, ShardedExperts) for child in experts):
        raise ValueError(
            "a module must have experts that are not divided yet, got "
            f"{type(module).__name__} with {[type(child).__name__ for child in experts]}."
        )
    for tensor in (*whole.parameters(), *whole.buffers()):
        distributed.broadcast(tensor.data, group=group, group_src=0)
    shards = {id(child): ShardedExperts(child, group) for child in experts}
    return _with_experts(whole, shards, distributed.get_world_size(group))


def gather(module: Module) -> Module:
    """Make a whole copy, on every process, of a module divided by `parallelize`.

    All processes of the group must call this together. The copy has the same `state_dict` as a module that
    was never divided.
    """
    whole = {id(m): m.gathered() for m in module.modules() if isinstance(m, ShardedExperts)}
    return _with_experts(module, whole, 1)


def _with_experts(module: Module, experts: dict[int, Any], num_processes: int) -> Module:
    """Copy a module with replaced experts, given by the id of the original ones."""
    copied = copy.deepcopy(module, experts)  # deepcopy uses the replacements in its memo
    for child in copied.modules():
        if isinstance(child, LogitBatchNorm):
            child.copies = num_processes
    return copied
