"""The layers that stand in a model: described in JSON, and made again from that."""

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
    """Let the layers of a class be saved within a model. Works as a decorator.

    Parameters
    ----------
    kind : type
        A module with an attribute `config`, in types of JSON, and a class method
        ``from_config(config, device=..., dtype=...)`` that makes such a layer.

    Raises
    ------
    ValueError
        If another class has its name.
    TypeError
        If it is no such class.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_config")):
        raise TypeError(f"a layer must be a class of modules with a method from_config, got {kind!r}.")
    present = _classes.setdefault(kind.__name__, kind)
    if (present.__module__, present.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"every class of layers must have its own name; {kind.__name__!r} is {present!r}.")
    _classes[kind.__name__] = kind
    return kind


def check_model(model: Any) -> None:
    """Refuse what is no module, with a TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be a torch.nn.Module, got {type(model).__name__}.")


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer that a config describes, with all its parts."""
    return isinstance(module, tuple(_classes.values()))


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The layers of registered classes in a model, by name, each with all that makes it again.

    A layer within another is a part of that. A layer with several names has the first.

    Returns
    -------
    dict of str to dict
        ``{"class": name, "config": arguments}`` in types of JSON; with ``"edits"``, the names of the bias
        edits of each `Experts` by its name in the layer, if there are some.

    Raises
    ------
    ValueError
        If a layer has a gate or an activation without a name, is of a class that is derived from a
        registered one and not registered, has other entries in its state than a layer of its config, or
        buffers that are in no state.
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
        raise ValueError(f"its class must be registered, by register_layer; got {type(layer).__name__}.")
    made: Any = layer
    entry = {"class": type(layer).__name__, "config": as_json(made.config)}
    edits = {
        name.rpartition(".")[0]: [*part] for name, part in layer.named_modules() if type(part) is BiasEdits
    }
    if edits:
        entry["edits"] = edits
    if unsaved := {name for name, _ in layer.named_buffers()} - layer.state_dict().keys():
        raise ValueError(f"buffers must be persistent, got {sorted(unsaved)} that are in no state.")
    present, again = (_outline(module) for module in (layer, rebuild(entry, device="meta")))
    if present != again:
        different = sorted(name for name, _ in present.items() ^ again.items())
        raise ValueError(
            "its state must be that of a layer of its config, as without pruning, parametrizations and "
            f"parallelize; {different[0]!r} differs."
        )
    return entry


def _outline(layer: nn.Module) -> dict[str, tuple[torch.Size, bool]]:
    """Shape, and whether it is of floats, of each entry of a state."""
    return {
        name: (value.shape, value.is_floating_point())
        for name, value in layer.state_dict().items()
        if isinstance(value, Tensor)
    }


def rebuild(entry: Mapping[str, Any], **place: Any) -> Any:
    """A layer from its entry in `describe`, with new values.

    Parameters
    ----------
    entry : mapping
        As it was, or read from JSON.
    **place
        `device` and `dtype`.

    Raises
    ------
    ValueError
        If its class is not registered, or the entry is not one of a layer.
    """
    needed = {"class", "config"}
    if not isinstance(entry, Mapping) or not needed <= entry.keys() <= needed | {"edits"}:
        raise ValueError(f"a layer must be described by its class, config and edits, got {entry!r}.")
    if not isinstance(entry["class"], str) or entry["class"] not in _classes:
        raise ValueError(
            f"a layer must be of a registered class, {', '.join(_classes)}, got {entry['class']!r}: import "
            "the module that registers it first."
        )
    layer, edits = _classes[entry["class"]].from_config(entry["config"], **place), entry.get("edits", {})
    parts = dict(layer.named_modules())
    if not isinstance(edits, Mapping) or not all(hasattr(parts.get(part), "add_edit") for part in edits):
        raise ValueError(f"edits must be names for parts of the layer that take edits, got {edits!r}.")
    for part, names in edits.items():
        for name in names:
            parts[part].add_edit(name)
    return layer


def prepare_to_save(model: nn.Module) -> None:
    """Let the ``save_pretrained`` of models of transformers write the layers in them; see `.pretrained`.

    Nothing happens to other models, nor if transformers has not been imported. All functions that put layers
    into a model call it.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and any(isinstance(m, modeling.PreTrainedModel) for m in model.modules()):
        import_module("mumoe_tensor.nn.pretrained").mark(model)
