"""Saving and loading models: the layers of experts as JSON, and all weights in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mumoe_tensor.extras import missing
from mumoe_tensor.files import alone_in, replacing
from mumoe_tensor.nn.described import check_model, describe, prepare_to_save, rebuild
from mumoe_tensor.nn.weights import checksum_of_bytes, read_tensors, write_tensors
from mumoe_tensor.readers import read_json, reading

#: The version of the folder format. `load` refuses later versions.
VERSION = 1
DESCRIPTION, WEIGHTS = "layers.json", "weights.safetensors"


def save(model: nn.Module, folder: str | Path) -> None:
    """Save a model to a folder: its layers of experts as ``layers.json``, its state as safetensors.

    Saving is atomic: an existing folder is not changed until the new content is complete. Whether parameters
    are frozen is not saved.

    Parameters
    ----------
    model : Module
        Any model, or a layer. For a transformers model, see also `prepare_to_save` and ``save_pretrained``.
    folder : str or Path

    Raises
    ------
    ValueError
        If a layer cannot be rebuilt from its config (see `MuMoE.config`), or the state contains anything
        other than ordinary tensors with values.
    TypeError
        If `model` is not a module.
    OSError
        If the folder cannot be written.
    ModuleNotFoundError
        If safetensors is not installed.

    Examples
    --------
    >>> import tempfile, torch
    >>> from mumoe_tensor.nn import MuMoE, load, save
    >>> def network():
    ...     return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    >>> model = network()
    >>> model[0] = MuMoE(16, 16, experts=4, rank=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder)
    ...     again = load(folder, model=network())
    >>> again[0].config == model[0].config, torch.equal(again[2].weight, model[2].weight)
    (True, True)
    """
    _check_safetensors()
    check_model(model)
    state = model.state_dict()
    for name, value in state.items():
        if type(value) is not Tensor or value.is_meta or value.layout != torch.strided:
            raise ValueError(
                "the state of a model to be saved must be ordinary tensors with values; "
                f"{name!r} is a {type(value).__name__}{' on meta' * getattr(value, 'is_meta', False)}."
            )
    tied = _tied(state)
    description = {"version": VERSION, "layers": describe(model), "tied": tied}
    content = json.dumps(description, indent=2, allow_nan=False)
    tensors: dict[str, Tensor] = {}
    memory = set()
    for name, value in state.items():
        if name not in tied:  # safetensors does not support several views of one tensor
            place = value.untyped_storage().data_ptr()
            tensors[name] = value.clone() if place in memory else value
            memory.add(place)
    folder = Path(folder)
    with alone_in(folder), replacing(folder, (DESCRIPTION, WEIGHTS)) as new:
        (new / DESCRIPTION).write_text(content + "\n", encoding="utf-8")
        write_tensors(new / WEIGHTS, tensors, {"format": "pt"})


def load(folder: str | Path, model: nn.Module | None = None) -> Any:
    """Load a folder written by `save`: put its layers of experts into a model, and load the weights.

    Nothing is unpickled. If the folder does not fit, the model is not changed.

    Parameters
    ----------
    folder : str or Path
    model : Module, optional
        A model constructed like the saved one, with or without its layers of experts. Its parameters remain
        the same objects. New layers take the device and the training mode of the modules that they replace.
        It is not needed if the folder contains a single layer.

    Returns
    -------
    Module
        The model.

    Raises
    ------
    ValueError
        If the folder is damaged or has a later version, the model has no module in place of a layer, a class
        or a format is not registered, or an entry of the state is missing, unexpected, or has the wrong shape
        or dtype.
    TypeError
        If the model is not a module.
    OSError
        If the folder cannot be read.
    ModuleNotFoundError
        If safetensors is not installed.
    """
    _check_safetensors()
    if model is not None:
        check_model(model)
    layers, state = _read(Path(folder))
    with reading(folder):
        if model is None:
            if [*layers] != [""]:
                raise ValueError(f"model must be given to load layers of a model, got layers {[*layers]}.")
            model = _with_state(rebuild(layers[""], device="meta"), state)
        present = describe(model)
        new = {
            name: _layer(model, name, entry, state)
            for name, entry in layers.items()
            if present.get(name) != entry
        }
        places = _places(model, new, layers)
        expected = _expected(model, places)
        _check(expected, state)
        if empty := [x for x, value in model.named_buffers() if value.is_meta and x not in expected]:
            raise ValueError(f"non-persistent buffers must have values; {empty} are on the meta device.")
    _put(model, places, state, _tied(expected))
    prepare_to_save(model)
    return model


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of the layers in a folder, and the state."""
    description = read_json(folder / DESCRIPTION)
    with reading(folder / DESCRIPTION):
        layers, tied = check_version(description), description.get("tied")
        if not isinstance(tied, dict) or not all(isinstance(first, str) for first in tied.values()):
            raise ValueError(f"tied must be an object that maps names to names, got {tied!r}.")
    tensors, _ = read_tensors(folder / WEIGHTS)
    return layers, tensors | {
        name: tensors[first].clone() for name, first in tied.items() if first in tensors
    }


