"""The config.json of a run's folder, which says what kind of run it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mumoe_tensor.readers import read_json, reading

#: The entries of each kind: what was asked for, and what the model has.
MODEL, HEAD = ("settings", "model"), ("setting", "head")


def read_config(path: Path, kind: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """Read the config of a run of a kind.

    Parameters
    ----------
    path : Path
    kind : tuple of two str
        `MODEL` of a Mixer or a GPT-2, `HEAD` of a head.

    Raises
    ------
    ValueError
        If it is that of another kind of run, or of none.
    """
    config = read_json(path)
    with reading(path):
        if set(config) != set(kind) or not all(isinstance(entry, dict) for entry in config.values()):
            runs = {MODEL: "train mixer or train gpt2", HEAD: "train head"}
            others = [name for entries, name in runs.items() if set(config) == set(entries) != set(kind)]
            what = f"this is a run of {others[0]}" if others else f"this has {sorted(config)}"
            raise ValueError(f"a run of {runs[kind]} has the objects {' and '.join(kind)}; {what}.")
    data = config[kind[0]].get("data")
    if isinstance(data, dict) and "inputs" in data:
        # Version 0.1 took images of an .npz file as they were, and always scaled the others.
        data.setdefault("scale", not str(data["inputs"]).endswith(".npz"))
    return config
