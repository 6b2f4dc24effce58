"""What a layer costs, from its sizes alone: the plan's figures beside the closed forms of the literature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Unpack

from mumoe_tensor.checks import check_flag
from mumoe_tensor.contraction.plan import ContractionPlan, Implementation, plan
from mumoe_tensor.contraction.search import Objective
from mumoe_tensor.formats.base import Format
from mumoe_tensor.spec import LayerSpec, Sizes, as_spec


@dataclass(frozen=True)
class LayerCost:
    """Cost of one multilinear mixture of experts.

    Attributes
    ----------
    parameters : int
        Entries of the factors, the bias row included.
    max_expert_rank : int
        Largest rank the matrix of an expert can have.
    reference_flops : int or None
        Closed form of the FLOPs: those of the format's reference path.
    plan : ContractionPlan
        The planned forward pass; its figures are those of the layer.
    """

    parameters: int
    max_expert_rank: int
    reference_flops: int | None
    plan: ContractionPlan


@dataclass(frozen=True)
class Cost:
    """Cost of one layer, or of two with a hidden size between them, and of the gate they share.

    Attributes
    ----------
    layers : tuple of LayerCost
    gate_parameters : int
        ``in_features * sum(experts)``, or 0 without a gate.
    gate_flops : int
        FLOPs of the gate's matrix product.
    hidden_elements : int
        Elements of the two activations between the layers, before and after the nonlinearity.
    """

    layers: tuple[LayerCost, ...]
    gate_parameters: int
    gate_flops: int
    hidden_elements: int

    @property
    def parameters(self) -> int:
        """Parameters of layers and gate."""
        return sum(layer.parameters for layer in self.layers) + self.gate_parameters

    @property
    def flops(self) -> int:
        """FLOPs of the planned layers and of the gate's product, multiply and add counted apart."""
        return sum(layer.plan.flops for layer in self.layers) + self.gate_flops

    @property
    def reference_flops(self) -> int | None:
        """The same from the closed forms, or None where the format has none."""
        known = [layer.reference_flops for layer in self.layers]
        return None if None in known else sum(f for f in known if f is not None) + self.gate_flops

    @property
    def write(self) -> int:
        """Elements (or bytes) written by the contractions."""
        return sum(layer.plan.write for layer in self.layers)

    @property
    def size(self) -> int:
        """Largest intermediate of a contraction."""
        return max(layer.plan.size for layer in self.layers)

    @property
    def peak(self) -> int:
        """Most that is live at once in a contraction besides its parameters and inputs."""
        return max(layer.plan.peak for layer in self.layers)

    @property
    def saved(self) -> int:
        """Kept for the backward pass besides parameters, coefficients and the inputs of the first layer."""
        itemsize = self.layers[0].plan.itemsize
        return sum(layer.plan.saved for layer in self.layers) + self.hidden_elements * itemsize

    @property
    def max_expert_rank(self) -> int:
        """Largest rank the matrix of an expert can have, the smaller one of two layers."""
        return min(layer.max_expert_rank for layer in self.layers)

    def __str__(self) -> str:
        gate = f" ({self.gate_parameters:,} of the gate)" if self.gate_parameters else ""
        memory = ", ".join(f"{name} {getattr(self, name):,}" for name in ("write", "size", "peak", "saved"))
        unit = "bytes" if self.layers[0].plan.dtype else "elements"
        return (
            f"{self.parameters:,} parameters{gate}, {self.flops:,} FLOPs, largest expert rank "
            f"{self.max_expert_rank:,}\n{memory} {unit}"
        )


def cost(
    format: str | Format | LayerSpec,
    *,
    gate: bool = False,
    batch: int = 1,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    constants: Literal["weights"] | None = None,
    dtype: str | None = None,
    **sizes: Unpack[Sizes],
) -> Cost:
    """Cost of a layer of experts, or of a block of two; the gate is counted only with ``gate=True``.

    Parameters
    ----------
    format : str, Format or LayerSpec
        A format, with `sizes` beside it, or the spec of a layer or a block.
    gate : bool, default False
        Count the gate, as `.nn.MuMoE` has one: a matrix ``in_features x experts`` a level, without bias.
    batch, minimize, implementation, memory_limit, constants, dtype : optional
        See `plan`.
    **sizes
        The arguments of a `LayerSpec`, unless `format` is one. Biases are counted with ``bias=True``.

    Returns
    -------
    Cost

    Raises
    ------
    ValueError, TypeError
        As `LayerSpec` and `plan`.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> head = mt.LayerSpec("cp", experts=16, in_features=768, out_features=1000, rank=424, bias=True)
    >>> print(mt.cost(head, gate=True))
    769,128 parameters (12,288 of the gate), 1,537,832 FLOPs, largest expert rank 424
    write 2,272, size 424, peak 1,424, saved 1,272 elements
    """
    spec = as_spec(format, **sizes)
    check_flag(gate, "gate")
    layers = []
    for part in spec.layers:
        planned = plan(
            part,
            batch=batch,
            minimize=minimize,
            implementation=implementation,
            memory_limit=memory_limit,
            constants=constants,
            dtype=dtype,
        )
        reference = spec.format.reference_flops(replace(part, bias=False).mode_sizes, spec.full_rank)
        layers.append(
            LayerCost(
                parameters=part.weight_parameters,
                max_expert_rank=part.max_expert_rank,
                reference_flops=None if reference is None else batch * reference,
                plan=planned,
            )
        )
    gate_parameters = spec.gate_parameters if gate else 0
    return Cost(tuple(layers), gate_parameters, 2 * batch * gate_parameters, 2 * batch * (spec.hidden or 0))
