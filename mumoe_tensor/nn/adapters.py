"""Adapters: trainable experts in parallel to linear layers of a frozen model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.checks import check_flag
from mumoe_tensor.nn.described import register_layer
from mumoe_tensor.nn.init import make_zero
from mumoe_tensor.nn.layers import MuMoE
from mumoe_tensor.nn.linear import check_linear, is_linear, matrix_of
from mumoe_tensor.nn.saving import DESCRIPTION, check_version, load, save
from mumoe_tensor.nn.surgery import (
    Planned,
    Replacement,
    choose,
    output_error,
    plan_replacements,
    put_all,
    put_replacements,
)
from mumoe_tensor.readers import read_json, reading
from mumoe_tensor.selections import Index

#: Prefix of the names of saved experts, so that `load` does not mistake them for layers of a model.
SAVED = "adapters"
#: The predicate in error messages about a layer.
REFUSAL = "cannot have parallel experts"


@register_layer
class Adapter(nn.Module):
    """A linear layer with parallel experts: ``y = base(x) + delta(x)``.

    Attributes
    ----------
    base : torch.nn.Linear, or Conv1D of transformers
    delta : MuMoE
    """

    #: Empty, since an adapter is not fitted.
    fit_errors: tuple[float, ...] = ()

    def __init__(self, base: nn.Module, delta: MuMoE):
        super().__init__()
        self.base, self.delta = base, delta
        self.in_features, self.out_features = delta.in_features, delta.out_features

    @property
    def weight(self) -> Any:
        """The weight of the base, since some models read its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The bias of the base."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs of shape (..., in_features)."""
        y: Tensor = self.base(x)
        delta: Tensor = self.delta(x.to(self.delta.gate.weight.dtype))
        return y + delta.to(y.dtype)

    @property
    def config(self) -> dict[str, Any]:
        """The config of the experts, and the class of the base."""
        return {**self.delta.config, "base": type(self.base).__name__}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **place: Any) -> Adapter:
        """Make an adapter with new values; further arguments are `device` and `dtype`, as for `MuMoE`."""
        config = dict(config)
        base = config.pop("base", None)
        delta = MuMoE.from_config(config, **place)
        sizes = delta.in_features, delta.out_features
        if base == "Linear":
            return cls(nn.Linear(*sizes, bias=delta.spec.bias, **place), delta)
        if base != "Conv1D":
            raise ValueError(f"the base of an adapter must be a Linear or Conv1D, got {base!r}.")
        from transformers.pytorch_utils import Conv1D

        with torch.device(delta.gate.weight.device):
            return cls(Conv1D(*reversed(sizes)).to(dtype=place.get("dtype")), delta)


def add_experts(
    model: nn.Module, pattern: str, *, dry_run: bool = False, **options: Any
) -> list[Replacement]:
    """Freeze a model, and add experts in parallel to its linear layers, in place.

    The outputs do not change, because the last factor of every term of the experts starts at zero. All
    parameters except those of adapters are frozen. All layers are checked before any is changed, so an error
    leaves the model unchanged.

    Parameters
    ----------
    pattern : str
        Shell pattern of the names of the linear layers, e.g. ``"*.q_proj"``.
    dry_run : bool, default False
        Return the replacements without changing the model.
    **options
        Arguments of `MuMoE` for each layer, such as experts, format, and rank or parameters. The experts have
        a bias if the linear layer has one. Their default dtype is float32, or float64 for a float64 layer.

    Returns
    -------
    list of Replacement

    Raises
    ------
    ValueError
        As in `replace_linear`, or if a layer already has parallel experts.

    Examples
    --------
    >>> from mumoe_tensor.nn import add_experts
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> x = torch.randn(5, 16)
    >>> before = model(x)
    >>> [print(each) for each in add_experts(model, "0", experts=4, format="cp", rank=2)]
    0: 544 -> 714 parameters, not fitted
    [None]
    >>> torch.equal(model(x), before)
    True
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    170
    """
    check_flag(dry_run, "dry_run")
    if "experts" not in options or {"bias", "gate_features"} & options.keys():
        raise TypeError(
            "the options must include experts, but neither bias, which follows from the linear layer, nor "
            f"gate_features, since the gate has the same inputs as the layer; got {options}."
        )

    def make(linear: nn.Module, **more: Any) -> MuMoE:
        matrix, bias = matrix_of(linear)
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        place = {"device": matrix.device, "dtype": dtype, **options, **more}
        delta = MuMoE(matrix.shape[0] - bias, matrix.shape[1], bias=bias, **place)
        make_zero(delta.weight)
        if not (matrix.is_meta or delta.gate.weight.is_meta):
            error = output_error(linear, Adapter(linear, delta), delta.in_features)
            if error != 0:  # zero times a non-finite coefficient is NaN
                raise ValueError(f"the outputs must not change; their relative error would be {error}.")
        return delta

    planned = _planned(model, pattern, make)
    return [each for _, each in planned.values()] if dry_run else _put(model, planned)


def remove_experts(model: nn.Module, pattern: str = "*") -> None:
    """Remove parallel experts, in place. The linear layers are restored and remain frozen.

    Parameters
    ----------
    pattern : str
        Shell pattern of the names of the layers, by default all.

    Raises
    ------
    ValueError
        If the pattern matches no layer with parallel experts.
    """
    chosen = _adapters(model, pattern)
    put_all(model, chosen, {adapter: adapter.base for adapter in chosen})


