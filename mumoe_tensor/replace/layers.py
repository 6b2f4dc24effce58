"""Replacements for pretrained layers: a mixture whose gate is applied to the layer's input, and a bias."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import as_entries, as_positive, check_flag
from mumoe_tensor.formats.base import Format
from mumoe_tensor.formats.registry import AnyFormat, get_format
from mumoe_tensor.formats.sums import sliced, sum_of
from mumoe_tensor.gates import Gate
from mumoe_tensor.nn.described import register_layer
from mumoe_tensor.nn.gate import ExpertGate
from mumoe_tensor.nn.init import make_zero
from mumoe_tensor.nn.layers import MuMoE
from mumoe_tensor.nn.linear import is_linear, matrix_of
from mumoe_tensor.nn.mlp import Block, is_mlp, read_mlp
from mumoe_tensor.nn.registry import ACTIVATIONS, GATES
from mumoe_tensor.nn.size import num_parameters
from mumoe_tensor.nn.states import WholeState
from mumoe_tensor.replace.budget import solve
from mumoe_tensor.selections import Selection
from mumoe_tensor.spec import Rounding, as_budget, expert_counts

AnyGate = str | dict[str, Any] | Gate
#: The smallest value of a size to solve for, and a function from a value to the arguments of the layer.
OpenSize = tuple[int, Callable[[int], dict[str, Any]]]


class ReplacementLayer(WholeState):
    """The common part of replacement layers: ``y = c + S x + sum_n a_n(x) W_n f(x)``.

    The coefficients a are computed by the gate, without a norm of its logits. The last factor of the experts
    (of each term of a sum) and S are initially zero, so the initial outputs are c.

    Attributes
    ----------
    mixture : MuMoE
        The gate and the experts W, without a bias.
    skip : torch.nn.Linear or None
    bias : Parameter of shape (out_features,), or None
        The vector c, initially zero.
    """

    mixture: MuMoE
    skip: nn.Linear | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, mixture: MuMoE, *, skip: bool, bias: bool):
        super().__init__()
        for flag, name in ((skip, "skip"), (bias, "bias")):
            check_flag(flag, name)
        self.mixture = mixture
        self.in_features, self.out_features = in_features, mixture.out_features
        sizes, like = (in_features, self.out_features), mixture.gate.weight
        self.skip = nn.Linear(*sizes, bias=False, device=like.device, dtype=like.dtype) if skip else None
        self.bias = nn.Parameter(like.new_empty(self.out_features)) if bias else None
        self._begin_at_zero()

    def reset_parameters(self) -> None:
        """Initialise all parameters again.

        A tool that resets each module of a model must reset the layer after its children.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        make_zero(self.mixture.weight)
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Number of experts per level."""
        return self.mixture.gate.num_experts

    @property
    def gate(self) -> ExpertGate | None:
        """The gate, or None for a layer without experts."""
        return self.mixture.gate if self.num_experts else None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the layer for `from_config`, as JSON types, without device and dtype.

        Raises
        ------
        ValueError
            If the format, the gate or the activation has no registered name.
        """
        gate = {} if self.gate is None else {"gate": GATES.write(self.gate.gate)}
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "bias": self.bias is not None, **gate}

    @classmethod
    def from_config(cls, config: dict[str, Any], **options: Any) -> Self:
        """Make a layer from the `config` of another; further arguments are `device` and `dtype`."""
        return cls(**config, **options)

    @classmethod
    def like(
        cls,
        block: nn.Module,
        *,
        parameters: int | str | None = None,
        rounding: Rounding = "nearest",
        activation: str | dict[str, Any] | Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> Self:
        """Make a layer that can replace an MLP block or a linear layer.

        Sizes, device and dtype are those of the block. Nothing else is copied, unless the class says so.

        Parameters
        ----------
        block : torch.nn.Module
            A block that `.replace_mlp` can parse or, if the class has no hidden units, a linear layer.
        parameters : int or str, optional
            The budget, including the gate and biases, from which the size missing in the options is
            determined; ``"match"`` for the number of parameters of the block, or a multiple of it such as
            ``"2x"``.
        rounding : {"up", "down", "nearest"}, default "nearest"
            The smallest size with at least the budget, the largest with at most it, or the closer of the two.
        activation : str, dict or callable, optional
            Activation of the block, if it is not a submodule.
        **options
            Further arguments of the layer.

        Raises
        ------
        ValueError
            If the block is not of this kind, no size has this number of parameters, or there is no size left
            to solve for.
        """
        arguments = {**cls._read(block, activation), **options}
        if parameters is None:
            return cls(**arguments)
        least, sized = cls._open_size(arguments, options)
        on_meta, budget = {**arguments, "device": "meta"}, as_budget(parameters, num_parameters(block))
        smallest = ", ".join(f"{name}={size}" for name, size in sized(least).items())
        size = solve(lambda size: cls(**{**on_meta, **sized(size)}), budget, rounding, least, smallest)
        return cls(**{**arguments, **sized(size)})

    @classmethod
    def _read(cls, block: nn.Module, activation: Any) -> dict[str, Any]:
        """The arguments of the layer that a block determines."""
        if is_linear(block):
            return _sizes(block, block)
        parts = _parts(block, activation)
        return _sizes(parts.to_hidden[0], parts.down)

    @classmethod
    def _open_size(cls, arguments: dict[str, Any], options: dict[str, Any]) -> OpenSize:
        """The size to solve for, given the options and the other arguments of the layer."""
        raise NotImplementedError

    def keep_experts(self, level: int, indices: Selection) -> Self:
        """A new layer with a subset of the experts of a level; see `.MuMoE.keep_experts`."""
        return copy.deepcopy(self, {id(self.mixture): self.mixture.keep_experts(level, indices)})

    def forward(self, x: Tensor, *, return_coefficients: bool = False) -> Any:
        """Map inputs of shape (..., in_features) to outputs of shape (..., out_features).

        With `return_coefficients`, also return the coefficients, one tensor of shape (..., N_e) per level.
        """
        gate_input = x if self.num_experts else None
        result = self.mixture(
            self._features(x), gate_input=gate_input, return_coefficients=return_coefficients
        )
        y, coefficients = result if return_coefficients else (result, ())
        if self.skip is not None:
            y = y + self.skip(x)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return (y, coefficients) if return_coefficients else y

    def _features(self, x: Tensor) -> Tensor:
        """The input of the experts."""
        return x


@register_layer
class Transcoder(ReplacementLayer):
    """Sparse latents, each with an output vector: ``y = D TopK(ReLU(E x + b)) + c``.

    `skip` adds a linear map, ``+ S x``. The latents are the coefficients of experts with input 1. Their
    outputs, the columns of D, are initially zero, and the entries of E are normal with variance 1 /
    in_features. In `like`, `parameters` solves for the number of latents.

    Parameters
    ----------
    latents : int
    k : int, optional
        Maximum number of nonzero latents per input. Either `k` or `gate` must be given.
    gate : str, dict or callable, optional
        See `.ExpertGate`; by default ``{"name": "relu_topk", "k": k}``.
    skip : bool, default False
    bias : bool, default True
        Whether to add the vector c.

    References
    ----------
    Dunefsky et al., "Transcoders Find Interpretable LLM Feature Circuits", NeurIPS 2024. Paulo et al.,
    "Transcoders Beat Sparse Autoencoders for Interpretability", arXiv:2501.18823, 2025.

    Examples
    --------
    >>> layer = Transcoder(16, 8, latents=64, k=4)
    >>> y, (a,) = layer(torch.randn(5, 16), return_coefficients=True)
    >>> y.shape, a.shape, int((a != 0).sum(-1).max())
    (torch.Size([5, 8]), torch.Size([5, 64]), 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        latents: int,
        k: int | None = None,
        *,
        gate: AnyGate | None = None,
        skip: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        in_features, latents = as_positive(in_features, "in_features"), as_positive(latents, "latents")
        decoder = MuMoE(
            1, out_features, latents, "dense", bias=False, gate=_gate(k, gate), gate_norm="none",
            gate_features=in_features, device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(in_features, decoder, skip=skip, bias=bias)

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "latents": self.num_experts[0], "skip": self.skip is not None}

    @classmethod
    def _open_size(cls, arguments: dict[str, Any], options: dict[str, Any]) -> OpenSize:
        _check_open("latents", options)
        return _fewest(arguments), lambda size: {"latents": size}

    def _features(self, x: Tensor) -> Tensor:
        return x.new_ones((*x.shape[:-1], 1))


@register_layer
class MixtureOfDecoders(ReplacementLayer):
    """A block whose last layer is a mixture of experts: ``y = sum_n a_n(x) W_n z + c``, with hidden units z.

    The gate is applied to the input x of the block, and the experts to its hidden units. These are
    ``z = activation(U x + d)``, or ``activation(V x + e) * (U x + d)`` if the block is gated. In the Hadamard
    format, as published, ``y = (C^T a) * (D^T z) + c`` and each expert has full rank; D is initially zero.

    `like` copies the form of a block's hidden units: whether they are gated, the activation, the presence of
    the biases d and e, and the number of units, but no weights. Its argument `parameters` solves for the
    number of experts; if that is given, for the rank; and for a block without experts, in a format without a
    rank, for the number of hidden features.

    Parameters
    ----------
    experts : int or sequence of int
        Number of experts per level; ``()`` for the same block without experts.
    k : int, optional
        Maximum number of active experts per level. With experts, either `k` or `gate` must be given.
    format : str, dict or Format, default "hadamard"
    rank : int or sequence of int, optional
        See `.MuMoE`. By default, the experts and the gate together have as many parameters as a matrix from
        the hidden units to the outputs.
    gated : bool, default False
    activation : str, dict or callable, default "gelu"
        See `.MuMoEMLP`.
    gate : str, dict or callable, optional
        See `.ExpertGate`; by default ``{"name": "relu_topk", "k": k}``. ``{"name": "random", "k": k}`` and
        ``{"name": "nearest_centres", "k": k}`` are baselines.
    bias : bool, default True
        Whether to add the vector c.
    hidden_bias : bool, default True
        Whether to include the biases d and e.

    References
    ----------
    Oldfield et al., "Towards Interpretability Without Sacrifice: Faithful Dense Layer Decomposition with
    Mixture of Decoders", NeurIPS 2025.

    Examples
    --------
    >>> layer = MixtureOfDecoders(16, 32, 8, experts=64, k=4, gated=True, activation="silu")
    >>> layer(torch.randn(5, 16)).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        experts: int | Sequence[int],
        k: int | None = None,
        *,
        format: AnyFormat = "hadamard",
        rank: int | Sequence[int] | None = None,
        gated: bool = False,
        activation: str | dict[str, Any] | Callable[[Tensor], Tensor] = "gelu",
        gate: AnyGate | None = None,
        bias: bool = True,
        hidden_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        experts = expert_counts(experts)
        if not experts and (k, gate) != (None, None):
            raise ValueError(f"a layer without experts must have no gate, got k={k} and gate={gate!r}.")
        in_features = as_positive(in_features, "in_features")
        hidden_features = as_positive(hidden_features, "hidden_features")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        gating = {"gate": _gate(k, gate), "gate_features": in_features} if experts else {}
        options: dict[str, Any] = {"bias": False, "gate_norm": "none", **gating, **place}
        decoders = MuMoE(hidden_features, out_features, experts, format, rank, **options)
        super().__init__(in_features, decoders, skip=False, bias=bias)
        for name, flag in (("gated", gated), ("hidden_bias", hidden_bias)):
            check_flag(flag, name)
        sizes = self.in_features, hidden_features
        self.gate_proj = nn.Linear(*sizes, bias=hidden_bias, **place) if gated else None
        self.up = nn.Linear(*sizes, bias=hidden_bias, **place)
        self.activation = ACTIVATIONS.read(activation, device, dtype)

    @property
    def config(self) -> dict[str, Any]:
        mixture = {name: self.mixture.config[name] for name in ("experts", "format", "rank")}
        return {
            **super().config,
            **mixture,
            "hidden_features": self.mixture.in_features,
            "gated": self.gate_proj is not None,
            "activation": ACTIVATIONS.write(self.activation),
            "hidden_bias": self.up.bias is not None,
        }

    @classmethod
    def _read(cls, block: nn.Module, activation: Any) -> dict[str, Any]:
        parts = _parts(block, activation)
        matrix, bias = matrix_of(parts.to_hidden[0])
        return {
            **_sizes(parts.to_hidden[0], parts.down),
            "hidden_features": matrix.shape[1],
            "hidden_bias": bias,
            "gated": len(parts.to_hidden) > 1,
            "activation": copy.deepcopy(parts.activation),
        }

    @classmethod
    def _open_size(cls, arguments: dict[str, Any], options: dict[str, Any]) -> OpenSize:
        if "experts" not in options:
            return _fewest(arguments), lambda size: {"experts": size}
        experts, format = expert_counts(options["experts"]), get_format(arguments.get("format", "hadamard"))
        if format.bonds(len(experts)) and "rank" not in options:
            shape = (*experts, arguments["hidden_features"], arguments["out_features"])
            return 1, lambda size: {"rank": format.rank_family(shape, size)}
        _check_open("hidden_features" if not experts else "experts", options)
        return 1, lambda size: {"hidden_features": size}

    def _features(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        if self.gate_proj is None:
            return self.activation(hidden)
        return self.activation(self.gate_proj(x)) * hidden


@register_layer
class MixtureOfTransforms(ReplacementLayer):
    """Low-rank maps of different ranks, each with its coefficient: ``y = sum_n a_n(x) A_n B_n x + c``.

    In `like`, `parameters` solves for a common factor of all ranks.

    Parameters
    ----------
    ranks : sequence of int
        The rank of each map. Consecutive maps of equal rank form one term of a sum of formats.
    gate : str, dict or callable, default "jumprelu"
        See `.ExpertGate`.
    bias : bool, default True
        Whether to add the vector c.

    References
    ----------
    Lindsey et al., "Sparse mixtures of linear transforms", Transformer Circuits Thread, 2025.

    Examples
    --------
    >>> layer = MixtureOfTransforms(16, 8, ranks=[4, 2, 2, 1, 1, 1, 1])
    >>> layer.mixture.spec.rank
    (4, 2, 1)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        *,
        gate: AnyGate = "jumprelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        ranks = _positive(ranks)
        format, rank = _by_rank(ranks)
        transforms = MuMoE(
            in_features, out_features, len(ranks), format, rank, bias=False, gate=gate, gate_norm="none",
            device=device, dtype=dtype,
        )  # fmt: skip
        super().__init__(transforms.in_features, transforms, skip=False, bias=bias)
        self.ranks = ranks

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "ranks": self.ranks}

    @classmethod
    def _open_size(cls, arguments: dict[str, Any], options: dict[str, Any]) -> OpenSize:
        if "ranks" not in options:
            raise ValueError("with parameters, ranks must also be given, to be scaled; got none.")
        ranks = _positive(options["ranks"])
        return 1, lambda size: {"ranks": [max(1, round(rank * size / max(ranks))) for rank in ranks]}


def _parts(block: nn.Module, activation: Any) -> Block:
    """The parts of an MLP block; raises a ValueError if it is not one."""
    if not is_mlp(block):
        children = [type(child).__name__ for child in block.children()]
        raise ValueError(
            f"a block must have two or three linear layers as children, got {type(block).__name__} "
            f"with {children}."
        )
    return read_mlp(block, activation)


def _sizes(first: nn.Module, last: nn.Module) -> dict[str, Any]:
    """Sizes, device and dtype of a layer from the input of one linear layer to the output of another."""
    matrix, bias = matrix_of(first)
    sizes = {"in_features": matrix.shape[0] - bias, "out_features": matrix_of(last)[0].shape[1]}
    return {**sizes, "device": matrix.device, "dtype": matrix.dtype}


def _positive(ranks: Any) -> list[int]:
    """The ranks as positive integers; there must be at least one."""
    checked = [as_positive(rank, "every rank") for rank in as_entries(ranks, "ranks")]
    if not checked:
        raise ValueError(f"ranks must have at least one entry, got {ranks!r}.")
    return checked


def _by_rank(ranks: Sequence[int]) -> tuple[Format, list[int]]:
    """A sum format with one low-rank term for each run of equal ranks, and the ranks of its terms."""
    terms, start = [], 0
    runs = [(rank, len(list(run))) for rank, run in groupby(ranks)]
    for _, count in runs:
        terms.append(sliced("lowrank", start, start + count))
        start += count
    return sum_of(*terms), [rank for rank, _ in runs]


def _gate(k: int | None, gate: AnyGate | None) -> AnyGate:
    """The default gate with k experts, or the given gate."""
    if gate is None and k is not None:
        return {"name": "relu_topk", "k": k}
    if gate is None or k is not None:
        raise ValueError(f"either k or a gate must be given, got k={k} and gate={gate!r}.")
    return gate


def _fewest(arguments: dict[str, Any]) -> int:
    """The smallest number of experts that a gate supports."""
    fewest: int = getattr(GATES.read(_gate(arguments.get("k"), arguments.get("gate"))), "k", 1)
    return fewest


def _check_open(name: str, options: dict[str, Any]) -> None:
    """Check that a budget leaves a size to solve for."""
    if name in options:
        raise ValueError(
            f"with parameters, {name} must be omitted, so that it is solved for; got {options[name]}."
        )
