"""What a finished run of `mumoe-tensor train mixer` or `train gpt2` left, read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from mumoe_tensor.models.saved import load_model
from mumoe_tensor.training.settings import RUNS, Settings


def read_run(folder: str | Path) -> tuple[Settings, nn.Module]:
    """Settings and trained model of a run.

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
        If the folder has no finished run, or not one of these.
    """
    from pydantic import TypeAdapter, ValidationError

    folder = Path(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if not config.exists() or not weights.exists():
        raise ValueError(f"{folder} must have a finished run: config.json and model.safetensors.")
    try:
        told: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))["settings"]
        kind = RUNS[told.pop("kind")]
        settings: Settings = TypeAdapter(kind).validate_json(json.dumps(told), strict=True)
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise ValueError(
            f"config.json of a run has its settings, with the kind {' or '.join(RUNS)}; that of {folder} has "
            f"not: {error}"
        ) from None
    return settings, load_model(weights)
