"""Calls of modules are shown as they are, and nothing of the watching stays."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from mumoe_tensor.nn.watch import module_of, watch_calls  # noqa: E402


class Scaled(nn.Module):
    def forward(self, x: Tensor, factor: float = 2.0, *, shift: float = 0.0) -> tuple[Tensor, float]:
        return factor * x + shift, factor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scaled(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(shift=1.0, x=x)
        return self.second(y, 3.0)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_arguments_and_results_of_every_call(compiled: bool) -> None:
    model, x = Model(), torch.ones(2)
    run: Any = torch.compile(model, backend="eager") if compiled else model
    run(x)
    seen: list[Any] = []
    modules = {0: model.first, "b": model.second}
    with watch_calls(
        modules, lambda key, given: seen.append((key, given)), lambda key, y: seen.append((key, y))
    ):
        y = run(x)
    assert y.tolist() == [9, 9]
    assert seen == [
        (0, {"x": x, "shift": 1.0}), (0, (seen[1][1][0], 2.0)),
        ("b", {"x": seen[1][1][0], "factor": 3.0}), ("b", (y, 3.0)),
    ]  # fmt: skip
    assert [*seen[0][1]] == ["x", "shift"]
    run(x)
    assert len(seen) == 4


def test_no_hook_stays_after_an_error_and_results_cannot_be_changed() -> None:
    model, x = Model(), torch.ones(2)

    def fail(key: str, arguments: dict[str, Any]) -> None:
        raise RuntimeError(key)

    with pytest.raises(RuntimeError, match="second"), watch_calls({"second": model.second}, fail, fail):
        model(x)
    assert not model.second._forward_hooks and not model.second._forward_pre_hooks
    with watch_calls({"first": model.first}, lambda *_: 1, lambda *_: 2):
        assert model(x).tolist() == [9, 9]


def test_modules_by_name() -> None:
    model = Model()
    assert module_of(model, "second") is model.second
    with pytest.raises(ValueError, match=r"such as \['first', 'second'\]; got 'third'"):
        module_of(model, "third")
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        module_of("model", "first")  # type: ignore[arg-type]
