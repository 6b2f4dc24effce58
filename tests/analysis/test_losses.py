"""The loss without an expert is that of a model whose tensor has no such slice."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.analysis import loss_effects  # noqa: E402
from mumoe_tensor.nn import MuMoE  # noqa: E402


class Language(nn.Module):
    """Predicts the next of 11 tokens from the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = MuMoE(6, 11, (4, 3), rank=5, gate_norm="layer")

    def forward(self, tokens: Any) -> Any:
        return self.layer(self.embedding(tokens))


def test_effects_are_those_of_zeroed_slices() -> None:
    torch.manual_seed(0)
    model = Language()
    for parameter in model.layer.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randint(11, (7, 9))
    batches = [(tokens[:4, :-1], tokens[:4, 1:]), (tokens[4:, :-1], tokens[4:, 1:])]

    def loss() -> float:
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    model.train()
    actual = loss_effects(model, model.layer, batches, level=1)
    some = loss_effects(model, model.layer, batches, level=1, experts=[2, 0])
    assert model.training and torch.equal(some, actual[[2, 0]])
    # CP: a slice of the tensor is a row of the level's factor.
    (factor,) = [f for f, axes in zip(model.layer.experts.factors, model.layer.experts.axes, strict=True)
                 if "n2" in axes]  # fmt: skip
    intact = loss()
    for expert in range(3):
        kept = factor[expert].detach().clone()
        with torch.no_grad():
            factor[expert] = 0
            change = loss() - intact
            factor[expert] = kept
        assert abs(change) > 1e-3 and actual[expert].item() == pytest.approx(change, abs=1e-5)


def test_there_must_be_tokens_and_experts() -> None:
    model = Language()
    batch = (torch.zeros(1, 2, dtype=torch.long),) * 2
    with pytest.raises(ValueError, match="got none"):
        loss_effects(model, model.layer, [])
    with pytest.raises(ValueError, match="experts of level 0 must be"):
        loss_effects(model, model.layer, [batch], experts=[9])
    with pytest.raises(ValueError, match="level must be an integer"):
        loss_effects(model, model.layer, [batch], level=2)
