"""Files of models: one of safetensors, with what makes the model again in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mumoe_tensor.files import whole_file
from mumoe_tensor.models.gpt2 import GPT2, GPT2Config
from mumoe_tensor.models.mixer import Mixer, MixerConfig

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
    from safetensors.torch import save

    kinds = [name for name, (kind, _) in _KINDS.items() if type(model) is kind]
    if not kinds:
        raise TypeError(f"a model to be saved is a Mixer or a GPT2, got {type(model).__name__}.")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    data = save(state, {"kind": kinds[0], "config": json.dumps(asdict(model.config))})
    with whole_file(Path(path)) as file:
        file.write(data)


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
        If it is no such file.
    FileNotFoundError
        If there is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device or "cpu")) as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        kind, kind_of_config = _KINDS[about["kind"]]
        told = json.loads(about["config"])
        config = kind_of_config(**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})
        model: Mixer | GPT2 = kind(config, "meta")
        model.load_state_dict(state, assign=True)
    except (SafetensorError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"a model is a file of safetensors with its kind and config; {path} is not: "
            f"{' '.join(str(error).split())}"
        ) from None
    return model.eval()
