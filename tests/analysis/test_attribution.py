"""Contributions of experts inside models."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.analysis import ablate, attribute  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP  # noqa: E402


def model() -> Any:
    torch.manual_seed(0)
    options: Any = dict(format="tr", rank=(2, 2, 3), dtype=torch.float64)
    block = MuMoEMLP(6, 9, 6, 5, dropout=0.5, input_norm=True, gate_norm="layer", **options)
    head = MuMoE(6, 4, 7, gate_norm="none", **options)
    made = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), block, nn.BatchNorm1d(6).double(), head)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.train()


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("grad", [True, False])
def test_layers_of_blocks_and_models(grad: bool) -> None:
    whole = model()
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    _, block, _, head = whole
    with torch.set_grad_enabled(grad):
        of_block = attribute(whole, block.down, X, 2)
        of_hidden = attribute(whole, block.up, X, 3)
        of_head = attribute(whole, head, X, 1)
    assert all(module.training for module in whole.modules())
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    assert not any(parameter.grad is not None for parameter in whole.parameters())
    assert not any(m._forward_pre_hooks for m in whole.modules()) and not of_block.requires_grad
    whole.eval()
    hidden: list[Any] = []
    block.up.register_forward_hook(lambda module, args, y: hidden.append(y))
    features = whole[1](whole[0](X))
    torch.testing.assert_close(of_block.sum(-1), features[:, 2].detach())
    torch.testing.assert_close(of_hidden.sum(-1), hidden[0][:, 3].detach())
    torch.testing.assert_close(of_head.sum(-1), whole(X)[:, 1].detach())
    # By single experts, with the hidden features as they are.
    a = block.gate(whole[0](X))[0]
    each = [
        nn.functional.gelu(hidden[0]) @ block.down.expert(n)[0] + block.down.expert(n)[1] for n in range(5)
    ]
    expected = torch.stack([a[:, n] * each[n][:, 2] for n in range(5)], -1)
    torch.testing.assert_close(of_block, expected.detach())


def test_contributions_of_an_ablated_model() -> None:
    whole = model()
    with ablate(whole[3], [2, 4]):
        actual = attribute(whole, whole[3], X, 0)
    assert actual[:, [2, 4]].abs().max() == 0 and actual.abs().max() > 0


def test_compiled_models() -> None:
    torch._dynamo.reset()
    whole = model().eval()
    compiled = torch.compile(whole, backend="eager")
    compiled(X)
    torch.testing.assert_close(attribute(compiled, whole[3], X, 0), attribute(whole, whole[3], X, 0))


def test_many_experts_need_memory_for_their_coefficients_alone() -> None:
    """W of these would take 51 GiB."""
    layer = MuMoE(768, 1000, 16_384, rank=8, gate_norm="none")
    x = torch.randn(32, 768)
    actual = attribute(layer, layer, x, 3)
    torch.testing.assert_close(actual.sum(-1), layer(x)[:, 3].detach(), rtol=1e-3, atol=1e-4)


def test_a_direction_of_the_outputs() -> None:
    whole = model()
    each = torch.stack([attribute(whole, whole[3], X, output) for output in range(4)], -1)
    for direction in (torch.eye(4)[2], torch.tensor([0, 1, 0, 3]), torch.tensor([0.5, -1, 0, 2]).double()):
        actual = attribute(whole, whole[3], X, direction)
        torch.testing.assert_close(actual, each @ direction.double())
        assert actual.dtype == torch.float64


@pytest.mark.parametrize(
    ("output", "level", "message"),
    [
        (4, 0, "output must be an integer at least 0 and less than 4, got 4"),
        (-1, 0, "output must be an integer"),
        (torch.ones(3), 0, r"shape \(4,\), got \(3,\)"),
        (torch.tensor([1j, 0, 0, 0]), 0, "direction must be real and finite"),
        (torch.tensor([torch.nan, 0, 0, 0]), 0, "direction must be real and finite"),
        (0, 1, "level must be an integer"),
    ],
)
def test_outputs_that_are_not_there(output: Any, level: int, message: str) -> None:
    whole = model()
    with pytest.raises(ValueError, match=message):
        attribute(whole, whole[3], X, output, level=level)


def test_layers_that_cannot_be_attributed_to() -> None:
    whole = model()
    with pytest.raises(ValueError, match=r"pass its up or down\); MuMoEMLP has \['down', 'up'\]"):
        attribute(whole, whole[1], X, 0)
    with pytest.raises(ValueError, match="must call the layer once, got 0"):
        attribute(whole[:2], whole[3], X, 0)
