"""What a run of `mumoe-tensor train` left in its folder, read again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from mumoe_tensor.models.heads import Head, load_head
from mumoe_tensor.models.saved import load_model
from mumoe_tensor.readers import checked, reading
from mumoe_tensor.training.folder import HEAD, MODEL, read_config
from mumoe_tensor.training.head import HeadSetting
from mumoe_tensor.training.settings import Settings, settings_of


def read_run(folder: str | Path) -> tuple[Settings, nn.Module]:
    """Settings and trained model of a run of a Mixer or a GPT-2.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    MixerRun or GPT2Run
    Module
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        If the folder has no finished run, or not one of these, or a file of it is damaged.
    """
    config, weights = Path(folder, "config.json"), Path(folder, "model.safetensors")
    _need(config)
    recorded = read_config(config, MODEL)["settings"]
    with reading(config):
        settings = settings_of(recorded)
    _need(weights)
    model: Any = load_model(weights)
    with reading(weights):
        for field in fields(settings.model):
            asked, there = (getattr(config, field.name, None) for config in (settings.model, model.config))
            if asked is not None and asked != there:
                raise ValueError(
                    f"the model must be that of config.json; {field.name} is {there!r} here, {asked!r} there."
                )
    return settings, model


def read_head_run(folder: str | Path) -> tuple[HeadSetting, Head]:
    """Setting and trained head of a run of `mumoe-tensor train head`.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    HeadSetting
    Head
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        If the folder has no finished run, or not one of a head, or a file of it is damaged.
    """
    config, weights = Path(folder, "config.json"), Path(folder, "head.safetensors")
    _need(config)
    recorded = read_config(config, HEAD)["setting"]
    with reading(config):
        setting = checked(HeadSetting, recorded)
    _need(weights)
    head = load_head(weights)
    with reading(weights):
        for name, asked in setting.head.items():
            there = head.config.get(name, asked)
            if name in ("format", "gate", "gate_norm", "init") and there != asked:
                raise ValueError(
                    f"the head must be that of config.json; {name} is {there!r} here, {asked!r} there."
                )
    return setting, head


def _need(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path.parent} must have a finished run; it has no {path.name}.")
