"""What a layer costs, from its sizes alone: the plan's figures beside the closed forms of the literature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, prod
from typing import Literal

from mumoe_tensor.checks import as_positive, check_flag
from mumoe_tensor.contraction.plan import ContractionPlan, Implementation, plan
from mumoe_tensor.contraction.search import Objective
from mumoe_tensor.formats.base import Format, check_modes, mode_names
from mumoe_tensor.formats.registry import get_format


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
    format: str | Format,
    *,
    experts: int | Sequence[int],
    in_features: int,
    out_features: int,
    rank: int | Sequence[int] | None = None,
    hidden: int | None = None,
    bias: bool = False,
    gate: bool = False,
    batch: int = 1,
    minimize: Objective = "time",
    implementation: Implementation = "factorized",
    memory_limit: int | None = None,
    constants: Literal["weights"] | None = None,
    dtype: str | None = None,
) -> Cost:
    """Cost of a multilinear mixture of experts, or of a block of two.

    Parameters
    ----------
    format : str or Format
    experts : int or sequence of int
        Number of experts, one number a level; ``()`` for no level.
    in_features, out_features : int
    rank : int or sequence of int, optional
        One entry a bond of the format; see `Format.bonds`.
    hidden : int, optional
        Count two layers, ``in_features`` to `hidden` to ``out_features``, of the same rank, which share
        the gate's coefficients.
    bias : bool, default False
        Whether the input mode has the bias as one more row.
    gate : bool, default False
        Count the gate: a matrix ``in_features x experts`` a level, without bias.
    batch, minimize, implementation, memory_limit, constants, dtype : optional
        See `plan`.

    Returns
    -------
    Cost

    Raises
    ------
    ValueError, TypeError
        As `plan`.

    Examples
    --------
    >>> import mumoe_tensor as mt
    >>> head = dict(experts=16, in_features=768, out_features=1000, bias=True, gate=True)
    >>> print(mt.cost("cp", rank=424, **head))
    769,128 parameters (12,288 of the gate), 1,537,832 FLOPs, largest expert rank 424
    write 2,272, size 424, peak 1,424, saved 1,272 elements
    """
    format = get_format(format)
    check_flag(gate, "gate")
    experts = check_modes(experts, in_features, out_features)[:-2]
    entries = format.full_rank(rank, len(experts))
    gate_size = in_features * sum(experts) if gate else 0
    layers = []
    for inner, outer in layer_sizes(in_features, hidden, out_features):
        planned = plan(
            format,
            experts=experts,
            in_features=inner,
            out_features=outer,
            rank=entries,
            batch=batch,
            bias=bias,
            minimize=minimize,
            implementation=implementation,
            memory_limit=memory_limit,
            constants=constants,
            dtype=dtype,
        )
        modes = check_modes(experts, inner, outer, bias)
        reference = format.reference_flops(check_modes(experts, inner, outer), entries)
        layers.append(
            LayerCost(
                parameters=parameters(format, modes, entries),
                max_expert_rank=max_expert_rank(format, check_modes(experts, inner, outer), entries),
                reference_flops=None if reference is None else batch * reference,
                plan=planned,
            )
        )
    return Cost(tuple(layers), gate_size, 2 * batch * gate_size, 2 * batch * hidden if hidden else 0)


def layer_sizes(in_features: int, hidden: int | None, out_features: int) -> list[tuple[int, int]]:
    """Input and output size of each layer."""
    in_features = as_positive(in_features, "in_features")
    out_features = as_positive(out_features, "out_features")
    if hidden is None:
        return [(in_features, out_features)]
    hidden = as_positive(hidden, "hidden")
    return [(in_features, hidden), (hidden, out_features)]


def parameters(format: Format, modes: tuple[int, ...], rank: tuple[int, ...]) -> int:
    """Entries of the factors of a format; unit factors are none."""
    units = format.units(len(modes) - 2)
    return sum(prod(shape) for k, shape in enumerate(format.shapes(modes, rank)) if k not in units)


def max_expert_rank(format: Format, modes: tuple[int, ...], rank: tuple[int, ...]) -> int:
    """Largest rank the matrix of an expert can have.

    With the expert modes sliced the factors are a network between the input and the output. Each way to
    part the factors into a side of the input and a side of the output writes the matrix as a product
    whose inner size is that of the indices with an end on both sides; the smallest is the bound (the min
    cut of Cui et al., "Quantum max-flow/min-cut", 2016, with bonds that join more than two factors
    counted once).

    Parameters
    ----------
    format : Format
    modes : tuple of int
        Sizes of the modes, without the bias row.
    rank : tuple of int
    """
    levels = len(modes) - 2
    sizes = format.sizes(modes, rank)
    experts = mode_names(levels)[:-2]
    factors = [{x for x in f.indices if x not in experts} for f in format.declaration(levels)]
    smallest = inf
    for sides in product((False, True), repeat=len(factors)):
        near = {"i"}.union(*(f for f, side in zip(factors, sides, strict=True) if not side))
        far = {"o"}.union(*(f for f, side in zip(factors, sides, strict=True) if side))
        smallest = min(smallest, prod(sizes[x] for x in near & far))
    return int(smallest)


def dense_parameters(
    in_features: int, out_features: int, hidden: int | None = None, bias: bool = True
) -> int:
    """Parameters of the dense layer, or the dense block of two, that a mixture takes the place of.

    Parameters
    ----------
    in_features, out_features : int
    hidden : int, optional
        Two layers, `in_features` to `hidden` to `out_features`.
    bias : bool, default True

    Raises
    ------
    ValueError, TypeError
        If a size is not a positive integer, or `bias` not a bool.
    """
    check_flag(bias, "bias")
    return sum((inner + bias) * outer for inner, outer in layer_sizes(in_features, hidden, out_features))
