"""Layers start as a linear layer does, and train without harm."""

from __future__ import annotations

import pytest

import mumoe_tensor as mt

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402

FORMATS = list(mt.formats())


def rank_of(format: str, levels: int, size: int) -> tuple[int, ...]:
    """A rank of this size; of formats of many bonds, which share a core, of a smaller one."""
    bonds = len(mt.get_format(format).bonds(levels))
    return (min(size, 4) if bonds > 5 else size,) * bonds


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("experts", [(), (8,), (4, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("size", [1, 4, 24])
def test_outputs_start_with_the_variance_of_a_linear_layer(format, experts, size) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    layer = MuMoE(64, 48, experts, format, rank_of(format, len(experts), size))
    with torch.no_grad():
        ratio = layer(x).square().mean() / nn.Linear(64, 48)(x).square().mean()
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2, 1e-1])
def test_two_hundred_steps_never_give_nan(format: str, learning_rate: float) -> None:
    torch.manual_seed(0)
    block = MuMoEMLP(16, 24, 16, (4, 2), format, rank_of(format, 2, 3))
    optimizer = torch.optim.AdamW(block.parameters(), lr=learning_rate)
    x = torch.randn(32, 16)
    target = torch.roll(x, 1, -1)
    losses = []
    for _ in range(200):
        loss = (block(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(p).all() for p in block.parameters())
    assert learning_rate == 0.1 or min(losses) < 0.9 * losses[0]


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    layer = MuMoE(300, 200, (40, 3), "tr", (3, 3, 4, 50), init="published")
    first, second, i, o = layer.weight.arrays
    diagonal = torch.eye(3)[:, None, :].expand(3, 40, 3) > 0
    assert (first[~diagonal] == 0).all()
    assert 0.7 < first[diagonal].mean() < 1.3 and 0.7 < first[diagonal].std() < 1.3
    assert torch.equal(second, torch.eye(3, 4)[:, None, :].expand(3, 3, 4))
    assert 0.98 * 300**-0.5 < i.abs().max() <= 300**-0.5
    assert 0.98 * 150**-0.5 < o.abs().max() <= 150**-0.5
    cp = MuMoE(300, 200, (40, 3), "cp", 60, init="published").weight.arrays
    assert 0.9 < cp[0].mean() < 1.1 and 0.9 < cp[0].std() < 1.1 and (cp[1] == 1).all()
    assert 0.98 * 60**-0.5 < cp[3].abs().max() <= 60**-0.5
    core = MuMoE(300, 200, (40,), "tucker", (3, 20, 30), init="published").weight.arrays[0]
    assert (torch.linalg.vector_norm(core) - 1).abs() < 1e-5
