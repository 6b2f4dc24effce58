"""The layers: a gate and the experts it mixes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_fraction, as_positive, check_flag
from mumoe_tensor.contraction.machine import AnyMachine
from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import AnyFormat, config_entry
from mumoe_tensor.gates import Gate
from mumoe_tensor.nn.described import register_layer
from mumoe_tensor.nn.experts import Experts, Init
from mumoe_tensor.nn.fitting import fit_experts
from mumoe_tensor.nn.gate import ExpertGate, GateNorm
from mumoe_tensor.nn.linear import check_linear, layer_like
from mumoe_tensor.nn.pruning import keep_experts
from mumoe_tensor.nn.published import read_published, write_published
from mumoe_tensor.nn.registry import ACTIVATIONS, GATES, elementwise
from mumoe_tensor.nn.sparse import is_indexable
from mumoe_tensor.nn.states import WholeState
from mumoe_tensor.selections import Index, Selection
from mumoe_tensor.spec import LayerSpec, as_budget, as_spec
from mumoe_tensor.tensors import FactorizedTensor


class Layer(WholeState):
    """The common part of layers and of blocks: gate, norm of the input, experts, config."""

    #: Whether it is a block, with a hidden size.
    _is_block = False
    #: Relative errors of the fit to linear layers by `from_linear`; empty for other layers.
    fit_errors: tuple[float, ...] = ()

    def __init__(
        self, spec: LayerSpec, input_norm: bool, gate: dict[str, Any], experts: dict[str, Any], **place: Any
    ):
        super().__init__()
        check_flag(input_norm, "input_norm")
        self.spec, self.in_features, self.out_features = spec, spec.in_features, spec.out_features
        features = gate.pop("gate_features")
        used = {} if features is None else {"gate_features": as_positive(features, "gate_features")}
        if used and not spec.experts:
            raise ValueError(f"a layer without experts has no gate, got gate_features={features}.")
        self.gate = ExpertGate(used.get("gate_features", spec.in_features), spec.experts, **gate, **place)
        self.input_norm = nn.LayerNorm(spec.in_features, **place) if input_norm else None
        for name, part in zip(self._mixture_names, spec.layers, strict=True):
            self.add_module(name, Experts.from_spec(part, **experts, **place))
        options = self.mixtures[0].options
        self._options = {"gate_norm": self.gate.gate_norm, **used, "input_norm": input_norm, **options}

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a layer like this one, by `from_config`, in types of JSON.

        A gate or an activation is written by its name, see `register_gate`; a module of torch, as ``GELU``,
        by the name of its class and its arguments. Device and dtype are left out.

        Raises
        ------
        ValueError
            If the format, the gate or the activation has no registered name.
        """
        format = config_entry(self.spec.format)
        return {**self._arguments, "format": format, "gate": GATES.write(self.gate.gate)}

    @property
    def _arguments(self) -> dict[str, Any]:
        """As `config`, but with the format and the functions themselves."""
        return {**_arguments_of(self.spec), **self._options, "gate": self.gate.gate}

    @classmethod
    def from_config(cls, config: dict[str, Any], **options: Any) -> Self:
        """Make a layer from the `config` of another, as it was or read from JSON; it imports nothing.

        Further arguments are `device` and `dtype`.

        Raises
        ------
        ValueError
            If a format, a gate or an activation is not registered.
        """
        return cls(**config, **options)

    @classmethod
    def from_spec(cls, spec: LayerSpec, **options: Any) -> Self:
        """Make a layer of the format, sizes and rank of a spec, with further arguments of the layer.

        The spec of a block has `hidden`. A rank that is left out is solved for.

        Raises
        ------
        ValueError
            If the spec is that of a layer of another kind.
        """
        spec = as_spec(spec)
        if cls._is_block != (spec.hidden is not None):
            weights = "the weights of a block" if cls._is_block else "one weight"
            raise ValueError(f"a spec of {cls.__name__} must be of {weights}, got {spec!r}.")
        return cls.from_config(_arguments_of(spec), **options)

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], format: str | Format, **options: Any) -> Self:
        """Make a layer with the parameters of a published one, of either generation.

        Levels, sizes, rank and bias follow from the names and shapes in the `state_dict`. It does not say the
        `gate_norm`, which is ``"batch"`` by default; statistics that are missing start anew.

        Raises
        ------
        ValueError
            If parameters are missing, left over, or do not fit together or to the `gate_norm`.
        """
        published = read_published(state_dict, format, 1 + cls._is_block)
        options = {"dtype": published.gate.dtype, **options}
        layer = cls.from_spec(published.spec, **options)
        published.copy_to(layer.gate, layer.mixtures)
        return layer

    def __repr__(self) -> str:
        if self.spec.experts:
            return super().__repr__()
        shown = copy(self)  # without the gate, whose weight has no entries
        shown._modules = {name: module for name, module in self._modules.items() if name != "gate"}
        return super(Layer, shown).__repr__()

    @property
    def bias(self) -> None:
        """None: there is no vector that all outputs get. Each expert has its bias, as part of the weight."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for every module, but refuses the weight or bias of another layer, which would be tied."""
        if name in ("weight", "bias"):
            raise TypeError(
                f"a {type(self).__name__} has factors and no {name} that can be a parameter or shared "
                "with another module: do not tie it (in transformers, config.tie_word_embeddings = False)."
            )
        super().register_parameter(name, param)

    @property
    def _mixture_names(self) -> tuple[str, ...]:
        """Names of the `Experts`, in the order of ``spec.layers``."""
        if not self._is_block:
            return ("experts",)
        return ("gate_proj", "up", "down") if self.spec.gated else ("up", "down")

    @property
    def mixtures(self) -> list[Experts]:
        """The experts of each weight, in the order of ``spec.layers``."""
        return [getattr(self, name) for name in self._mixture_names]

    def to_published(self, version: Literal["v1", "v2"] = "v2") -> dict[str, Tensor]:
        """The parameters under the names of the published layers; the opposite of `from_published`.

        Only the first generation, ``"v1"``, has Tucker and Tensor Train.

        Raises
        ------
        ValueError
            If that generation has no block of this kind, or the layer has bias edits, or its gate
            parameters besides the weight.
        TypeError
            If TensorLy has no container of the format, as where modes are split, or of a sum.
        """
        return write_published(self.gate, self.mixtures, version)

    def keep_experts(self, level: int, indices: Selection) -> Self:
        """A new layer with some of the experts of a level, in the order of the indices.

        Its gate is the same map to the logits of these experts: the gate function distributes the
        coefficients among them, and a layer norm of the logits is taken over them. The new layer shares
        nothing with this one and has the same edits, statistics, modes and frozen parameters, but no hooks on
        its gate and experts.

        Parameters
        ----------
        level : int
            0 for the first.
        indices : sequence of int, or mask of shape (N,)
            One or more. The experts of a mask are in ascending order.

        Raises
        ------
        ValueError
            If there is no such level or expert, one occurs twice, or there is none; if a term of the format
            slices or splits the level; if pruning or a parametrization computes the weight of the gate or a
            factor.
        TypeError
            If the level or an index is no integer.
        """
        return keep_experts(self, level, indices)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        gate_input: Tensor | None = None,
        return_coefficients: bool = False,
    ) -> Any:
        """Map inputs.

        Parameters
        ----------
        x : Tensor of shape (..., in_features)
        mask : Tensor of bool, or of integers 0 and 1, of shape (...), optional
            False for rows (padded tokens) that batch norm leaves out.
        gate_input : Tensor of shape (..., gate_features), optional
            Input of the gate, by default `x`.

        Returns
        -------
        Tensor of shape (..., out_features)
        tuple of Tensor of shape (..., N_e)
            The coefficients, one tensor a level; only with `return_coefficients`.
        """
        raise NotImplementedError

    def _coefficients(self, z: Tensor, mask: Tensor | None, are_returned: bool) -> tuple[Any, bool]:
        """Coefficients, and whether the gradients of those that are zero may be left out."""
        gate = self.gate
        if are_returned or not gate.is_sparse_gradient:
            return gate(z, mask), False
        selects = hasattr(gate.gate, "select") and is_indexable(z)
        if selects and not any(experts.needs_dense for experts in self.mixtures):
            return gate(z, mask, sparse=True), True
        return gate(z, mask), True


