"""What is read of torch's state means what its name says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from mumoe_tensor import calls  # noqa: E402

ANSWERS: list[Any] = []


class Asked(nn.Module):
    """Notes an answer while torch runs it."""

    def __init__(self, question: Callable[[], Any]):
        super().__init__()
        self.question = question

    def forward(self, x: Any) -> Any:
        ANSWERS.append(self.question())
        return x.sin()


def answers(question: Callable[[], Any], run: Callable[[nn.Module, Any], object]) -> list[Any]:
    ANSWERS.clear()
    run(Asked(question), torch.ones(3, requires_grad=True))
    return list(ANSWERS)


def eager(module: nn.Module, x: Any) -> None:
    module(x).sum().backward()


def compiled(module: nn.Module, x: Any) -> None:
    torch._dynamo.reset()
    torch.compile(module, backend="eager")(x)


def exported(module: nn.Module, x: Any) -> None:
    torch.export.export(module, (x.detach(),))


def traced(module: nn.Module, x: Any) -> None:
    torch.jit.trace(module, x.detach(), check_trace=False)


def by_make_fx(module: nn.Module, x: Any) -> None:
    make_fx(module)(x.detach())


def mapped(module: nn.Module, x: Any) -> None:
    torch.func.vmap(module)(x.detach())


def differentiated(module: nn.Module, x: Any) -> None:
    torch.func.grad(lambda x: module(x).sum())(x.detach())


@pytest.mark.parametrize(
    ("run", "is_recorded", "is_exported"),
    [
        (eager, False, False),
        (mapped, False, False),
        (compiled, True, False),
        (exported, True, True),
        (traced, True, True),
        (by_make_fx, True, True),
    ],
)
def test_recorded_and_exported(run: Callable[..., Any], is_recorded: bool, is_exported: bool) -> None:
    assert set(answers(calls.is_recorded, run)) == {is_recorded}
    assert set(answers(calls.is_exported, run)) == {is_exported}


@pytest.mark.parametrize("run", [eager, mapped, differentiated])
def test_transformed(run: Callable[..., Any]) -> None:
    assert answers(calls.is_transformed, run) == [run is not eager]


@pytest.mark.parametrize("is_batched", [True, False])
def test_batches_of_gradients_are_seen(is_batched: bool) -> None:
    seen = []
    x = torch.randn(3, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda gradient: seen.append(calls.is_batched(gradient)))
    torch.autograd.grad(y, x, torch.eye(3) if is_batched else torch.ones(3), is_grads_batched=is_batched)
    assert seen == [is_batched]


def test_in_a_backward_pass() -> None:
    def repeated(module: nn.Module, x: Any) -> None:
        checkpoint(module, x, use_reentrant=False).sum().backward()

    assert [number == -1 for number in answers(calls.backward_pass, eager)] == [True]
    assert [number == -1 for number in answers(calls.backward_pass, repeated)] == [True, False]


@pytest.mark.parametrize(
    "kind", ["forward_hook", "full_backward_hook", "full_backward_pre_hook", "forward_pre_hook"]
)
def test_hooks_on_all_modules(kind: str) -> None:
    assert not any(calls.HOOKS_ON_ALL_MODULES)
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        assert any(calls.HOOKS_ON_ALL_MODULES)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_one_module(kind: str) -> None:
    module = nn.Linear(1, 1)
    assert not calls.has_hooks(module) and not calls.hooks_of(module)
    handle = getattr(module, f"register_{kind}")(print)
    assert calls.has_hooks(module) and list(calls.hooks_of(module).values()) == [["print"]]
    handle.remove()
    assert not calls.has_hooks(module)


@pytest.mark.parametrize(
    "kind",
    ["state_dict_post_hook", "state_dict_pre_hook", "load_state_dict_pre_hook", "load_state_dict_post_hook"],
)
def test_hooks_on_the_state_of_one_module(kind: str) -> None:
    module = nn.Linear(1, 1)

    def hook(*_: Any) -> None: ...

    getattr(module, f"register_{kind}")(hook)
    assert not calls.has_hooks(module) and list(calls.hooks_of(module).values()) == [["hook"]]


def test_frozen() -> None:
    module = nn.Linear(1, 1).eval()
    assert not calls.is_frozen(module)
    with torch.no_grad():
        assert calls.is_frozen(module) and not calls.is_frozen(module.train())


@pytest.mark.parametrize("run", [compiled, exported, traced, by_make_fx])
def test_nothing_is_frozen_in_what_torch_records(run: Callable[..., Any]) -> None:
    module = nn.Identity().eval()
    with torch.no_grad():
        assert set(answers(lambda: calls.is_frozen(module), run)) == {False}


def test_autocast() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert calls.autocast_dtype(cpu) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert calls.autocast_dtype(cpu) == torch.bfloat16
        assert calls.autocast_dtype(meta) is None
        with torch.autocast("cpu", enabled=False):
            assert calls.autocast_dtype(cpu) is None
