"""Names of gates and activations that a test registers are gone after it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = pytest.importorskip("mumoe_tensor.nn.registry")
    for each in (registry.GATES, registry.ACTIVATIONS):
        monkeypatch.setattr(each, "_entries", dict(each._entries))