def _put(
    model: nn.Module, places: Mapping[str, nn.Module], state: Mapping[str, Tensor], tied: Mapping[str, str]
) -> None:
    """Put layers into a model, and load a state that fits."""
    old = {place: model.get_submodule(place) for place in places}
    try:
        for place, layer in places.items():
            model.set_submodule(place, layer)
        is_meta = any(value.is_meta for value in model.state_dict().values())
        model.load_state_dict(state, assign=is_meta)
        for name, first in tied.items() if is_meta else ():  # torch assigns two parameters
            (module, entry), (owner, other) = (_place_of(model, x) for x in (name, first))
            setattr(module, entry, getattr(owner, other))
    except BaseException:
        for place, module in old.items():
            model.set_submodule(place, module)
        raise


def check_version(description: Mapping[str, Any]) -> Any:
    """Check the version of a description, and return its layers."""
    version, layers = description.get("version"), description.get("layers")
    if type(version) is not int or version < 1 or not isinstance(layers, dict):
        raise ValueError(
            "a description must have a version, a positive integer, and an object of layers; got "
            f"{version!r} and a {type(layers).__name__}."
        )
    if version > VERSION:
        raise ValueError(
            f"the version of a description must be at most {VERSION} for this version of mumoe_tensor, got "
            f"{version}: upgrade mumoe_tensor."
        )
    return layers


def _check_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing("safetensors"), name="safetensors") from error


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tied tensors, each with the first name of its tensor in the state."""
    first: dict[Any, str] = {}
    tied = {}
    for name, value in state.items():
        place = value.data_ptr() or id(value)  # a meta or empty tensor has no memory
        key = place, value.device, value.dtype, value.shape, value.stride()
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _layer(model: nn.Module, name: str, entry: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild a layer with its part of a state, to replace a module."""
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model must have a module {name!r}, which a layer replaces.") from None
    if old is model:
        raise ValueError(f"the model must be a layer like the saved one, got {type(model).__name__}.")
    layer = rebuild(entry, device="meta")
    prefix = f"{name}."
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    _check(layer.state_dict(keep_vars=True), part, prefix, any_float=True)
    device = next((x.device for module in (old, model) for x in module.parameters()), torch.device("cpu"))
    return _with_state(layer, {key: value.to(device) for key, value in part.items()}).train(old.training)


def _places(
    model: nn.Module, new: Mapping[str, nn.Module], layers: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """The new layers, by all names of the modules that they replace."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {
        place: layer
        for name, layer in new.items()
        for place in names[model.get_submodule(name)]
        if place == name or place not in layers
    }


def _place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and the attribute of an entry of the state."""
    above, _, entry = name.rpartition(".")
    return model.get_submodule(above), entry


def _with_state(layer: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    layer.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    return layer


def _expected(model: nn.Module, places: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The state of a model after inserting new layers."""
    below = tuple(f"{name}." for name in places)
    expected = {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.startswith(below)}
    for name, layer in places.items():
        expected |= layer.state_dict(prefix=f"{name}.", keep_vars=True)
    return expected


def _check(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], prefix: str = "", any_float: bool = False
) -> None:
    """Raise an error that lists the entries of a state that differ from the expected ones."""
    wrong = [f"{prefix}{name} is missing" for name in expected.keys() - state.keys()]
    wrong += [f"{prefix}{name} is left over" for name in state.keys() - expected.keys()]
    for name in expected.keys() & state.keys():
        tensor, value = expected[name], state[name]
        if value.shape != tensor.shape:
            wrong.append(f"{prefix}{name} has shape {tuple(value.shape)} instead of {tuple(tensor.shape)}")
        elif value.dtype != tensor.dtype and not (
            any_float and value.is_floating_point() and tensor.is_floating_point()
        ):
            wrong.append(f"{prefix}{name} has dtype {value.dtype} instead of {tensor.dtype}")
    for name, first in _tied(expected).items():
        if not wrong and checksum_of_bytes(state[name]) != checksum_of_bytes(state[first]):
            wrong.append(f"{prefix}{name} differs from {first}, to which the model ties it")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the state must match the model: {'; '.join(sorted(wrong)[:5])}{more}.")
