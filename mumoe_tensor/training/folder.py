"""The config.json of a run's folder: the settings that were asked for, and what the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mumoe_tensor.readers import read_json, reading

#: The objects of the file.
ENTRIES = ("settings", "model")


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read the config of a run.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict
        ``settings``, with their ``kind``, and ``model``.

    Raises
    ------
    ValueError
        If it is none.
    """
    config = read_json(path)
    with reading(path):
        if set(config) == {"setting", "head"} and isinstance(config["setting"], dict):
            # So earlier versions wrote heads.
            config = {"settings": {"kind": "head", **config["setting"]}, "model": config["head"]}
        if set(config) != set(ENTRIES) or not all(isinstance(entry, dict) for entry in config.values()):
            raise ValueError(f"a run has the objects {' and '.join(ENTRIES)}; this has {sorted(config)}.")
    data = config["settings"].get("data")
    if isinstance(data, dict) and "inputs" in data:
        # Version 0.1 took images of an .npz file as they were, and always scaled the others.
        data.setdefault("scale", not str(data["inputs"]).endswith(".npz"))
    return config
