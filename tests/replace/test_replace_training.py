"""A layer is trained to the outputs of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from mumoe_tensor.nn import MuMoE
from mumoe_tensor.replace import ActivationRows, Activations, fit, usage
from mumoe_tensor.training import TrainConfig

CONFIG = TrainConfig(batch_size=32, learning_rate=0.03, steps=60, evaluate_every=20)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> ActivationRows:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)))
    folder = tmp_path_factory.mktemp("activations")
    return Activations.collect(model, "1", torch.randn(40, 8, 4), folder)["1"]


def test_the_error_is_normalised_and_falls(rows: ActivationRows, tmp_path: Path) -> None:
    torch.manual_seed(1)
    layer = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    training, validation = rows.take(range(32)), rows.take(range(32, 40))
    outcome = fit(layer, training, CONFIG, validation=validation, folder=tmp_path)
    x, y = validation.batch(range(len(validation)))
    with torch.no_grad():
        error = (layer(x) - y).square().sum(1).mean() / training.variance
    assert outcome.nmse == pytest.approx(float(error), rel=1e-4) and outcome.nmse < 0.2
    assert [e.accuracy for e in outcome.evaluations] == [None] * 3
    assert (tmp_path / "metrics.csv").exists()


def test_the_bias_starts_at_the_mean_and_dead_experts_are_reported(rows: ActivationRows) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))
            self.mixture = MuMoE(
                6, 3, 8, format="dense", bias=False, gate={"name": "relu_topk", "k": 2}, gate_norm="none"
            )
            self.gate = self.mixture.gate
            nn.init.zeros_(self.mixture.weight.factors[0])
            with torch.no_grad():
                self.gate.bias[5] = -1e6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mixture(x) + self.bias

    layer = Layer()
    outcome = fit(layer, rows, TrainConfig(batch_size=32, steps=1, learning_rate=1e-12), validation=rows)
    torch.testing.assert_close(layer.bias.detach(), rows.mean)
    assert outcome.nmse == pytest.approx(1, rel=1e-4)
    assert 0 < outcome.active <= 2 and 5 in outcome.dead.tolist()
    assert usage(layer, rows).active == outcome.active
