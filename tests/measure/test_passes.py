"""A forward pass and a step of a module."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from mumoe_tensor.measure.passes import forward, step  # noqa: E402


def test_steps_have_gradients_and_forwards_have_none() -> None:
    module, x = torch.nn.Linear(3, 2), torch.ones(4, 3, requires_grad=True)
    forward(module, x)()
    assert module.weight.grad is None and x.grad is None
    run = step(module, x)
    run()
    first, of_input = module.weight.grad.clone(), x.grad.clone()
    run()
    torch.testing.assert_close(module.weight.grad, first)
    torch.testing.assert_close(x.grad, of_input)