@torch.no_grad()
def merge_experts(model: nn.Module, expert: Index = (), pattern: str = "*") -> None:
    """Merge one expert into each linear layer, and remove all experts, in place.

    The model then has the outputs that it had with coefficient one for this expert and zero for the others.

    Parameters
    ----------
    expert : int or sequence of int
        One index per level; empty for adapters without levels.
    pattern : str
        Shell pattern of the names of the layers, by default all.

    Raises
    ------
    ValueError, TypeError
        If there is no such expert, the pattern matches no layer with parallel experts, or the experts have an
        input norm. The model is then unchanged.
    """
    chosen = _adapters(model, pattern)
    merged = {}
    for adapter, names in chosen.items():
        if adapter.delta.input_norm is not None:
            raise ValueError(f"experts to be merged must have no input norm, got one for {names[0]!r}.")
        matrix, bias = adapter.delta.expert(expert)
        weight, base_bias = adapter.weight, adapter.bias
        wide = torch.promote_types(weight.dtype, matrix.dtype)
        change = matrix.mT if isinstance(adapter.base, nn.Linear) else matrix
        merged[weight] = weight.to(wide) + change
        if base_bias is not None and bias is not None:
            merged[base_bias] = base_bias.to(wide) + bias
    for parameter, value in merged.items():
        parameter.copy_(value)
    put_all(model, chosen, {adapter: adapter.base for adapter in chosen})


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the experts of all adapters of a model to a folder, without the model; see `.save`.

    Raises
    ------
    ValueError
        If the model has no adapters, or as in `.save`.
    OSError, ModuleNotFoundError
        As in `.save`.
    """
    deltas = {f"{SAVED}.{names[0]}": adapter.delta for adapter, names in _adapters(model, "*").items()}
    save(_tree(deltas), folder)


def load_adapter(model: nn.Module, folder: str | Path) -> list[Replacement]:
    """Freeze a model, and add experts saved by `save_adapter` to its linear layers, in place.

    If the folder does not fit the model, the model is unchanged.

    Returns
    -------
    list of Replacement

    Raises
    ------
    ValueError
        If the folder is damaged, the model has no linear layers with these names and sizes, or these layers
        already have parallel experts.
    OSError, ModuleNotFoundError
        As in `.load`.
    """
    with reading(Path(folder) / DESCRIPTION):
        names = [*check_version(read_json(Path(folder) / DESCRIPTION))]
        if not all(name.startswith(f"{SAVED}.") and all(name.split(".")) for name in names):
            raise ValueError(f"experts must be saved by save_adapter, with the names of layers; got {names}.")
    tree = load(folder, model=_tree({name: nn.Identity() for name in names}))
    planned: Planned = {}
    for name in names:
        planned |= _planned(model, name.removeprefix(f"{SAVED}."), _loaded(tree.get_submodule(name)))
    return _put(model, planned)


def _loaded(delta: nn.Module) -> Callable[..., MuMoE]:
    """A function that checks that loaded experts fit a linear layer, and returns them."""

    def make(linear: nn.Module, **more: Any) -> MuMoE:
        matrix, bias = matrix_of(linear)
        sizes = matrix.shape[0] - bias, matrix.shape[1], bias
        if not isinstance(delta, MuMoE):
            raise ValueError(f"experts of an adapter must be a MuMoE, got {type(delta).__name__}.")
        if (saved := (delta.in_features, delta.out_features, delta.spec.bias)) != sizes:
            raise ValueError(
                f"the experts must match (in_features, out_features, bias) of the linear layer, {sizes}; "
                f"got {saved}."
            )
        return delta.to(matrix.device)

    return make


def _planned(model: nn.Module, pattern: str, make: Callable[..., MuMoE]) -> Planned:
    """Plan an adapter for each linear layer, with experts from `make`."""

    def maker(linear: nn.Module) -> Callable[..., Adapter]:
        if isinstance(linear, Adapter):
            raise ValueError("it already has parallel experts: remove or merge them first.")
        check_linear(linear)
        return lambda **more: Adapter(linear, make(linear, **more)).train(linear.training)

    def fits(module: nn.Module) -> bool:
        return is_linear(module) or isinstance(module, Adapter)

    return plan_replacements(model, pattern, fits, maker, "linear layer", {}, REFUSAL)


def _put(model: nn.Module, planned: Planned) -> list[Replacement]:
    """Put the adapters into the model, and freeze everything else."""
    replacements = put_replacements(model, planned, refusal=REFUSAL)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    trained = {id(parameter) for adapter in adapters for parameter in adapter.delta.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)
    return replacements


def _adapters(model: nn.Module, pattern: str) -> dict[Any, list[str]]:
    """The adapters that match the pattern, each with all its names in the model."""
    chosen: dict[Any, list[str]] = choose(
        model, pattern, lambda module: isinstance(module, Adapter), "layer with parallel experts"
    )
    return chosen


def _tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module with exactly these submodules."""
    tree = nn.Module()
    for name, module in modules.items():
        *above, last = name.split(".")
        place = tree
        for part in above:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, module)
    return tree
