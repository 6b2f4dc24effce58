"""A factorized weight of experts as a torch module, without a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from mumoe_tensor.calls import (
    autocast_dtype,
    check_dense,
    has_hooks,
    is_recorded,
    is_transformed,
)
from mumoe_tensor.checks import as_positive, check_choice, check_flag
from mumoe_tensor.contraction.machine import AnyMachine, Machine, machine_entry, machine_of
from mumoe_tensor.contraction.network import Network
from mumoe_tensor.contraction.plan import Plan, networks_of, plan_terms
from mumoe_tensor.dense import expert_matrix
from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import AnyFormat, config_entry, label
from mumoe_tensor.nn.backward import Activation, SavePolicy, saved_results, sparse_products
from mumoe_tensor.nn.contraction import contract
from mumoe_tensor.nn.described import register_layer
from mumoe_tensor.nn.edits import BiasEdit, BiasEdits, check_edit_name, edits_in
from mumoe_tensor.nn.frozen import Folded, are_comparable
from mumoe_tensor.nn.init import draw, scale_to_linear
from mumoe_tensor.nn.sparse import SparseCoefficients, indexed_products, is_indexable, is_supported
from mumoe_tensor.nn.states import WholeState
from mumoe_tensor.nn.values import copy_weight, is_distributed
from mumoe_tensor.selections import Index, read_index, read_number
from mumoe_tensor.spec import LayerSpec, as_spec
from mumoe_tensor.tensors import FactorizedTensor, as_factorized

Init = Literal["linear", "published"]


@register_layer
class Experts(WholeState):
    """A multilinear mixture of experts for given coefficients: ``y = W x_1 a_1 … x_E a_E x_(E+1) z``.

    Equation (1) of Oldfield et al. (2024). The parameters are the factors of W. W is never formed, except in
    a layer without experts whose format splits the input or the output, if forming the matrix first is
    cheaper. W is then no larger than the weight of `torch.nn.Linear`; with N experts it is N times as large.

    Parameters
    ----------
    experts : int or sequence of int
        Number of experts at each level.
    rank : int or sequence of int, optional
        One entry per bond of the format; see `.Format.bonds`.
    bias : bool, default True
        Whether every expert has a bias, stored as an additional row of the input mode.
    init : {"linear", "published"}, default "linear"
        See `reset_parameters`.
    batch_hint : int, default 1024
        Number of rows for which the contraction order is optimised. Results are correct for any number.
    machine : str, Machine or mapping, optional
        Machine for which the contraction order is optimised; see `mumoe_tensor.plan`. The default follows
        from the device and dtype of the parameters, also after ``.to(...)``. Results differ only by rounding.
    recompute : bool, default False
        Recompute the products of coefficients and factors in the backward pass, instead of saving them.
        Elementwise products are recomputed in any case.

    Attributes
    ----------
    spec : LayerSpec
        Format, sizes and rank.
    num_experts : tuple of int
        Number of experts at each level.
    factor_0, factor_1, ... : Parameter
        The factors that are not all ones, in the order of the declaration, each in its memory order
        (``Factor.memory_order``).
    axes : tuple of tuple of str
        The axes of each of these factors, under the names that the format uses.
    edits : BiasEdits or None
        Biases added by `.analysis.edit_bias`, by name.

    Notes
    -----
    On a CPU, after ``eval()`` and under ``torch.no_grad()``, products that involve only weights are cached
    between calls if this is faster, and recomputed when a weight changes.
    """

    edits: BiasEdits | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int | Sequence[int],
        format: AnyFormat,
        rank: int | Sequence[int] | None = None,
        *,
        bias: bool = True,
        init: Init = "linear",
        batch_hint: int = 1024,
        machine: AnyMachine | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        spec = LayerSpec(
            format, experts=experts, in_features=in_features, out_features=out_features, rank=rank, bias=bias
        )
        self.spec, self.format, self.num_experts, self.rank = spec, spec.format, spec.experts, spec.full_rank
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.bias = bias
        check_flag(recompute, "recompute")
        init, batch_hint = check_choice(init, get_args(Init), "init"), as_positive(batch_hint, "batch_hint")
        #: The arguments other than those of the spec, device and dtype.
        self.options: dict[str, Any] = {"init": init, "batch_hint": batch_hint, "recompute": recompute}
        # Without a machine there is no entry, as in configs of earlier versions.
        self.options |= {} if machine is None else {"machine": machine_entry(machine)}
        #: The type of device and the dtype of the current plan.
        self._place: tuple[str, torch.dtype] | None = None
        self._planned: _Planned
        networks = self._networks
        declared = [f for f in spec.weight_format.declaration(spec.num_levels) if not f.optional]
        self.axes = tuple(f.memory_order for f in declared)
        self._factor_names = tuple(f"factor_{k}" for k in range(len(self.axes)))
        shapes = (
            [dict(network.index_sizes)[x] for x in axes]
            for network in networks
            for axes in network.operands[: network.weights]
        )
        for name, shape in zip(self._factor_names, shapes, strict=True):
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self._plan_for(empty)
        self.edits = None  # a submodule only if there are edits
        if not self.factors[0].is_meta:  # the meta device has no values
            self.reset_parameters()

    @classmethod
    def from_spec(cls, spec: LayerSpec, **options: Any) -> Self:
        """Make experts with the format, sizes and rank of a spec, and further arguments of `Experts`.

        Raises
        ------
        ValueError
            If the spec describes a block, which has several weights.
        """
        spec = as_spec(spec)
        if spec.hidden is not None:
            raise ValueError(
                f"spec must describe a single layer, such as one of the `layers` of a block, got {spec!r}."
            )
        sizes = spec.in_features, spec.out_features, spec.experts
        return cls(*sizes, spec.format, spec.full_rank, bias=spec.bias, **options)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `from_config` for experts like these, in JSON types; see `MuMoE.config`.

        Raises
        ------
        ValueError
            If the format has no registered name.
        """
        names = ("in_features", "out_features", "experts", "rank", "bias")
        arguments = {name: getattr(self.spec, name) for name in names}
        return {**arguments, "format": config_entry(self.spec.format), **self.options}

    @classmethod
    def from_config(cls, config: dict[str, Any], **options: Any) -> Self:
        """Make experts from a `config`; further arguments are `device` and `dtype`."""
        return cls(**config, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the factors according to `init`.

        All experts start close to the same linear layer. The factors of the first level are near one (on the
        diagonal of two bonds); those of further levels are one. The factor of the input is uniform in ±1/√I,
        the factor of the output is uniform in ±1/√(product of its bonds), and a core is normal with unit
        norm. This is ``"published"`` (Oldfield et al., 2024). The default, ``"linear"``, then scales the
        factor of the input so that the outputs have the same variance as the outputs of `torch.nn.Linear`,
        for any format, rank and number of levels.

        If the input is split, each factor with a part of it is uniform in ±1/√(number of entries that it sums
        over), and all these factors are scaled equally. Each term of a sum contributes an equal share of the
        variance. A bias term is uniform in ±1/√I, as in `torch.nn.Linear`. Factors that have both expert
        modes and the input or the output (low rank, dense) differ between experts from the start.
        """
        weight = self.weight
        is_sharded = is_distributed(weight.arrays[0])
        if is_sharded:
            whole = [
                x if x is None else torch.empty(x.shape, device=x.device, dtype=x.dtype)
                for x in weight.factors
            ]
            weight = FactorizedTensor(weight.format, whole, weight.shape)
        draw(weight, self.in_features)
        if self.options["init"] == "linear":
            scale_to_linear(weight, self.in_features)
        if is_sharded:
            self.weight = weight

    @property
    def factors(self) -> list[Tensor]:
        """The attributes ``factor_0``, …: parameters, unless pruning or a parametrization computes them."""
        return [getattr(self, name) for name in self._factor_names]

    @property
    def weight(self) -> FactorizedTensor:
        """The factors as a `.FactorizedTensor`: views of the parameters, in declared order, without edits.

        The attribute can be set to a weight with the format, shape and rank of the layer, for example from
        `.decompose`, or to a TensorLy container. Its values are copied to the parameters, which keep their
        dtype, device and ``requires_grad``. A weight that does not fit raises a ValueError and changes
        nothing.

        Examples
        --------
        >>> import numpy as np, mumoe_tensor as mt
        >>> from mumoe_tensor.nn import MuMoE
        >>> matrices = np.random.default_rng(0).normal(size=(4, 16, 8))
        >>> layer = MuMoE(16, 8, experts=4, format="tucker", rank=(4, 16, 8), bias=False)
        >>> layer.weight, error = mt.decompose(matrices, layer.spec.format, layer.spec.rank)
        >>> np.abs(layer.expert(2)[0].detach().numpy() - matrices[2]).max() < 1e-4
        np.True_
        """
        factors, format = iter(self.factors), self.spec.weight_format
        views: list[Any] = [
            None if f.optional else next(factors).permute([f.memory_order.index(x) for x in f.indices])
            for f in format.declaration(len(self.num_experts))
        ]
        return FactorizedTensor(format, views, self.spec.mode_sizes)

    @weight.setter
    def weight(self, weight: Any) -> None:
        if not all(isinstance(factor, nn.Parameter) and not factor.is_meta for factor in self.factors):
            raise ValueError(
                "factors must be parameters with values to be set; some are on the meta device, or computed "
                "by pruning or a parametrization."
            )
        copy_weight(as_factorized(weight), self.weight)

    @property
    def terms(self) -> tuple[FactorizedTensor, ...]:
        """The terms of `weight`, as views of the parameters. A weight that is not a sum is its only term.

        If the format splits the input, the last term is the bias; see `.Bias`.
        """
        return self.weight.terms

    def freeze(self, term: int | str | Format) -> None:
        """Exclude the factors of a term from training by setting their ``requires_grad`` to False.

        A state dict does not store this. ``experts.requires_grad_(False)`` freezes all terms.

        Parameters
        ----------
        term : int, str or Format
            The index of a term in `terms`, its format, or the name or title of its format, which may match
            several terms.

        Raises
        ------
        ValueError, TypeError
            If there is no such term, or pruning or a parametrization computes a factor.

        Examples
        --------
        >>> import mumoe_tensor as mt
        >>> from mumoe_tensor.nn import MuMoE
        >>> layer = MuMoE(16, 8, 4, mt.sum_of(mt.shared("dense"), "cp"), rank=3)
        >>> layer.experts.freeze("shared")
        >>> [factor.requires_grad for factor in layer.experts.factors]
        [False, True, True, True]
        """
        self._set_trained(term, False)

    def unfreeze(self, term: int | str | Format) -> None:
        """Train the factors of a term again; see `freeze`."""
        self._set_trained(term, True)

    def _set_trained(self, term: int | str | Format, is_trained: bool) -> None:
        factors = [factor for k in self._numbers_of(term) for factor in self.factors[self._terms[k].factors]]
        if not all(isinstance(factor, nn.Parameter) for factor in factors):
            raise ValueError(
                "the factors of a term must be parameters to be frozen; some factors of term "
                f"{term!r} are computed by pruning or a parametrization: freeze its parameters instead."
            )
        for factor in factors:
            factor.requires_grad_(is_trained)

    def _numbers_of(self, term: int | str | Format) -> list[int]:
        """The indices of the terms that match; see `freeze`."""
        formats = [format for format, _ in self.spec.weight_format.summands(len(self.num_experts))]
        if not isinstance(term, (str, Format)):
            return [read_number(term, len(formats), f"the number of a term of {self.spec.weight_format!r}")]
        fits = [k for k, format in enumerate(formats) if term in (format, format.name, format.title)]
        if not fits:
            raise ValueError(
                f"a term must be one of {[label(format) for format in formats]}, by its number, format, name "
                f"or title, got {term!r}."
            )
        return fits

    def expert(self, index: Index) -> tuple[Tensor, Tensor | None]:
        """Matrix, of shape (in_features, out_features), and bias of one expert, given by one index per level.

        Raises
        ------
        ValueError, TypeError
            If there is no such expert.
        """
        index = read_index(index, self.num_experts)
        matrix = expert_matrix(self.weight, index, bias=self.bias)
        matrix, bias = matrix if self.bias else (matrix, None)
        if self.edits is not None:
            entries = torch.tensor(index, device=matrix.device)
            one_hot = [
                nn.functional.one_hot(k, n).to(matrix.dtype)
                for k, n in zip(entries, self.num_experts, strict=True)
            ]
            bias = self.edits(matrix.new_zeros(self.out_features) if bias is None else bias, one_hot)
        return matrix, bias

    @property
    def needs_dense(self) -> bool:
        """Whether coefficients must be dense because a hook, an edit or a subclass reads them."""
        return self.edits is not None or type(self) is not Experts or has_hooks(self)

    def forward(
        self,
        z: Tensor,
        coefficients: Sequence[Tensor | SparseCoefficients],
        activation: Activation | None = None,
        sparse_gradient: bool = False,
        times: Tensor | None = None,
    ) -> Tensor:
        """Mix the experts.

        Parameters
        ----------
        z : Tensor of shape (..., in_features)
        coefficients : sequence of Tensor of shape (..., N_e)
            One array per level, with the leading shape of `z`, or ``sparse.SparseCoefficients`` of this
            shape.
        activation : callable, optional
            An elementwise function without parameters or randomness, applied to `z` first. Its result is
            recomputed in the backward pass instead of saved.
        sparse_gradient : bool, default False
            Whether the gradients of zero coefficients may be omitted. If a level has at least 1,024 experts
            and few of them have nonzero coefficients, only the rows of these experts are then read from the
            factor.
        times : Tensor of shape (..., in_features), optional
            A tensor that multiplies the result of the activation, as in a gated block. This requires an
            activation. The product is also recomputed in the backward pass.

        Returns
        -------
        Tensor of shape (..., out_features)

        Raises
        ------
        ValueError
            If the shapes do not match.
        """
        coefficients = tuple(coefficients)
        inputs: tuple[Tensor, ...] = (z,)
        if times is not None:
            inputs, activation = (z, times), _gated(activation)
        y = self._mix(self.factors, inputs, coefficients, activation, sparse_gradient)
        return y if self.edits is None else self.edits(y, coefficients)

    def _mix(
        self,
        factors: list[Tensor],
        inputs: tuple[Tensor, ...],
        coefficients: Sequence[Tensor | SparseCoefficients],
        activation: Activation | None,
        sparse_gradient: bool,
    ) -> Tensor:
        """Like `forward`, with factors and the inputs of the activation as arguments, and without edits."""
        z = inputs[0]
        check_dense(z)
        dtype, leading = autocast_dtype(z.device), z.shape[:-1]
        fits = z.shape[-1] == self.in_features and len(coefficients) == len(self.num_experts)
        fits = fits and inputs[-1].shape == z.shape
        for a, n in zip(coefficients, self.num_experts, strict=False):
            fits = fits and a.shape == (*leading, n)
        if not fits:
            raise ValueError(
                f"inputs must have {self.in_features} features, and coefficients must have shapes "
                f"{[(*leading, n) for n in self.num_experts]}; got inputs of {tuple(z.shape)}, coefficients "
                f"of {[tuple(a.shape) for a in coefficients]}."
            )
        recorded = is_recorded()
        is_indexed = SparseCoefficients in map(type, coefficients)
        if is_indexed and (recorded or is_transformed() or not is_indexable(z)):
            coefficients = [a.dense() if isinstance(a, SparseCoefficients) else a for a in coefficients]
            is_indexed = False
        # No unnecessary views, since in-place changes of views are restricted.
        is_matrix = len(leading) == 1
        vectors: tuple[Any, ...] = (*coefficients, *inputs)
        if not is_matrix:
            vectors = tuple(x.reshape(-1, x.shape[-1]) for x in vectors)
        if dtype is not None:
            # Autocast does not apply in the backward pass of an autograd function.
            vectors = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in vectors)
        use_folded = not (dtype or is_indexed or recorded or self.training or torch.is_grad_enabled())
        y: Tensor | None = None
        with nullcontext() if dtype is None else torch.autocast(z.device.type, enabled=False):
            # `.to` makes a new plan, but parameters may also have been replaced.
            if not recorded and (factors[0].device.type, factors[0].dtype) != self._place:
                self._plan_for(factors[0])
            planned = self._planned
            for k, term in enumerate(planned.terms):
                policy, products = term.policy, term.sparse_policy.sparse
                ready: dict[int, Tensor] = {}
                weights = factors[term.factors]
                many = use_folded and vectors[-1].shape[0] >= self._folded[k].fewest_rows
                if many and are_comparable(weights):
                    policy, ready = self._folded[k].policy, self._folded[k].products(weights)
                elif sparse_gradient and products and not is_indexed and is_supported(vectors[0]):
                    policy = term.sparse_policy
                if dtype is not None:
                    weights = [x if x.dtype == torch.float64 else x.to(dtype) for x in weights]
                operands: list[Any] = [*weights, *vectors[: term.num_vectors]]
                if is_indexed:
                    operands, ready = indexed_products(policy.program, products, operands)
                part = contract(policy, operands, activation, ready, recorded)
                # A term without steps is a parameter or a view, which must not be changed in place.
                if y is None:
                    y = part
                elif (
                    recorded or is_transformed() or y._is_view() or not planned.terms[0].policy.program.steps
                ):
                    y = y + part
                else:
                    y = y.add_(part)
        assert y is not None
        return y if is_matrix else y.reshape(*leading, self.out_features)

    @property
    def plan(self) -> Plan:
        """The plan of a forward pass on the device of the parameters, with its cost for `batch_hint` rows."""
        self._plan_for(self.factors[0])
        return self._planned.plan

    @property
    def _terms(self) -> tuple[_Term, ...]:
        return self._planned.terms

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._plan_for(self.factors[0])
        return self

    def _plan_for(self, factor: Tensor) -> None:
        """Make a new plan unless the current one is for the device type and the dtype of a factor."""
        place = factor.device.type, factor.dtype
        if place != self._place:
            machine = machine_of(place[0], str(place[1]).removeprefix("torch."), self.options.get("machine"))
            self._place, self._planned = place, self._planned_on(machine)

    def _planned_on(self, machine: Machine) -> _Planned:
        # Without experts the weight is a single matrix. If it is split, forming it may be cheaper.
        is_matrix = not self.spec.experts and self.spec.format.is_split
        implementation = "auto" if is_matrix else "factorized"
        plan = plan_terms(
            self._networks, self.options["batch_hint"], "time", implementation, None, False, None, machine
        )
        return _Planned(plan, _terms(plan, self.options["recompute"]))

    @property
    def _networks(self) -> list[Network]:
        # The axes of the parameters are in memory order.
        return [replace(network, operands=network.memory_orders) for network in networks_of(self.spec)]

    @cached_property
    def _folded(self) -> list[Folded]:
        return [Folded(plan) for plan in self.plan.terms]

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, as for every module; training clears the cached products of weights."""
        if mode and "_folded" in self.__dict__:
            for folded in self._folded:
                folded.clear()
        return super().train(mode)

    def _expected(self, state: MutableMapping[str, Any], prefix: str) -> dict[str, Any]:
        rename_factors(state, prefix)
        expected = super()._expected(state, prefix)
        sizes = {f"mean_{level}": n for level, n in enumerate(self.num_experts)}
        sizes["outputs"] = self.out_features
        for name, entries in edits_in(state, prefix).items():
            check_edit_name(name)
            if entries != sizes.keys():
                raise ValueError(
                    f"an edit in a state must have the entries {[*sizes]}; {name!r} has {sorted(entries)}."
                )
            start = f"{prefix}edits.{name}."
            expected |= {start + entry: torch.empty(n, device="meta") for entry, n in sizes.items()}
        return expected

    def _make_room(self, state: Mapping[str, Any], prefix: str) -> None:
        # Edits that exist only in the state are created, so that they can be loaded.
        for name in edits_in(state, prefix):
            if self.edits is None or name not in self.edits:
                self.add_edit(name)

    def add_edit(
        self, name: str, means: Sequence[Tensor] | None = None, outputs: Tensor | None = None
    ) -> None:
        """Add a `BiasEdit` with copies of these tensors, or with zeros.

        The tensors are checked by `.analysis.edit_bias`, not by this method.
        """
        like = self.factors[0]
        means = [like.new_zeros(n) for n in self.num_experts] if means is None else means
        outputs = like.new_zeros(self.out_features) if outputs is None else outputs
        *means, outputs = (x.detach().to(like.device, like.dtype, copy=True) for x in (*means, outputs))
        if self.edits is None:
            self.edits = BiasEdits()
        self.edits[name] = BiasEdit(means, outputs)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, experts={self.num_experts}"
        padded = "".join(f", {name} padded to {held}" for name, (_, held) in self.spec.padding.items())
        return f"{sizes}, format={label(self.format)!r}, rank={self.rank}, bias={self.bias}{padded}"


class _Term(NamedTuple):
    """The contraction of a term of the weight.

    Attributes
    ----------
    policy, sparse_policy : SavePolicy
    factors : slice
        Positions of its factors among the parameters.
    num_vectors : int or None
        For a bias term, which does not read the inputs, the number of coefficients; otherwise None.
    """

    policy: SavePolicy
    sparse_policy: SavePolicy
    factors: slice
    num_vectors: int | None


class _Planned(NamedTuple):
    """A plan and the contraction of each term; for chosen experts also their routes."""

    plan: Plan
    terms: tuple[_Term, ...]
    routes: tuple[Any, ...] = ()


def _terms(plan: Plan, recompute: bool) -> tuple[_Term, ...]:
    terms, start = [], 0
    for program in (part.program for part in plan.terms):
        policy = SavePolicy(program, saved_results(program, recompute))
        stop = start + program.network.weights
        sparse = replace(policy, sparse=sparse_products(program))
        num_vectors = None if program.network.takes_input else len(program.network.readings)
        terms.append(_Term(policy, sparse, slice(start, stop), num_vectors))
        start = stop
    return tuple(terms)


def _gated(activation: Activation | None) -> Activation:
    if activation is None:
        raise ValueError("activation must be given together with times, got None.")
    return lambda z, times: activation(z) * times


def rename_factors(state: MutableMapping[str, Any], prefix: str) -> None:
    """Rename the factors in a state of an earlier version, ``factors.0``, …, to the current names, in place.

    `prefix` is the prefix of an `Experts`. Suffixes, as in the state of an optimizer, are kept.
    """
    old = f"{prefix}factors."
    for key in [key for key in state if key.startswith(old)]:
        state[f"{prefix}factor_{key.removeprefix(old)}"] = state.pop(key)
