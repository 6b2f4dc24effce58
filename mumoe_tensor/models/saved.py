"""Files of models: one of safetensors, with what makes the model again in its metadata."""

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

#: By the name that a file gives.
_KINDS: dict[str, tuple[type[Any], type[Any]]] = {"mixer": (Mixer, MixerConfig), "gpt2": (GPT2, GPT2Config)}


def save_model(model: Mixer | GPT2, path: str | Path) -> None:
    """Write a model with its config as one file of safetensors, whole or not at all.

    Parameters
    ----------
    model : Mixer or GPT2
    path : str or Path

    Raises
    ------
    TypeError
        If it is another model, or wrapped in one.
    """
    kinds = [name for name, (kind, _) in _KINDS.items() if type(model) is kind]
    if not kinds:
        raise TypeError(f"a model to be saved is a Mixer or a GPT2, got {type(model).__name__}.")
    about = {"kind": kinds[0], "config": json.dumps(asdict(model.config))}
    write_tensors(path, model.state_dict(), about)


def load_model(path: str | Path, device: torch.device | str | None = None) -> Mixer | GPT2:
    """Read a model that `save_model` wrote; nothing is unpickled.

    Parameters
    ----------
    path : str or Path
    device : torch.device or str, optional
        Where it shall be; on the CPU by default.

    Returns
    -------
    Mixer or GPT2
        In evaluation mode.

    Raises
    ------
    ValueError
        If it is no such file, or not what was written.
    OSError
        If it cannot be read.
    """
    tensors, about = read_tensors(path)
    with reading(path):
        if not {"kind", "config"} <= set(about) or about["kind"] not in _KINDS:
            raise ValueError(
                f"a model is a file of safetensors with its kind, {' or '.join(_KINDS)}, and its config; got "
                f"kind {about.get('kind')!r} and the entries {sorted(about)}."
            )
        kind, kind_of_config = _KINDS[about["kind"]]
        values = parse_json(about["config"])
        config = kind_of_config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        if config.depth > len(tensors):
            raise ValueError(f"every block has tensors; got {len(tensors)} for a depth of {config.depth:,}.")
        model: Mixer | GPT2 = load_tensors(kind(config, "meta"), tensors)
    return model if device is None else model.to(device)
