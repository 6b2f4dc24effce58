"""The config.json in a run's folder: the requested settings, and the size of the resulting model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mumoe_tensor.readers import read_json, reading

#: Top-level keys of the file.
ENTRIES = ("settings", "model")


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read the config.json of a run.

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
        If the file is not one.
    """
    config = read_json(path)
    with reading(path):
        if set(config) == {"setting", "head"} and isinstance(config["setting"], dict):
            # Earlier versions wrote heads in this form.
            config = {"settings": {"kind": "head", **config["setting"]}, "model": config["head"]}
        if set(config) != set(ENTRIES) or not all(isinstance(entry, dict) for entry in config.values()):
            raise ValueError(f"a run has the keys {' and '.join(ENTRIES)}; this one has {sorted(config)}.")
    data = config["settings"].get("data")
    if isinstance(data, dict) and "inputs" in data:
        # Version 0.1 did not scale the images of .npz files, and always scaled others.
        data.setdefault("scale", not str(data["inputs"]).endswith(".npz"))
    return config
