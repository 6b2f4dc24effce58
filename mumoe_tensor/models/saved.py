"""Saving models to safetensors files with their config in the metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mumoe_tensor.models.gpt2 import GPT2, GPT2Config
from mumoe_tensor.models.mixer import Mixer, MixerConfig
from mumoe_tensor.nn.weights import load_tensors, read_tensors, write_tensors
from mumoe_tensor.readers import parse_json, reading

#: Classes of models and configs, by the name in the file.
_KINDS: dict[str, tuple[type[Any], type[Any]]] = {"mixer": (Mixer, MixerConfig), "gpt2": (GPT2, GPT2Config)}


def save_model(model: Mixer | GPT2, path: str | Path) -> None:
    """Save a model with its config to a safetensors file, atomically.

    Raises
    ------
    TypeError
        If `model` is another model, or a wrapped one.
    """
    kinds = [name for name, (kind, _) in _KINDS.items() if type(model) is kind]
    if not kinds:
        raise TypeError(f"model must be a Mixer or a GPT2, got {type(model).__name__}.")
    about = {"kind": kinds[0], "config": json.dumps(asdict(model.config))}
    write_tensors(path, model.state_dict(), about)


def load_model(path: str | Path, device: torch.device | str | None = None) -> Mixer | GPT2:
    """Load a model saved by `save_model`; nothing is unpickled.

    Parameters
    ----------
    path : str or Path
    device : torch.device or str, optional
        Device of the model, by default the CPU.

    Returns
    -------
    Mixer or GPT2
        The model in evaluation mode.

    Raises
    ------
    ValueError
        If the file is not a saved model, or is damaged.
    OSError
        If the file cannot be read.
    """
    tensors, about = read_tensors(path)
    with reading(path):
        if not {"kind", "config"} <= set(about) or about["kind"] not in _KINDS:
            raise ValueError(
                f"it must be a safetensors file with the kind of a model, {' or '.join(_KINDS)}, and its "
                f"config; got kind {about.get('kind')!r} and the entries {sorted(about)}."
            )
        kind, kind_of_config = _KINDS[about["kind"]]
        values = parse_json(about["config"])
        config = kind_of_config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        if config.depth > len(tensors):
            raise ValueError(f"every block must have tensors, got {len(tensors)} for depth {config.depth:,}.")
        model: Mixer | GPT2 = load_tensors(kind(config, "meta"), tensors)
    return model if device is None else model.to(device)
