"""JSON descriptions of the layers in a model, from which they can be rebuilt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mumoe_tensor.arguments import as_json
from mumoe_tensor.nn.edits import BiasEdits

Layer = TypeVar("Layer", bound=type[nn.Module])
#: The classes that can be described, by name.
_classes: dict[str, Any] = {}


def register_layer(kind: Layer) -> Layer:
    """Allow layers of a class to be saved within a model. Use it as a class decorator.

    Parameters
    ----------
    kind : type
        A subclass of `torch.nn.Module` with an attribute `config` of JSON types and a class method
        ``from_config(config, device=..., dtype=...)`` that makes a layer from it.

    Raises
    ------
    ValueError
        If another class has the same name.
    TypeError
        If `kind` is not such a class.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_config")):
        raise TypeError(f"a layer must be a subclass of Module with a method from_config, got {kind!r}.")
    present = _classes.setdefault(kind.__name__, kind)
    if (present.__module__, present.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"classes of layers must have unique names; {kind.__name__!r} is {present!r}.")
    _classes[kind.__name__] = kind
    return kind


def check_model(model: Any) -> None:
    """Raise a TypeError unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be a torch.nn.Module, got {type(model).__name__}.")


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer that its config describes completely, including its submodules."""
    return isinstance(module, tuple(_classes.values()))


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe the layers of registered classes in a model, by name.

    A layer inside another layer is part of the outer one. A layer with several names is listed under the
    first.

    Returns
    -------
    dict of str to dict
        ``{"class": name, "config": arguments}`` in JSON types. If there are bias edits, ``"edits"`` maps each
        `Experts`, by its name within the layer, to the names of its edits.

    Raises
    ------
    ValueError
        If a layer has a gate or an activation without a name, its class is an unregistered subclass of a
        registered one, its state differs from the state of a layer with its config, or it has non-persistent
        buffers.
    """
    described: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if not any(f"{name}.".startswith(f"{above}." if above else "") for above in described):
            kinds = [kind for kind in _classes.values() if isinstance(module, kind)]
            if kinds:
                try:
                    described[name] = _entry(module, kinds)
                except ValueError as error:
                    raise ValueError(f"the layer {name!r} cannot be saved: {error}") from error
    return described


def _entry(layer: nn.Module, kinds: list[type]) -> dict[str, Any]:
    if type(layer) not in kinds:
        raise ValueError(f"its class must be registered by register_layer, got {type(layer).__name__}.")
    made: Any = layer
    entry = {"class": type(layer).__name__, "config": as_json(made.config)}
    edits = {
        name.rpartition(".")[0]: [*part] for name, part in layer.named_modules() if type(part) is BiasEdits
    }
    if edits:
        entry["edits"] = edits
    if unsaved := {name for name, _ in layer.named_buffers()} - layer.state_dict().keys():
        raise ValueError(f"buffers must be persistent, got {sorted(unsaved)}, which are not.")
    present, again = (_outline(module) for module in (layer, rebuild(entry, device="meta")))
    if present != again:
        different = sorted(name for name, _ in present.items() ^ again.items())
        raise ValueError(
            "its state must match its config, without pruning, parametrizations or parallelize; "
            f"{different[0]!r} differs."
        )
    return entry


def _outline(layer: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    """Shape of each entry of a state, and whether its dtype is floating-point."""
    return {
        name: (value.shape, value.is_floating_point())
        for name, value in layer.state_dict().items()
        if isinstance(value, Tensor)
    }


def rebuild(entry: Mapping[str, Any], **place: Any) -> Any:
    """Rebuild a layer from its `describe` entry, with new values.

    Parameters
    ----------
    entry : mapping
        The entry, possibly after a round trip through JSON.
    **place
        `device` and `dtype`.

    Raises
    ------
    ValueError
        If the class is not registered, or the entry does not describe a layer.
    """
    needed = {"class", "config"}
    if not isinstance(entry, Mapping) or not needed <= entry.keys() <= needed | {"edits"}:
        raise ValueError(f"a layer must be described by class, config and optional edits, got {entry!r}.")
    if not isinstance(entry["class"], str) or entry["class"] not in _classes:
        raise ValueError(
            f"the class of a layer must be registered ({', '.join(_classes)}), got {entry['class']!r}: first "
            "import the module that registers it."
        )
    layer, edits = _classes[entry["class"]].from_config(entry["config"], **place), entry.get("edits", {})
    parts = dict(layer.named_modules())
    if not isinstance(edits, Mapping) or not all(hasattr(parts.get(part), "add_edit") for part in edits):
        raise ValueError(f"the keys of edits must be submodules that support edits, got {edits!r}.")
    for part, names in edits.items():
        for name in names:
            parts[part].add_edit(name)
    return layer


def prepare_to_save(model: nn.Module) -> None:
    """Make ``save_pretrained`` of a transformers model save the layers in it; see `.pretrained`.

    Other models are not changed. Every function that puts layers into a model calls this function.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and any(isinstance(m, modeling.PreTrainedModel) for m in model.modules()):
        import_module("mumoe_tensor.nn.pretrained").mark(model)
