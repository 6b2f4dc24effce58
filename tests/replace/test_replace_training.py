"""A layer is trained to the outputs of another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from mumoe_tensor.nn import MuMoE
from mumoe_tensor.replace import (
    ActivationRows,
    Activations,
    MixtureOfDecoders,
    MixtureOfTransforms,
    Transcoder,
    fit,
    usage,
)
from mumoe_tensor.training import TrainConfig
from mumoe_tensor.training.log import read_evaluations

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
    assert read_evaluations(tmp_path / "metrics.csv") == outcome.evaluations


def test_every_tenth_document_is_held_out_by_default(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    store = Activations.collect(model, "1", torch.randn(20, 8, 4), tmp_path / "one")
    outcomes = []
    for arguments in (
        {"rows": store},
        {"rows": store["1"].take([*range(9), *range(10, 19)]), "validation": store["1"].take([9, 19])},
    ):
        torch.manual_seed(1)
        outcomes.append(fit(nn.Linear(4, 2), config=CONFIG, **arguments))
    assert outcomes[0].nmse == outcomes[1].nmse
    with pytest.raises(ValueError, match="needs at least ten; the rows are from 9"):
        fit(nn.Linear(4, 2), store["1"].take(range(9)), CONFIG)
    both = Activations.collect(model, ["0", "1"], torch.randn(20, 8, 4), tmp_path / "two")
    with pytest.raises(ValueError, match="one module; the activations are of 0, 1"):
        fit(nn.Linear(4, 2), both, CONFIG)


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
    assert 0 < outcome.active <= 2 and 5 in outcome.dead
    assert usage(layer, rows).active == outcome.active


def test_experts_of_two_levels_are_counted_one_level_after_the_other() -> None:
    layer = MixtureOfDecoders(6, 5, 3, (3, 2), k=1)
    x = torch.zeros(5, 6)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.copy_(torch.tensor([1.0, -1, -1, -1, 1]))
        layer.gate.weight[2, 0], x[3, 0] = 9, 1  # an expert of one row
    rows = ActivationRows([(x, torch.zeros(5, 3))], torch.arange(5))
    assert usage(layer, rows) == (2.0, (1, 3))
    assert usage(nn.Sequential(nn.Dropout(1.0), layer).train(), rows) == (2.0, (1, 3))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(2)
    null = {"name": "nearest_centres", "k": 2}
    return {
        "decoders": MixtureOfDecoders(6, 12, 3, experts=16, k=2),
        "centres": MixtureOfDecoders(6, 12, 3, experts=16, gate=null),
        "random": MixtureOfDecoders(6, 12, 3, experts=16, gate={"name": "random", "k": 2}),
        "transcoder": Transcoder(6, 3, latents=32, k=4, skip=True),
        "transforms": MixtureOfTransforms(6, 3, ranks=[2, 2, 1, 1]),
        "none": MixtureOfDecoders(6, 12, 3, experts=()),
    }


@pytest.mark.parametrize("name", layers())
def test_it_resumes_to_the_same_parameters(rows: ActivationRows, tmp_path: Path, name: str) -> None:
    """A run that ends after the second checkpoint, and one that was not interrupted."""
    training, validation = rows.take(range(32)), rows.take(range(32, 40))
    penalty = 0.1 if name == "transforms" else 0.0
    whole, cut, again = (layers()[name] for _ in range(3))
    expected = fit(whole, training, CONFIG, validation=validation, folder=tmp_path / "a", penalty=penalty)

    class Cut(ActivationRows):
        batches = 0

        def batch(self, rows: object) -> tuple[torch.Tensor, torch.Tensor]:
            Cut.batches += len(rows) == 32  # type: ignore[arg-type]
            if Cut.batches > 50:
                raise KeyboardInterrupt
            return super().batch(rows)

    interrupted = Cut(training._shards, training._documents, training._numbers)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, interrupted, CONFIG, validation=validation, folder=tmp_path / "b", penalty=penalty)
    torch.manual_seed(3)
    outcome = fit(again, training, CONFIG, validation=validation, folder=tmp_path / "b", penalty=penalty)
    assert (outcome.nmse, outcome.dead) == (expected.nmse, expected.dead)
    losses, exact_losses = ([e.validation_loss for e in actual.evaluations] for actual in (outcome, expected))
    assert losses == exact_losses
    for parameter, exact in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert parameter.equal(exact)
    assert outcome.nmse < 0.9
    if name == "centres":
        x = training.batch(range(len(training)))[0]
        gate = again.get_submodule("mixture.gate")
        assert gate.centres.abs().max() < x.abs().max()  # type: ignore[operator]


def test_a_gate_with_a_bias_starts_at_the_mean_input(rows: ActivationRows) -> None:
    config = TrainConfig(batch_size=32, steps=1, learning_rate=1e-12)
    layer = Transcoder(6, 3, latents=16, k=2)
    fit(layer, rows, config, validation=rows)
    logits = layer.gate.weight @ rows.input_mean + layer.gate.bias
    torch.testing.assert_close(logits, torch.zeros(16), rtol=0, atol=1e-6)
    torch.nn.init.ones_(layer.gate.bias)
    fit(layer, rows, config, validation=rows)
    torch.testing.assert_close(layer.gate.bias.detach(), torch.ones(16))


def test_a_penalty_makes_fewer_experts_active(rows: ActivationRows) -> None:
    active = []
    for penalty in (0.0, 1.0):
        outcome = fit(layers()["transforms"], rows, CONFIG, validation=rows, penalty=penalty)
        assert outcome.active is not None
        active.append(outcome.active)
        loss = outcome.evaluations[-1].validation_loss
        assert loss > outcome.nmse + 1e-3 if penalty else loss == pytest.approx(outcome.nmse, rel=1e-5)
    assert active[1] < 0.9 * active[0]


def test_what_is_refused(rows: ActivationRows) -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        fit(nn.Linear(6, 3), rows, CONFIG, validation=rows, penalty=-1)
    with pytest.raises(ValueError, match="a layer with experts"):
        fit(layers()["none"], rows, CONFIG, validation=rows, penalty=1)
    same = ActivationRows([(torch.randn(40, 6), torch.ones(40, 3))], torch.zeros(40, dtype=torch.long))
    with pytest.raises(ValueError, match="must differ; all are the same"):
        fit(nn.Linear(6, 3), same, CONFIG, validation=rows)
    with pytest.raises(ValueError, match=r"to outputs of 3 features; it maps \(2, 6\) to \(2, 1\)"):
        fit(nn.Linear(6, 1), rows, CONFIG, validation=rows)
    with pytest.raises(ValueError, match=r"must be in float32, got torch.float64"):
        fit(nn.Linear(6, 3).double(), rows, CONFIG, validation=rows)
    for layer, data in ((None, rows), (nn.Linear(6, 3), torch.ones(9, 6))):
        with pytest.raises(TypeError, match="must be"):
            fit(layer, data, CONFIG, validation=rows)  # type: ignore[arg-type]
    assert usage(nn.Linear(6, 3), rows) == (None, ())
