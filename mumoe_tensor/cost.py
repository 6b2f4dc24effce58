"""The cost of a layer, computed from its sizes: by its contraction plan and by published closed forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Unpack

from mumoe_tensor.checks import check_flag
from mumoe_tensor.contraction.machine import AnyMachine, predicted
from mumoe_tensor.contraction.order import Objective
from mumoe_tensor.contraction.plan import Implementation, Plan, plan
from mumoe_tensor.formats.registry import AnyFormat
from mumoe_tensor.spec import LayerSpec, Sizes, as_spec


@dataclass(frozen=True)
class Cost:
    """Cost of a layer or a block, with or without its gate.

    Attributes
    ----------
    spec : LayerSpec
    plans : tuple of ContractionPlan or SumPlan
        The plan of the forward pass of each layer in ``spec.layers``.
    gate : bool
        Whether the gate is included.
    """

    spec: LayerSpec
    plans: tuple[Plan, ...]
    gate: bool = False

    @property
    def parameters(self) -> int:
        """Number of entries of the factors, including bias rows, and of the gate."""
        return self.spec.weight_parameters + self.gate_parameters

    @property
    def gate_parameters(self) -> int:
        """``in_features * sum(experts)``, or 0 without a gate."""
        return self.spec.gate_parameters if self.gate else 0

    @property
    def flops(self) -> int:
        """FLOPs of the layers and of the gate's product; multiplications and additions count separately."""
        return sum(plan.flops for plan in self.plans) + self.gate_flops

    @property
    def gate_flops(self) -> int:
        """FLOPs of the gate's matrix product."""
        return 2 * self.plans[0].batch * self.gate_parameters

    @property
    def seconds(self) -> float:
        """Predicted time in seconds for the layers, a block's activation, and the gate if it is included.

        See `ContractionPlan.seconds`. An activation reads and writes the hidden features.
        """
        first = self.plans[0]
        total = sum(plan.seconds for plan in self.plans) + self.gate_seconds
        if self.spec.hidden is None:
            return total
        # A gated block also multiplies by the gated features: two arrays read, one written.
        moved = (5 if self.spec.gated else 2) * first.batch * self.spec.hidden
        return total + first.machine.seconds(0, moved)

    @property
    def gate_seconds(self) -> float:
        """Predicted time in seconds for the gate's product and the passes over its logits."""
        if not self.gate_parameters:
            return 0.0
        machine, batch = self.plans[0].machine, self.plans[0].batch
        logits = batch * sum(self.spec.experts)
        product = machine.seconds(
            self.gate_flops, batch * self.spec.in_features + self.gate_parameters + logits
        )
        return product + machine.gate_passes * machine.seconds(0, 2 * logits)

    @property
    def reference_flops(self) -> int | None:
        """FLOPs by the closed form of the format (`Format.reference_flops`), or None if it has none."""
        total = self.gate_flops
        spec = self.spec if self.spec.format.has_bias_term else replace(self.spec, bias=False)
        for layer in spec.layers:
            flops = layer.format.closed_form(layer.mode_sizes, layer.full_rank)
            if flops is None:
                return None
            total += self.plans[0].batch * flops
        return total

    @property
    def write(self) -> int:
        """Elements (or bytes) written during the contractions."""
        return sum(plan.write for plan in self.plans)

    @property
    def size(self) -> int:
        """Largest intermediate of a contraction."""
        return max(plan.size for plan in self.plans)

    @property
    def peak(self) -> int:
        """Peak memory of a contraction, without its parameters and inputs."""
        return max(plan.peak for plan in self.plans)

    @property
    def saved(self) -> int:
        """Memory kept for the backward pass, without parameters, coefficients and the first layer's inputs.

        In a block this includes the hidden features before and after the activation. In a gated block it also
        includes the features that multiply them, and the product.
        """
        first = self.plans[0]
        count = 4 if self.spec.gated else 2
        hidden = count * first.batch * (self.spec.hidden or 0) * first.itemsize
        return sum(plan.saved for plan in self.plans) + hidden

    @property
    def max_expert_rank(self) -> int:
        """Largest rank that the matrix of an expert can have; in a block, the smallest over its layers."""
        return self.spec.max_expert_rank

    def __str__(self) -> str:
        gate = f" ({self.gate_parameters:,} of the gate)" if self.gate_parameters else ""
        memory = ", ".join(f"{name} {getattr(self, name):,}" for name in ("write", "size", "peak", "saved"))
        unit = "bytes" if self.plans[0].dtype else "elements"
        time = predicted(self.seconds, self.plans[0].machine)
        padded = "".join(
            f"\n{name} {size:,} padded to {held:,}" for name, (size, held) in self.spec.padding.items()
        )
        return (
            f"{self.parameters:,} parameters{gate}, {self.flops:,} FLOPs, largest expert rank "
            f"{self.max_expert_rank:,}\n{memory} {unit}\n{time}{padded}"
        )


def cost(
    format: AnyFormat | LayerSpec,
    *,
    gate: bool = False,
    batch: int = 1,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    fold_weights: bool = False,
    dtype: str | None = None,
    machine: AnyMachine = "cpu",
    **sizes: Unpack[Sizes],
) -> Cost:
    """Cost of a layer of experts or of a block; the gate is included only with ``gate=True``.

    Parameters
    ----------
    format : str, Format or LayerSpec
        A format together with `sizes`, or the spec of a layer or a block.
    gate : bool, default False
        Include the gate of `.nn.MuMoE`: one matrix ``in_features x experts`` per level, without bias.
    batch, minimize, implementation, memory_limit, fold_weights, dtype, machine : optional
        See `plan`.
    **sizes
        The arguments of a `LayerSpec`, unless `format` is one. Biases are counted with ``bias=True``.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> head = mt.LayerSpec("cp", experts=16, in_features=768, out_features=1000, rank=424, bias=True)
    >>> print(mt.cost(head, gate=True))
    769,128 parameters (12,288 of the gate), 1,537,832 FLOPs, largest expert rank 424
    write 2,272, size 424, peak 1,424, saved 1,272 elements
    predicted time 515 us at 160 GFLOP/s, 20 GB/s, float32
    """
    spec = as_spec(format, **sizes)
    check_flag(gate, "gate")
    plans = tuple(
        plan(
            layer,
            batch=batch,
            minimize=minimize,
            implementation=implementation,
            memory_limit=memory_limit,
            fold_weights=fold_weights,
            dtype=dtype,
            machine=machine,
        )
        for layer in spec.layers
    )
    return Cost(spec, plans, gate)
