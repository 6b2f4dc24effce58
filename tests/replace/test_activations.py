"""Activations on the disk are those of the model, however they were collected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("safetensors")

from mumoe_tensor.replace import Activations


class Block(nn.Module):
    """A residual block whose MLP is called by keyword and gives a tuple."""

    def __init__(self, features: int):
        super().__init__()
        self.mixing, self.mlp = nn.Linear(features, features), Pair(features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixing(x.cumsum(-2))
        return x + self.mlp(hidden=x)[0]


class Pair(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden: Tensor, scale: float = 2.0) -> tuple[Tensor, None]:
        return self.dropout(scale * self.linear(hidden).relu()), None


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 6), Block(6), Block(6), nn.Linear(6, 32))


def documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(32, (n,), generator=generator) for n in lengths]


def expected(model: nn.Module, name: str, texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []
    model.eval()
    module: Any = model.get_submodule(name)
    hook = module.register_forward_hook(
        lambda m, args, kwargs, y: seen.append(
            (*args, *kwargs.values(), y[0] if isinstance(y, tuple) else y)
        ),
        with_kwargs=True,
    )
    with torch.no_grad():
        for text in texts:
            model(text.unsqueeze(0))
    hook.remove()
    return torch.cat([x[0] for x, _ in seen]), torch.cat([y[0] for _, y in seen])


def test_rows_are_those_of_the_model(tmp_path: Path) -> None:
    model, texts = language_model(), documents([5, 5, 5, 3, 7, 7])
    modules = ["1.mlp", "2.mixing"]
    store = Activations.collect(
        model.train(), modules, texts, tmp_path, batch_size=2, shard_rows=8, dtype="float32"
    )
    assert all(module.training for module in model.modules())
    assert store.modules == tuple(modules) and len(store) == 32
    assert store.documents.bincount().tolist() == [len(text) for text in texts]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for name in modules:
        x, y = expected(model, name, texts)
        rows = store[name]
        order = torch.randperm(32)
        torch.testing.assert_close(rows.batch(order), (x[order], y[order]))
        torch.testing.assert_close(rows.mean, y.mean(0))
        assert rows.variance == pytest.approx(float(y.var(0, unbiased=False).sum()), rel=1e-5)
        part = rows.take([4, 1])
        chosen = (store.documents == 1) | (store.documents == 4)
        torch.testing.assert_close(part.batch(range(len(part)))[0], x[chosen])
        torch.testing.assert_close(part.mean, y[chosen].mean(0))
