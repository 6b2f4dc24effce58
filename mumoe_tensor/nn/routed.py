"""Experts selected by a router, as in transformers: only a few experts map each input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from mumoe_tensor.calls import autocast_dtype, check_dense, is_recorded
from mumoe_tensor.checks import as_finite, as_positive
from mumoe_tensor.contraction.machine import AnyMachine, Machine
from mumoe_tensor.contraction.network import Indices, Reading, vector_of, weight_network
from mumoe_tensor.contraction.plan import ContractionPlan, Implementation, SumPlan, plan_network
from mumoe_tensor.formats.base import BATCH, Format, Rank, Term
from mumoe_tensor.formats.registry import config_entry, label
from mumoe_tensor.nn.backward import SavePolicy, saved_results
from mumoe_tensor.nn.contraction import contract
from mumoe_tensor.nn.described import register_layer
from mumoe_tensor.nn.experts import Experts, _Planned
from mumoe_tensor.nn.registry import ACTIVATIONS
from mumoe_tensor.nn.states import WholeState
from mumoe_tensor.spec import LayerSpec

#: Fixed time in seconds for calling a single expert.
CALL = 25e-6


@register_layer
class ChosenExperts(Experts):
    """`Experts` of one level that take the index of an expert for each input instead of coefficients.

    Each input is mapped only by its expert, so the cost does not grow with the number of experts. Either all
    inputs are mapped together, after gathering the slices of the factors for each input, or the experts are
    processed one after the other, each with all of its inputs. The planner chooses the faster method for each
    term of the format. (With `torch.compile`, the first method is a single graph; the second has graph
    breaks.)

    The ``plan`` is for `batch_hint` inputs, or for the average share of an expert if experts are processed
    one after the other.
    """

    def _planned_on(self, machine: Machine) -> _Planned:
        spec = self.spec
        if spec.num_levels != 1:
            raise ValueError(f"experts chosen by index must have one level, got {spec.experts}.")
        terms = spec.weight_format.terms(spec.mode_sizes, spec.full_rank)
        routes = tuple(_route(term, spec, self.options["batch_hint"], machine) for term in terms)
        plans = tuple(route.plan for route in routes)
        plan = plans[0] if len(plans) == 1 else SumPlan(plans, spec.out_features)
        return super()._planned_on(machine)._replace(plan=plan, routes=routes)

    @property
    def _routes(self) -> tuple[_Route, ...]:
        return self._planned.routes

    def forward(self, z: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        """Map each input through its expert.

        Parameters
        ----------
        z : Tensor of shape (..., in_features)
        index : Tensor of int, of shape (...)
            The expert of each input.

        Returns
        -------
        Tensor of shape (..., out_features)

        Raises
        ------
        ValueError, TypeError
            If the shapes do not match, the index is not a tensor of integers, or (checked only on a CPU) an
            entry is not the index of an expert.
        """
        check_dense(z)
        check_dense(index)
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"an index must have an integer dtype, got {index.dtype}.")
        if z.shape[-1:] != (self.in_features,) or index.shape != z.shape[:-1]:
            raise ValueError(
                f"inputs must have {self.in_features} features, and an index one entry per input; got "
                f"inputs of {tuple(z.shape)} and an index of {tuple(index.shape)}."
            )
        rows, chosen = z.reshape(-1, self.in_features), index.reshape(-1).long()
        (count,) = self.num_experts
        if chosen.is_cpu and chosen.numel() and not is_recorded():
            least, most = chosen.aminmax()
            if least < 0 or most >= count:
                raise ValueError(
                    f"an index must be from 0 to {count - 1}, got entries from {int(least)} to {int(most)}."
                )
        factors, dtype = self.factors, autocast_dtype(z.device)
        if dtype is not None:
            rows, *factors = (x if x.dtype == torch.float64 else x.to(dtype) for x in (rows, *factors))
        with torch.autocast(z.device.type, enabled=False):
            left = iter(factors)
            parts = [route([next(left) for _ in route.held], rows, chosen, count) for route in self._routes]
            y = sum(parts[1:], parts[0])
        if self.edits is not None:
            y = self.edits(y, [nn.functional.one_hot(chosen, count).to(y.dtype)])
        return y.reshape(*z.shape[:-1], self.out_features)


@register_layer
class RoutedExperts(WholeState):
    """Factorized gated MLPs that a router selects: the experts of a transformer block.

    Each of the N experts computes ``down(activation(gate(x)) * up(x))`` without biases. The gate and up
    matrices of all experts are one factorized weight of shape (N, in_features, 2 * hidden_features); the down
    matrices are another. The router and the auxiliary loss are not part of this module. `replace_experts`
    replaces the experts of transformers models with this module.

    Parameters
    ----------
    in_features, hidden_features : int
    experts : int
    format : str or Format, default "cp"
        Format of both weights.
    gate_up_rank, down_rank : int or sequence of int, optional
        One entry per bond of the format. If it is omitted or one entry is None, it is solved for from
        `parameters`.
    parameters : float, optional
        Maximum number of parameters of each weight, as a fraction of the parameters of dense experts.
    activation : str, dict or callable, default "silu"
        See `MuMoEMLP`.
    batch_hint : int, default 1024
        Number of (input, expert) pairs for which the contraction order is optimised.
    machine : str, Machine or mapping, optional
        See `Experts`.

    Attributes
    ----------
    gate_up, down : ChosenExperts
    fit_errors, weighted_errors : tuple of float
        Relative errors of both weights in the Frobenius norm, and relative errors of the outputs for the
        inputs of each expert. Empty unless the weights were fitted to dense weights.

    Raises
    ------
    ValueError, TypeError
        If a size or a rank is invalid, or not exactly one of rank and `parameters` is given.

    Examples
    --------
    >>> import torch
    >>> from mumoe_tensor.nn import RoutedExperts
    >>> experts = RoutedExperts(16, 32, experts=8, format="lowrank", parameters=0.5)
    >>> index = torch.tensor([[0, 3], [7, 3]])
    >>> experts(torch.zeros(2, 16), index, torch.full((2, 2), 0.5)).shape
    torch.Size([2, 16])
    """

    gate_up: ChosenExperts
    down: ChosenExperts
    fit_errors: tuple[float, ...] = ()
    weighted_errors: tuple[float, ...] = ()

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        experts: int,
        format: str | Mapping[str, Any] | Format = "cp",
        gate_up_rank: int | Sequence[int | None] | None = None,
        down_rank: int | Sequence[int | None] | None = None,
        *,
        parameters: float | None = None,
        activation: str | dict[str, Any] | Callable[[Tensor], Tensor] = "silu",
        batch_hint: int = 1024,
        machine: AnyMachine | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = as_positive(in_features, "in_features")
        self.hidden_features = as_positive(hidden_features, "hidden_features")
        self.num_experts = as_positive(experts, "experts")
        for name, i, o, rank in (
            ("gate_up", self.in_features, 2 * self.hidden_features, gate_up_rank),
            ("down", self.hidden_features, self.in_features, down_rank),
        ):
            spec = LayerSpec(format, experts=self.num_experts, in_features=i, out_features=o, rank=rank)
            rank = _rank(spec, parameters, f"{name}_rank")
            options: dict[str, Any] = {"bias": False, "batch_hint": batch_hint, "machine": machine}
            options |= {"device": device, "dtype": dtype}
            self.add_module(name, ChosenExperts(i, o, self.num_experts, spec.format, rank, **options))
        self.activation = ACTIVATIONS.read(activation, device, dtype)

    @property
    def format(self) -> Format:
        """The format of both weights."""
        return self.gate_up.format

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `from_config` for a module like this one, in JSON types.

        Raises
        ------
        ValueError
            If the format or the activation has no registered name.
        """
        options = self.gate_up.options
        return {
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "experts": self.num_experts,
            "format": config_entry(self.format),
            "gate_up_rank": list(self.gate_up.rank),
            "down_rank": list(self.down.rank),
            "activation": ACTIVATIONS.write(self.activation),
            **{name: options[name] for name in ("batch_hint", "machine") if name in options},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Self:
        """Make a module from a `config`; further arguments are `device` and `dtype`.

        Raises
        ------
        ValueError
            If the format or the activation is not registered.
        """
        return cls(**config, **options)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map each input through its selected experts, and return the weighted sum of their outputs.

        Parameters
        ----------
        hidden_states : Tensor of shape (..., in_features)
        top_k_index : Tensor of int, of shape (..., k)
        top_k_weights : Tensor of shape (..., k)

        Returns
        -------
        Tensor of shape (..., in_features)

        Raises
        ------
        ValueError, TypeError
            If the shapes do not match, or an index is invalid; see `ChosenExperts.forward`.
        """
        for x in (hidden_states, top_k_index, top_k_weights):
            check_dense(x)
        leading = hidden_states.shape[:-1]
        if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:-1] != leading:
            raise ValueError(
                "top_k_index and top_k_weights must have one shape, with a row per input; got inputs of "
                f"{tuple(hidden_states.shape)}, an index of {tuple(top_k_index.shape)} and weights of "
                f"{tuple(top_k_weights.shape)}."
            )
        each = hidden_states.unsqueeze(-2).expand(*top_k_index.shape, -1)
        gate, up = self.gate_up(each, top_k_index).chunk(2, -1)
        y = self.down(self.activation(gate) * up, top_k_index)
        return (y * top_k_weights.unsqueeze(-1)).sum(-2).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.hidden_features}, experts={self.num_experts}"


def _rank(spec: LayerSpec, parameters: float | None, name: str) -> Rank:
    """The rank of a spec, or the largest with at most a fraction of the dense parameters."""
    is_open = spec.rank is None or None in spec.rank
    if is_open and parameters is None:
        raise ValueError(f"{name} or parameters must be given for {label(spec.format)!r}, got neither.")
    if parameters is None:
        return spec.full_rank
    if spec.rank and not is_open:
        raise ValueError(
            f"only one of {name} and parameters must be given, got {spec.rank} and parameters={parameters!r}."
        )
    if as_finite(parameters, "parameters") <= 0:
        raise ValueError(
            f"parameters must be a positive fraction of those of dense experts, got {parameters}."
        )
    budget = max(1, int(parameters * prod(spec.mode_sizes)))
    if is_open:
        return spec.fitted(budget, rounding="down", gate=False).full_rank
    if spec.weight_parameters > budget:
        raise ValueError(
            f"a format without a rank must fit the budget of {budget:,} parameters; format "
            f"{label(spec.format)!r} has {spec.weight_parameters:,}."
        )
    return spec.full_rank


class _Route(NamedTuple):
    """The computation of a term for inputs with selected experts.

    Attributes
    ----------
    plan : ContractionPlan
        Plan for the factors that all experts share, the slices of the other factors for an expert, and the
        inputs.
    policy : SavePolicy
    held : tuple of (dict of int to int)
        The expert axes of each factor, by the part of the expert mode; empty if all experts share the factor.
    sizes : tuple of int
        Number of experts of the term, as one number, or one per part if the format splits the expert mode.
    window : tuple of int
        Start and stop of these experts.
    is_gathered : bool
        Whether the slices of the factors are gathered for each input.
    """

    plan: ContractionPlan
    policy: SavePolicy
    held: tuple[dict[int, int], ...]
    sizes: tuple[int, ...]
    window: tuple[int, int]
    is_gathered: bool

    def __call__(self, factors: Sequence[Tensor], rows: Tensor, chosen: Tensor, count: int) -> Tensor:
        start, stop = self.window
        if stop - start == count:
            return self._mapped(factors, rows, chosen)
        inside = ((start <= chosen) & (chosen < stop)).nonzero().squeeze(-1)
        part = self._mapped(factors, rows[inside], chosen[inside] - start)
        return part.new_zeros(len(rows), part.shape[-1]).index_copy(0, inside, part)

    def _mapped(self, factors: Sequence[Tensor], rows: Tensor, chosen: Tensor) -> Tensor:
        if self.is_gathered:
            return self._contracted(factors, rows, torch.unravel_index(chosen, self.sizes))
        order = chosen.argsort(stable=True)
        groups = rows[order].split(chosen.bincount(minlength=prod(self.sizes)).tolist())
        # Without inputs, one empty group is kept so that the result has a shape and a gradient.
        parts = [
            self._contracted(factors, group, [int(entry) for entry in np.unravel_index(n, self.sizes)])
            for n, group in enumerate(groups)
            if len(group) or not (n or len(rows))
        ]
        y = torch.cat(parts)
        return torch.empty_like(y).index_copy(0, order, y)

    def _contracted(self, factors: Sequence[Tensor], rows: Tensor, entries: Sequence[Any]) -> Tensor:
        """Map all inputs by one expert (`entries` are integers), or each by its expert (tensors).

        The result of a bias term has no axis for the inputs.
        """
        operands = [factor for factor, axes in zip(factors, self.held, strict=True) if not axes]
        for factor, axes in zip(factors, self.held, strict=True):
            if axes:
                first = factor.movedim([*axes.values()], [*range(len(axes))])
                operands.append(first[tuple(entries[part] for part in axes)])
        if self.plan.program.network.takes_input:
            operands.append(rows)
        return contract(self.policy, operands, is_recorded=is_recorded())


def _route(term: Term, spec: LayerSpec, batch: int, machine: Machine) -> _Route:
    """The faster method for a batch: gathering, or one expert after the other."""
    format, sizes = term.format, term.mode_sizes
    weight = weight_network(format, sizes, term.rank, format.optional(1))
    size, parts = dict(weight.index_sizes), format.parts("n1")
    # The axes of the parameters are in memory order.
    orders = weight.memory_orders
    held = tuple({k: axes.index(x) for k, x in enumerate(parts) if x in axes} for axes in orders)
    rest = [tuple(x for x in axes if x not in parts) for axes in orders]
    shared = [axes for axes, experts in zip(rest, held, strict=True) if not experts]
    taken = [axes for axes, experts in zip(rest, held, strict=True) if experts]
    axes_and_reading = vector_of(format, weight, "i", 1, sizes)
    inputs = [((BATCH, *axes), reading) for axes, reading in filter(None, [axes_and_reading])]
    bias = spec.bias and not spec.weight_format.has_bias_term
    outputs = format.parts("o")

    def planned(gathered: Sequence[Indices], alone: Sequence[Indices], rows: int) -> ContractionPlan:
        weights, vectors = (*shared, *alone), [*(((BATCH, *axes), Reading()) for axes in gathered), *inputs]
        network = replace(weight, operands=weights, memory_orders=weights, weights=len(weights))
        network = network.with_vectors(vectors, ((BATCH,) if vectors else ()) + outputs, bias)
        if outputs != ("o",):
            network = replace(network, out_features=sizes[-1])
        # Forming the matrix of one expert may be worthwhile, but not a matrix for each input.
        implementation: Implementation = "factorized" if gathered else "auto"
        return plan_network(network, rows, "time", implementation, machine=machine)

    plan, plan_of_one = planned(taken, [], batch), planned([], taken, max(batch // sizes[0], 1))
    is_gathered = not taken or plan.time <= sizes[0] * (plan_of_one.time + CALL * machine.flops)
    plan = plan if is_gathered else plan_of_one
    return _Route(
        plan=plan,
        policy=SavePolicy(plan.program, saved_results(plan.program, recompute=False)),
        held=held,
        sizes=tuple(size[x] for x in parts) if taken else sizes[:1],
        window=format.window(0) or (0, sizes[0]),
        is_gathered=is_gathered,
    )