@register_layer
class MuMoE(Layer):
    """A linear layer of many experts, in place of `torch.nn.Linear`.

    Every input is mapped by a mixture of all experts, ``y = W x_1 a_1 … x_E a_E x_(E+1) x``. Their weights
    are one factorized tensor W, their coefficients ``a_e = gate(norm(G_e^T x))`` (Oldfield et al., 2024,
    equations 1 and 2).

    Parameters
    ----------
    experts : int or sequence of int
        Number of experts of each level; there is an expert for every combination of one a level.
    format : str, dict or Format, default "cp"
        A name in `mumoe_tensor.formats`, as ``"cp"``, ``"btt"`` or ``"shared-expert"``; a dict of a name and
        settings, as ``{"name": "btt", "splits": {"i": (16, 48)}}``; a sum (`.sum_of`), or one of your own.
    rank : int or sequence of int, optional
        One entry a bond of the format. One entry may be None, or the rank left out: then `parameters` solves
        for it.
    parameters : int or "match", optional
        The least number of parameters, gate and biases counted; ``"match"`` (the default without a rank) for
        those of ``torch.nn.Linear(in_features, out_features, bias)``.
    bias : bool, default True
        Every expert has a bias. If the format splits the input, one bias serves all experts.
    gate, gate_norm : optional
        See `ExpertGate`.
    gate_features : int, optional
        Features of the gate's input, where that is another than the input of the experts.
    input_norm : bool, default False
        An affine layer norm on the input, which the gate does not see.
    init : {"linear", "published"}, default "linear"
        See `Experts.reset_parameters`.
    batch_hint : int, default 1024
        Rows (tokens) a batch usually has: the order of contraction is chosen for it.
    machine : str, Machine or mapping, optional
        What the order is chosen for, see `mumoe_tensor.plan`; by default device and dtype of the parameters.
    recompute : bool, default False
        Keep less for the backward pass, which then forms products of coefficients and factors again.

    Attributes
    ----------
    spec : LayerSpec
        Format, sizes and rank.
    gate : ExpertGate
        Always called, so that hooks on it see the coefficients and may change them.
    experts : Experts

    Raises
    ------
    ValueError, TypeError
        If sizes, ranks or choices are wrong, or no rank fits the budget; see `.LayerSpec.fitted`.

    Examples
    --------
    >>> import torch
    >>> layer = MuMoE(16, 8, experts=32, format="cp", rank=10)
    >>> layer(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 8])
    """

    experts: Experts

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: int | Sequence[int],
        format: AnyFormat = "cp",
        rank: int | Sequence[int | None] | None = None,
        *,
        parameters: int | Literal["match"] | None = None,
        bias: bool = True,
        gate: str | dict[str, Any] | Gate = "entmax15",
        gate_norm: GateNorm = "batch",
        gate_features: int | None = None,
        input_norm: bool = False,
        init: Init = "linear",
        batch_hint: int = 1024,
        machine: AnyMachine | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        spec = LayerSpec(
            format, experts=experts, in_features=in_features, out_features=out_features, rank=rank, bias=bias
        )
        super().__init__(
            _solved(spec, parameters, gate_features), input_norm,
            {"gate": gate, "gate_norm": gate_norm, "gate_features": gate_features},
            {"init": init, "batch_hint": batch_hint, "machine": machine, "recompute": recompute},
            device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_linear(cls, linear: nn.Module, experts: int | Sequence[int], **options: Any) -> MuMoE:
        """Make a layer whose experts all start as a linear layer, so that it gives the same outputs.

        (Where the coefficients of a gate do not sum to one, the outputs are multiplied by their sum.)

        The gate is drawn at random: equal experts mix to the same map with any coefficients, and with equal
        coefficients all would have the same gradient. Where the rank is too small, the experts are the best
        fit, and `fit_errors` is their relative error.

        A format that splits the input or the output is fitted as `.decompose` fits it. The terms of a sum are
        fitted in order, shared ones first, each to what the others leave: a dense shared expert takes the
        linear layer, and the last factors of the other terms start at zero.

        Parameters
        ----------
        linear : torch.nn.Linear, or Conv1D of transformers
            If it is frozen, the layer is too.

        Raises
        ------
        TypeError
            If `linear` is no linear layer.
        ValueError
            If it computes something else or more, as with a hook or another forward method, or if only a part
            is frozen.
        """
        check_linear(linear)
        return layer_like(cls, [linear], experts, **options)

    @classmethod
    def from_experts(
        cls,
        stack: Tensor,
        bias: Tensor | None = None,
        *,
        fit: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Make a layer whose experts are the matrices of a stack, or the best fit to them; see `.decompose`.

        The gate starts as that of every layer. `fit_errors` has the relative error of the weight.

        Parameters
        ----------
        stack : Tensor of shape (N1, ..., NE, in_features, out_features)
            The weights of linear layers of torch, stacked, are its transpose: ``stack.mT``.
        bias : Tensor of shape (N1, ..., NE, out_features), optional
        fit : mapping, optional
            Arguments of `.decompose`, as ``{"n_restarts": 1, "input_covariance": covariance}``.
        **options
            Of the layer: format, rank or parameters, gate and so on; device and dtype are those of the stack
            by default.

        Raises
        ------
        ValueError, TypeError
            If the stack or the bias does not have such a shape, or as the layer and `.decompose` raise it.

        Examples
        --------
        >>> import torch
        >>> linears = [torch.nn.Linear(16, 8) for _ in range(4)]
        >>> stack = torch.stack([linear.weight for linear in linears]).mT
        >>> bias = torch.stack([linear.bias for linear in linears])
        >>> layer = MuMoE.from_experts(stack, bias, format="lowrank", rank=8)
        >>> layer.spec
        LayerSpec('lowrank', experts=(4,), in_features=16, out_features=8, rank=(8,), bias=True)
        """
        for name, value in (("stack", stack), ("bias", bias)):
            if not isinstance(value, Tensor) and (name == "stack" or value is not None):
                raise TypeError(f"the {name} must be a tensor, got {type(value).__name__}.")
        if stack.ndim < 2 or (bias is not None and bias.shape != (*stack.shape[:-2], stack.shape[-1])):
            raise ValueError(
                "a stack must have shape (experts..., in_features, out_features), and a bias that without "
                f"in_features; got {tuple(stack.shape)} and {None if bias is None else tuple(bias.shape)}."
            )
        *experts, in_features, out_features = stack.shape
        place = {"device": stack.device, "dtype": stack.dtype}
        sizes = in_features, out_features, experts
        layer = cls(*sizes, bias=bias is not None, **{**place, **options})
        whole = stack if bias is None else torch.cat([stack, bias.unsqueeze(-2)], -2)
        layer.fit_errors = fit_experts(layer.experts.weight, whole, bias is not None, **(fit or {}))[:1]
        return layer

    @property
    def weight(self) -> FactorizedTensor:
        """The weight of all experts: a `.FactorizedTensor` of views of the parameters.

        It can be set; see `Experts.weight`.
        """
        return self.experts.weight

    @weight.setter
    def weight(self, weight: Any) -> None:
        self.experts.weight = weight

    def expert(self, index: Index) -> tuple[Tensor, Tensor | None]:
        """Matrix of shape (in_features, out_features) and bias of one expert; see `Experts.expert`."""
        return self.experts.expert(index)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        gate_input: Tensor | None = None,
        return_coefficients: bool = False,
    ) -> Any:
        z = x if gate_input is None else gate_input
        coefficients, sparse_gradient = self._coefficients(z, mask, return_coefficients)
        normed = x if self.input_norm is None else self.input_norm(x)
        y = self.experts(normed, coefficients, sparse_gradient=sparse_gradient)
        return (y, coefficients) if return_coefficients else y


@register_layer
class MuMoEMLP(Layer):
    """Linear layers of many experts with an activation between them, and one gate of experts for all.

    Takes the place of the MLP block of a transformer: ``down(activation(up(x)))`` or, if it is gated,
    ``down(activation(gate_proj(x)) * up(x))``. The coefficients are computed once, from the input of
    the block (Oldfield et al., 2024). What is not described here is as in `MuMoE`; all layers have one rank,
    and the budget is for all.

    Parameters
    ----------
    gated : bool, default False
        Have a `gate_proj`, as SwiGLU (``activation="silu"``) and GEGLU (``"gelu"``) have it (Shazeer, 2020).
        Its outputs, through the activation, are factors of the hidden features; `gate` is that of experts.
    activation : str, dict or callable, default "gelu"
        The name of an elementwise function of `torch.nn.functional`, a name of `register_activation`, or any
        function of a tensor. A dict has the name of a class, of `torch.nn` or registered, and the arguments
        of the instance. The result of torch's elementwise functions and modules without parameters (gelu,
        relu, silu, …), and its product with the other hidden features, are not kept for the backward pass but
        formed again, which is quick.
    dropout, hidden_dropout : float, default 0
        Probability of dropping an output, and an input of `down`, while training, below one.

    Attributes
    ----------
    spec : LayerSpec
    gate : ExpertGate
    up, down : Experts
    gate_proj : Experts or None

    Examples
    --------
    >>> import torch
    >>> block = MuMoEMLP(16, 32, 16, experts=(4, 4), format="tr", rank=(2, 2, 2, 6), gate_norm="layer")
    >>> y, coefficients = block(torch.zeros(5, 16), return_coefficients=True)
    >>> y.shape, [a.shape for a in coefficients]
    (torch.Size([5, 16]), [torch.Size([5, 4]), torch.Size([5, 4])])
    >>> swiglu = MuMoEMLP(16, 32, 16, experts=4, rank=8, gated=True, activation="silu", bias=False)
    >>> [name for name, _ in swiglu.named_children()][:4]
    ['gate', 'gate_proj', 'up', 'down']
    """

    _is_block = True
    gate_proj: Experts | None
    up: Experts
    down: Experts
    dropout: nn.Dropout
    hidden_dropout: nn.Dropout

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        experts: int | Sequence[int],
        format: AnyFormat = "cp",
        rank: int | Sequence[int | None] | None = None,
        *,
        parameters: int | Literal["match"] | None = None,
        bias: bool = True,
        gated: bool = False,
        activation: str | dict[str, Any] | Callable[[Tensor], Tensor] = "gelu",
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        gate: str | dict[str, Any] | Gate = "entmax15",
        gate_norm: GateNorm = "batch",
        gate_features: int | None = None,
        input_norm: bool = False,
        init: Init = "linear",
        batch_hint: int = 1024,
        machine: AnyMachine | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        spec = LayerSpec(
            format, experts=experts, in_features=in_features, out_features=out_features, rank=rank, bias=bias,
            hidden=as_positive(hidden_features, "hidden_features"), gated=gated,
        )  # fmt: skip
        super().__init__(
            _solved(spec, parameters, gate_features), input_norm,
            {"gate": gate, "gate_norm": gate_norm, "gate_features": gate_features},
            {"init": init, "batch_hint": batch_hint, "machine": machine, "recompute": recompute},
            device=device, dtype=dtype,
        )  # fmt: skip
        if not gated:
            self.gate_proj = None
        self.hidden_features = self.up.out_features
        self.activation = ACTIVATIONS.read(activation, device, dtype)
        for name, p in (("dropout", dropout), ("hidden_dropout", hidden_dropout)):
            self._options[name] = as_fraction(p, name)
            self.add_module(name, nn.Dropout(self._options[name]))

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "activation": ACTIVATIONS.write(self.activation)}

    @property
    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments, "activation": self.activation}

    @classmethod
    def from_linears(
        cls,
        up: nn.Module,
        down: nn.Module,
        experts: int | Sequence[int],
        *,
        gate_proj: nn.Module | None = None,
        **options: Any,
    ) -> MuMoEMLP:
        """Make a block whose experts all start as these linear layers; see `MuMoE.from_linear`.

        With `gate_proj` the block is gated.

        Raises
        ------
        TypeError, ValueError
            As `MuMoE.from_linear`; if only some have a bias or are frozen, or sizes do not fit together.
        """
        linears = [up, down] if gate_proj is None else [gate_proj, up, down]
        for linear in linears:
            check_linear(linear)
        return layer_like(cls, linears, experts, gated=gate_proj is not None, **options)

    @property
    def weights(self) -> tuple[FactorizedTensor, ...]:
        """The weights of all layers, in the order of ``spec.layers``, as views of the parameters."""
        return tuple(experts.weight for experts in self.mixtures)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        gate_input: Tensor | None = None,
        return_coefficients: bool = False,
    ) -> Any:
        z = x if gate_input is None else gate_input
        coefficients, sparse_gradient = self._coefficients(z, mask, return_coefficients)
        normed = x if self.input_norm is None else self.input_norm(x)
        hidden = self.up(normed, coefficients, sparse_gradient=sparse_gradient)
        times = None
        if self.gate_proj is not None:
            times, hidden = hidden, self.gate_proj(normed, coefficients, sparse_gradient=sparse_gradient)
        drops = self.hidden_dropout.training and self.hidden_dropout.p > 0
        activation = None if drops else elementwise(self.activation)
        if activation is None:
            hidden = self.activation(hidden)
            hidden = self.hidden_dropout(hidden if times is None else hidden * times)
            times = None
        y = self.dropout(self.down(hidden, coefficients, activation, sparse_gradient, times))
        return (y, coefficients) if return_coefficients else y


def _arguments_of(spec: LayerSpec) -> dict[str, Any]:
    """The arguments of a layer that a spec gives."""
    hidden: dict[str, Any] = {} if spec.hidden is None else {"hidden_features": spec.hidden}
    if spec.gated:
        hidden["gated"] = True
    names = ("in_features", "out_features", "experts", "format", "rank", "bias")
    return {**{name: getattr(spec, name) for name in names}, **hidden}


def _solved(
    spec: LayerSpec, parameters: int | Literal["match"] | None, gate_features: int | None = None
) -> LayerSpec:
    """The spec if it has its whole rank, else with the rank for a number of parameters."""
    is_whole = spec.rank is not None and None not in spec.rank
    if is_whole and parameters is None:
        return spec
    if is_whole and spec.rank:
        raise ValueError(f"give a rank or parameters, got rank={spec.rank} and parameters={parameters!r}.")
    try:
        if gate_features is not None and spec.experts:
            budget = as_budget("match" if parameters is None else parameters, spec.dense_parameters)
            gate = as_positive(gate_features, "gate_features") * sum(spec.experts)
            return spec.fitted(budget - gate, gate=False)
        return spec.fitted("match" if parameters is None else parameters)
    except ValueError as error:
        if parameters is not None or spec.rank is not None:
            raise
        raise ValueError(
            f"{error} Without a rank or parameters the budget is that of the dense layer: give a rank or "
            "parameters, or use fewer experts or more levels."
        ) from None
