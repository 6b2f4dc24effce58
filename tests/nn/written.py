"""A gate, an activation, and layers that are written and read, for the tests of configs, names and states."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoEMLP, entmax15  # noqa: E402


def made(kind: str, function: Any) -> Any:
    return MuMoEMLP(5, 6, 4, 3, rank=2, gate_norm="layer", **{kind: function})


class Tempered(nn.Module):
    """A gate with a parameter."""

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.start = start
        self.temperature = nn.Parameter(torch.tensor(float(start)))

    def forward(self, logits: Any) -> Any:
        return entmax15(logits / self.temperature)


def squared_relu(x: Any) -> Any:
    return x.relu() ** 2


def through_json(config: dict[str, Any]) -> Any:
    return json.loads(json.dumps(config, allow_nan=False))


def through_a_file(config: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(config, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_comes_back(layer: Any) -> None:
    """A layer made from the written config, with the state, has the same config and outputs."""
    for name, parameter in layer.named_parameters():
        if name.startswith("gate"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(7, 5)
    layer.train()(x)
    for config in (through_json(layer.config), through_a_file(layer.config)):
        again = type(layer).from_config(config)
        assert again.config == layer.config
        again.load_state_dict(layer.state_dict())
        assert again.state_dict().keys() == layer.state_dict().keys()
        assert torch.equal(again.eval()(x), layer.eval()(x))
        assert str(again) == str(layer)
