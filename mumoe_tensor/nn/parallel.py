"""Experts divided over the processes of a group, along one bond of their format (tensor parallelism)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from mumoe_tensor.nn.contraction import Activation
from mumoe_tensor.nn.experts import Experts
from mumoe_tensor.nn.norm import LogitBatchNorm
from mumoe_tensor.tensors import FactorizedTensor

Module = TypeVar("Module", bound=nn.Module)


class _Share(torch.autograd.Function):
    """Tensors that all processes have and each uses in its part: their gradients are sums over the parts."""

    # One function for all of them: processes whose parts differ in size may contract in different orders,
    # but must meet in the same order of sums.
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
        return None, *(_Sum.apply(ctx.group, gradient) if need else None for gradient, need in needed)


class _Sum(torch.autograd.Function):
    """The sum of all processes' parts. What follows is the same on each, so a part has its gradient."""

    @staticmethod
    def forward(ctx: Any, group: Any, part: Tensor) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Share.apply(ctx.group, gradient)


class DividedExperts(Experts):
    """The part of `Experts` that one process of a group holds: a range of one bond.

    The output is a sum over the bond, so every process computes its terms, from its slices of the factors
    that have the bond and from the other factors, which all processes have.

    Attributes
    ----------
    bond : str
        The largest bond of the format; of several, the one that most parameters have as an axis.
    start, whole_size : int
        Where the range begins, and the size of the bond before it was divided.
    """

    def __init__(self, whole: Experts, group: distributed.ProcessGroup | None):
        processes, index = distributed.get_world_size(group), distributed.get_rank(group)
        bonds = whole.format.bonds(len(whole.num_experts))
        if not bonds:
            raise ValueError(f"experts are divided along a bond; format {whole.format.name!r} has none.")
        sizes = dict(zip(bonds, whole.rank, strict=True))
        pairs = list(zip(whole.axes, whole.factors, strict=True))
        held = {bond: sum(factor.numel() for axes, factor in pairs if bond in axes) for bond in bonds}
        bond = max(bonds, key=lambda x: (sizes[x], held[x]))
        if sizes[bond] < processes:
            raise ValueError(
                f"the largest bond must be as large as the group of processes; bond {bond!r} of rank "
                f"{whole.rank} has size {sizes[bond]}, the group {processes} processes."
            )
        start, stop = (sizes[bond] * k // processes for k in (index, index + 1))
        # Nothing is drawn on the meta device: processes with parts of different sizes draw the same later.
        super().__init__(
            whole.in_features, whole.out_features, whole.num_experts, whole.format,
            tuple(stop - start if x == bond else size for x, size in sizes.items()),
            bias=whole.bias, init=whole.init, batch_hint=whole.plan.batch,
            recompute=whole.recompute, device="meta",
        )  # fmt: skip
        self.group, self.bond, self.start, self.whole_size = group, bond, start, sizes[bond]
        for k, factor in enumerate(whole.factors):
            part = self._part_of(k, factor.detach()).clone(memory_format=torch.contiguous_format)
            setattr(self, f"factor_{k}", nn.Parameter(part, factor.requires_grad))
        self.edits = copy.deepcopy(whole.edits)
        self.train(whole.training)

    def _part_of(self, k: int, factor: Tensor) -> Tensor:
        """The slice of a whole factor that this process holds, as a view."""
        if self.bond not in self.axes[k]:
            return factor
        size = self.rank[self.format.bonds(len(self.num_experts)).index(self.bond)]
        return factor.narrow(self.axes[k].index(self.bond), self.start, size)

    @torch.no_grad()
    def gathered(self) -> Experts:
        """The whole experts, on every process."""
        bonds = self.format.bonds(len(self.num_experts))
        like = self.factors[0]
        whole = Experts(
            self.in_features, self.out_features, self.num_experts, self.format,
            tuple(self.whole_size if x == self.bond else n for x, n in zip(bonds, self.rank, strict=True)),
            bias=self.bias, init=self.init, batch_hint=self.plan.batch,
            recompute=self.recompute, device="meta", dtype=like.dtype,
        ).to_empty(device=like.device)  # fmt: skip
        for k, (factor, part) in enumerate(zip(whole.factors, self.factors, strict=True)):
            factor.requires_grad_(part.requires_grad)
            if self.bond not in self.axes[k]:
                factor.copy_(part)
                continue
            # Parts may differ in size: each process adds its own to zeros.
            self._part_of(k, factor.zero_()).copy_(part)
            distributed.all_reduce(factor.data, group=self.group)
        whole.edits = copy.deepcopy(self.edits)
        return whole.train(self.training)

    @property
    def weight(self) -> FactorizedTensor:
        if not hasattr(self, "bond"):  # still in the constructor
            return super().weight
        raise ValueError(
            f"a weight must be whole to be looked at, initialised or written; here is a part of bond "
            f"{self.bond!r}, from {self.start} on of {self.whole_size}. Use gather(layer) on every process."
        )

    def forward(
        self,
        z: Tensor,
        coefficients: Sequence[Tensor],
        activation: Activation | None = None,
        sparse_gradient: bool = False,
    ) -> Tensor:
        factors = self.factors
        common = [k for k, axes in enumerate(self.axes) if self.bond not in axes]
        z, *shared = _Share.apply(self.group, z, *coefficients, *(factors[k] for k in common))
        for k, factor in zip(common, shared[len(coefficients) :], strict=True):
            factors[k] = factor
        total: Tensor = _Sum.apply(
            self.group, self._mix(factors, z, shared[: len(coefficients)], activation, sparse_gradient)
        )
        return total if self.edits is None else self.edits(total, coefficients)

    def __deepcopy__(self, memo: dict[int, Any]) -> DividedExperts:
        memo[id(self.group)] = self.group  # a group cannot be copied, and is the same in a copy
        memo[id(self)] = made = self.__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bond {self.bond!r} from {self.start} of {self.whole_size}"


def parallelize(module: Module, group: distributed.ProcessGroup | None = None) -> Module:
    """Divide the experts of a layer, or of all layers of a model, over the processes of a group.

    Every process of the group calls this with the same module, and then calls the new module with the same
    rows. Each holds, of all experts, a range of their largest bond (the rank of CP); outputs and gradients
    are those of the whole module. What is not `Experts` is copied, and its gradients are the same on every
    process. Random choices (dropout) must be so too: seed the processes alike. Hooks on `Experts` are not
    taken over.

    Parameters
    ----------
    module : Module
        `MuMoE`, `MuMoEMLP`, `Experts`, or a model that has some. It is left as it is; on every process that
        of the group's first process counts.
    group : ProcessGroup, optional
        All processes, by default.

    Returns
    -------
    Module
        A new one, of the same class. `gather` makes it whole again.

    Raises
    ------
    ValueError
        If there are no experts, they are divided already, their format has no bond (Hadamard), or the
        largest has fewer terms than there are processes; if there are no processes, or this one is not in
        the group.
    """
    if distributed.get_rank(group) < 0:
        raise ValueError(
            f"who divides a module must be in the group; process {distributed.get_rank()} is not."
        )
    whole = copy.deepcopy(module)
    experts = [child for child in whole.modules() if isinstance(child, Experts)]
    if not experts or any(isinstance(child, DividedExperts) for child in experts):
        raise ValueError(
            "a module must have experts, not divided yet, for them to be divided; got "
            f"{type(module).__name__} with {[type(child).__name__ for child in experts]}."
        )
    for tensor in (*whole.parameters(), *whole.buffers()):
        distributed.broadcast(tensor.data, group=group, group_src=0)
    return _exchange(
        whole,
        {id(child): DividedExperts(child, group) for child in experts},
        distributed.get_world_size(group),
    )


def gather(module: Module) -> Module:
    """Make a module whole again that `parallelize` divided, as a copy on every process.

    All processes of the group call this together.

    Parameters
    ----------
    module : Module

    Returns
    -------
    Module
        A new one, of the same class; its `state_dict` is that of a module never divided.
    """
    divided = [child for child in module.modules() if isinstance(child, DividedExperts)]
    return _exchange(module, {id(child): child.gathered() for child in divided}, 1)


def _exchange(module: Module, instead: dict[int, Any], processes: int) -> Module:
    """A copy of a module with other experts; `instead` has them by the id of the old."""
    made = copy.deepcopy(module, instead)
    for child in made.modules():
        if isinstance(child, LogitBatchNorm):
            child.copies = processes
    return made
