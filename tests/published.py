"""Recorded results of the published layers, for every test that compares with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CASES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
NORMS = {"bn": "batch", "ln": "layer"}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a case, and its tensors."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        settings = {name: json.loads(value) for name, value in file.metadata().items()}
        return settings, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def state_of(tensors: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the layer that a case was recorded with."""
    return {
        name.removeprefix("state_dict."): value
        for name, value in tensors.items()
        if name.startswith("state_dict.")
    }


def layer_of(settings: dict[str, Any], state: dict[str, Any]) -> Any:
    """This library's layer with these parameters."""
    from mumoe_tensor.nn import MuMoE, MuMoEMLP

    layer = MuMoEMLP if settings["second_dim"] else MuMoE
    return layer.from_published(state, settings["format"], gate_norm=NORMS[settings["normalization"]])
