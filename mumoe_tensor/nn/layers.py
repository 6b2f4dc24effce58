"""The layers: a gate, and experts that are mixed by its coefficients."""

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
    """The base class of layers and blocks, with gate, input norm, experts and config."""

    #: Whether the class is a block, with a hidden size.
    _is_block = False
    #: Relative errors of the fit, for layers made by `from_linear` and similar methods; otherwise empty.
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
            raise ValueError(f"gate_features must be None without experts, got {features}.")
        self.gate = ExpertGate(used.get("gate_features", spec.in_features), spec.experts, **gate, **place)
        self.input_norm = nn.LayerNorm(spec.in_features, **place) if input_norm else None
        for name, part in zip(self._mixture_names, spec.layers, strict=True):
            self.add_module(name, Experts.from_spec(part, **experts, **place))
        options = self.mixtures[0].options
        self._options = {"gate_norm": self.gate.gate_norm, **used, "input_norm": input_norm, **options}

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `from_config` for a layer like this one, in JSON types.

        A gate or an activation is stored by its name (see `register_gate`), and a torch module such as
        ``GELU`` by the name and arguments of its class. Device and dtype are not included.

        Raises
        ------
        ValueError
            If the format, the gate or the activation has no registered name.
        """
        format = config_entry(self.spec.format)
        return {**self._arguments, "format": format, "gate": GATES.write(self.gate.gate)}

    @property
    def _arguments(self) -> dict[str, Any]:
        """Like `config`, but with the format and the functions as objects."""
        return {**_arguments_of(self.spec), **self._options, "gate": self.gate.gate}

    @classmethod
    def from_config(cls, config: dict[str, Any], **options: Any) -> Self:
        """Make a layer from a `config`, possibly after a round trip through JSON.

        No module is imported. Further arguments are `device` and `dtype`.

        Raises
        ------
        ValueError
            If a format, gate or activation is not registered.
        """
        return cls(**config, **options)

    @classmethod
    def from_spec(cls, spec: LayerSpec, **options: Any) -> Self:
        """Make a layer with the format, sizes and rank of a spec, and further arguments of the layer.

        The spec of a block has `hidden`. If the rank is None, it is solved for.

        Raises
        ------
        ValueError
            If the spec of a block is passed to a layer, or the spec of a layer to a block.
        """
        spec = as_spec(spec)
        if cls._is_block != (spec.hidden is not None):
            weights = "a block" if cls._is_block else "a single layer"
            raise ValueError(f"the spec of a {cls.__name__} must describe {weights}, got {spec!r}.")
        return cls.from_config(_arguments_of(spec), **options)

    @classmethod
    def from_published(cls, state_dict: Mapping[str, Tensor], format: str | Format, **options: Any) -> Self:
        """Make a layer with the parameters of a published layer (v1 or v2).

        Levels, sizes, rank and bias follow from the names and shapes in the `state_dict`. It does not contain
        the `gate_norm`, which is ``"batch"`` by default. Missing statistics are initialised.

        Raises
        ------
        ValueError
            If parameters are missing or unknown, or do not match each other or the `gate_norm`.
        """
        published = read_published(state_dict, format, 1 + cls._is_block)
        options = {"dtype": published.gate.dtype, **options}
        layer = cls.from_spec(published.spec, **options)
        published.copy_to(layer.gate, layer.mixtures)
        return layer

    def __repr__(self) -> str:
        if self.spec.experts:
            return super().__repr__()
        shown = copy(self)  # without the gate, since its weight is empty
        shown._modules = {name: module for name, module in self._modules.items() if name != "gate"}
        return super(Layer, shown).__repr__()

    @property
    def bias(self) -> None:
        """None: there is no common bias. Each expert has a bias that is part of the weight."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, but refuse the names `weight` and `bias`, under which layers are tied."""
        if name in ("weight", "bias"):
            raise TypeError(
                f"a {type(self).__name__} has factors, and no {name} that can be a parameter or shared "
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
        """The parameters under the names of the published layers; the inverse of `from_published`.

        Only version ``"v1"`` has Tucker and Tensor Train.

        Raises
        ------
        ValueError
            If this version has no block of this kind, the layer has bias edits, or its gate has parameters
            other than the weight.
        TypeError
            If TensorLy has no container for the format, for example a sum or a format that splits modes.
        """
        return write_published(self.gate, self.mixtures, version)

    def keep_experts(self, level: int, indices: Selection) -> Self:
        """A new layer with some of the experts of a level, in the order of the indices.

        The gate computes the same logits for these experts. The gate function then distributes the
        coefficients among them, and a layer norm of the logits includes only them. The new layer is a copy
        with the same edits, statistics, training modes and frozen parameters, but without hooks on its gate
        and experts.

        Parameters
        ----------
        level : int
            The level, counted from 0.
        indices : sequence of int, or mask of shape (N,)
            The experts to keep, at least one; a mask keeps them in ascending order.

        Raises
        ------
        ValueError
            If there is no such level or expert, an expert occurs twice, or none is selected; if a term of the
            format slices or splits the level; or if pruning or a parametrization computes a factor or the
            weight of the gate.
        TypeError
            If the level or an index is not an integer.
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
            False for rows (padded tokens) that batch norm ignores.
        gate_input : Tensor of shape (..., gate_features), optional
            Input of the gate, by default `x`.

        Returns
        -------
        Tensor of shape (..., out_features)
        tuple of Tensor of shape (..., N_e)
            The coefficients, one tensor per level; only with `return_coefficients`.
        """
        raise NotImplementedError

    def _coefficients(self, z: Tensor, mask: Tensor | None, are_returned: bool) -> tuple[Any, bool]:
        """The coefficients, and whether the gradients of zero coefficients may be omitted."""
        gate = self.gate
        if are_returned or not gate.is_sparse_gradient:
            return gate(z, mask), False
        selects = hasattr(gate.gate, "select") and is_indexable(z)
        if selects and not any(experts.needs_dense for experts in self.mixtures):
            return gate(z, mask, sparse=True), True
        return gate(z, mask), True


@register_layer
class MuMoE(Layer):
    """A linear layer of many experts that replaces `torch.nn.Linear`.

    Every input is mapped by a mixture of all experts, ``y = W x_1 a_1 … x_E a_E x_(E+1) x``. The weights of
    the experts form one factorized tensor W, and the coefficients are ``a_e = gate(norm(G_e^T x))`` (Oldfield
    et al., 2024, equations 1 and 2).

    Parameters
    ----------
    experts : int or sequence of int
        Number of experts at each level. With several levels, each combination of indices is an expert.
    format : str, dict or Format, default "cp"
        A name in `mumoe_tensor.formats`, such as ``"cp"``, ``"btt"`` or ``"shared-expert"``; a dict with a
        name and settings, such as ``{"name": "btt", "splits": {"i": (16, 48)}}``; a sum (`.sum_of`); or a
        custom format.
    rank : int or sequence of int, optional
        One entry per bond of the format. If it is omitted or one entry is None, it is solved for from
        `parameters`.
    parameters : int or "match", optional
        Minimum number of parameters, including the gate and biases. ``"match"`` (the default without a rank)
        is the number of parameters of ``torch.nn.Linear(in_features, out_features, bias)``.
    bias : bool, default True
        Whether every expert has a bias. If the format splits the input, all experts share one bias.
    gate, gate_norm : optional
        See `ExpertGate`.
    gate_features : int, optional
        Width of the gate's input, if it differs from the input of the experts.
    input_norm : bool, default False
        Whether an affine layer norm is applied to the input of the experts (not of the gate).
    init : {"linear", "published"}, default "linear"
        See `Experts.reset_parameters`.
    batch_hint : int, default 1024
        Typical number of rows (tokens) in a batch, for which the contraction order is optimised.
    machine : str, Machine or mapping, optional
        Machine for which the contraction order is optimised; see `mumoe_tensor.plan`. The default follows
        from the device and dtype of the parameters.
    recompute : bool, default False
        Save less for the backward pass, which then recomputes products of coefficients and factors.

    Attributes
    ----------
    spec : LayerSpec
        Format, sizes and rank.
    gate : ExpertGate
        The gate. It is always called, so its hooks can read and change the coefficients.
    experts : Experts

    Raises
    ------
    ValueError, TypeError
        If a size, a rank or an option is invalid, or no rank fits the budget; see `.LayerSpec.fitted`.

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
        """Make a layer whose experts all start as a given linear layer, so that its outputs are the same.

        (If the coefficients of the gate do not sum to one, the outputs are multiplied by their sum.)

        The gate is initialised at random: with equal experts the outputs do not depend on the coefficients,
        and with equal coefficients all experts would get the same gradient. If the rank is too small, the
        experts are the best fit, and `fit_errors` contains their relative error.

        A format that splits the input or the output is fitted by `.decompose`. The terms of a sum are fitted
        in order, shared terms first, each to the residual of the previous terms: a dense shared expert
        becomes the linear layer, and the last factors of the other terms start at zero.

        Parameters
        ----------
        linear : torch.nn.Linear, or Conv1D of transformers
            The linear layer. If it is frozen, the new layer is frozen too.

        Raises
        ------
        TypeError
            If `linear` is not a linear layer.
        ValueError
            If it computes something else, for example in a hook or an overridden forward method, or is only
            partly frozen.
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

        The gate is initialised as usual. `fit_errors` contains the relative error in the weight.

        Parameters
        ----------
        stack : Tensor of shape (N1, ..., NE, in_features, out_features)
            The matrices, transposed relative to stacked weights of `torch.nn.Linear`.
        bias : Tensor of shape (N1, ..., NE, out_features), optional
        fit : mapping, optional
            Arguments of `.decompose`, such as ``{"n_restarts": 1, "input_covariance": covariance}``.
        **options
            Arguments of the layer, such as format, gate, and rank or parameters. Device and dtype default to
            those of the stack.

        Raises
        ------
        ValueError, TypeError
            If the stack or the bias has the wrong shape, or as in the constructor and `.decompose`.

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
                "a stack must have shape (experts..., in_features, out_features), and a bias (experts..., "
                f"out_features), got {tuple(stack.shape)} and {None if bias is None else tuple(bias.shape)}."
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
        """The weight of all experts, as a `.FactorizedTensor` of views of the parameters.

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
    """An MLP block of linear layers of many experts, with an activation and a single gate for the experts.

    It replaces the MLP block of a transformer: ``down(activation(up(x)))`` or, if it is gated,
    ``down(activation(gate_proj(x)) * up(x))``. The coefficients are computed once, from the input of the
    block (Oldfield et al., 2024). Other parameters are as in `MuMoE`; all layers have the same rank, and the
    budget applies to the whole block.

    Parameters
    ----------
    gated : bool, default False
        Whether the block has a layer `gate_proj`, as in SwiGLU (``activation="silu"``) and GEGLU (``"gelu"``)
        (Shazeer, 2020). Its outputs, after the activation, multiply the hidden features. The gate of the
        experts is `gate`.
    activation : str, dict or callable, default "gelu"
        The name of an elementwise function of `torch.nn.functional`, a name registered with
        `register_activation`, or any function of a tensor. A dict contains the name of a class, registered or
        from `torch.nn`, and the arguments of the instance. For torch's elementwise functions and modules
        without parameters (gelu, relu, silu, …), the result and its product with the hidden features are
        recomputed in the backward pass instead of saved.
    dropout, hidden_dropout : float, default 0
        Dropout probabilities, below one, of the outputs and of the inputs of `down`.

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

        If `gate_proj` is given, the block is gated.

        Raises
        ------
        TypeError, ValueError
            As in `MuMoE.from_linear`, if only some layers have a bias or are frozen, or if their sizes do not
            match.
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
    """The arguments of a layer that follow from a spec."""
    hidden: dict[str, Any] = {} if spec.hidden is None else {"hidden_features": spec.hidden}
    if spec.gated:
        hidden["gated"] = True
    names = ("in_features", "out_features", "experts", "format", "rank", "bias")
    return {**{name: getattr(spec, name) for name in names}, **hidden}


def _solved(
    spec: LayerSpec, parameters: int | Literal["match"] | None, gate_features: int | None = None
) -> LayerSpec:
    """The spec itself if its rank is complete, otherwise with the rank for a budget of parameters."""
    is_whole = spec.rank is not None and None not in spec.rank
    if is_whole and parameters is None:
        return spec
    if is_whole and spec.rank:
        raise ValueError(
            f"rank and parameters must not both be given, got rank={spec.rank} and parameters={parameters!r}."
        )
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
