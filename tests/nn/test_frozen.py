"""A frozen layer folds products of weights, and is right again after any change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.nn import MuMoE, MuMoEMLP, entmax, frozen  # noqa: E402
from mumoe_tensor.nn.norm import LogitBatchNorm  # noqa: E402

# Bonds larger than the modes: the core and the factors of input and output are worth a product.
SIZES = dict(in_features=12, out_features=10, experts=4, format="tucker", rank=(4, 24, 24))


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time products of weights were folded."""
    made: list[Any] = []
    original = frozen.fold
    monkeypatch.setattr(frozen, "fold", lambda *arguments: made.append(1) or original(*arguments))
    return made


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    made = MuMoE(**{**SIZES, **options}, dtype=torch.float64)
    nn.init.normal_(made.gate.weight)
    made(torch.randn(50, made.gate.in_features, dtype=torch.float64) + 1)
    return made.eval()


def inputs(rows: int = 2000, features: int = 12) -> Any:
    return torch.randn(rows, features, dtype=torch.float64)


def check(module: Any, x: Any) -> None:
    """Without gradients as with them, where nothing is folded."""
    expected = module(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


def multiplied(module: Any, x: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


@pytest.fixture
def many_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls take the way of many logits, where batch norm goes into the weight."""
    monkeypatch.setattr(entmax, "FEW", 0)


@pytest.mark.usefixtures("many_logits")
def test_products_of_weights_are_made_once_and_save_flops(folds: list[Any]) -> None:
    module, x = layer(), inputs()
    for _ in range(3):
        check(module, x)
    assert len(folds) == 1
    trained = multiplied(module, x)
    with torch.no_grad():
        assert multiplied(module, x) < trained


def test_those_of_a_term_of_a_sum_are_made(folds: list[Any]) -> None:
    module, x = layer(format=mt.sum_of("cp", "tucker"), rank=(3, 4, 24, 24)), inputs()
    for _ in range(3):
        check(module, x)
    assert len(folds) == 1


def test_a_block_with_its_activation(folds: list[Any]) -> None:
    torch.manual_seed(0)
    block = MuMoEMLP(12, 10, 12, 4, "tucker", (4, 24, 24), gate_norm="layer", dtype=torch.float64).eval()
    nn.init.normal_(block.gate.weight)
    check(block, inputs())
    assert len(folds) == 2


def test_not_where_it_takes_longer(folds: list[Any]) -> None:
    with torch.no_grad():
        layer()(inputs(2))
        MuMoE(12, 10, 4, "cp", 5).eval()(inputs().float())
    assert not folds


def stepped(module: Any) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(inputs()).square().sum().backward()
    optimizer.step()


def trained(module: Any) -> None:
    module.train()
    module(inputs() + 3)
    module.eval()


def replaced(module: Any) -> None:
    for k, factor in enumerate(module.experts.factors):
        setattr(module.experts, f"factor_{k}", nn.Parameter(factor.detach() * 2))


def changed_in_place(module: Any) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)


def changed_behind_autograd(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def changed_one_entry(module: Any) -> None:
    module.experts.factors[0].data.view(-1)[-1] += 1


def loaded(module: Any) -> None:
    other = layer()
    changed_in_place(other)
    other.gate.norm.running_mean.add_(1)
    module.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    "change",
    [stepped, trained, replaced, changed_in_place, changed_behind_autograd, changed_one_entry, loaded],
)
def test_right_again_after_a_change(change: Callable[[Any], None], folds: list[Any]) -> None:
    module, x = layer(), inputs()
    with torch.no_grad():
        before = module(x)
    change(module)
    check(module, x)
    with torch.no_grad():
        assert not torch.allclose(module(x), before)
    assert len(folds) == 2 or change is trained


def test_to_another_dtype(folds: list[Any]) -> None:
    module = layer()
    with torch.no_grad():
        expected = module(x := inputs())
        torch.testing.assert_close(module.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-5)
    assert len(folds) == 2


def test_under_autocast(folds: list[Any]) -> None:
    module, x = layer().float(), inputs().float()
    with torch.no_grad():
        expected = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            result = module(x)
    assert result.dtype == torch.bfloat16 and len(folds) == 1
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)


def test_training_forgets_the_products() -> None:
    module = layer()
    with torch.no_grad():
        module(inputs())
    assert module.experts._folded[0]._cache is not None
    module.train()
    assert module.experts._folded[0]._cache is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_make_their_own(copied: Callable[[Any], Any]) -> None:
    module, x = layer(), inputs()
    with torch.no_grad():
        expected = module(x)
        size = len(pickle.dumps(layer()))
        other = copied(module)
        assert other.experts._folded[0]._cache is None
        assert len(pickle.dumps(module)) < 1.2 * size
        changed_in_place(module)
        torch.testing.assert_close(other(x), expected)


def test_state_has_no_products() -> None:
    module = layer()
    names = set(module.state_dict())
    with torch.no_grad():
        module(inputs())
    assert set(module.state_dict()) == names


@pytest.mark.parametrize("gate", ["entmax15", "softmax"])
def test_batch_norm_goes_into_the_gate(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entmax, "FEW", 40)  # (logits from which on it is done)
    module, rows = layer(gate=gate), 40
    x = inputs(rows)
    called: list[Any] = []
    original = LogitBatchNorm.forward
    monkeypatch.setattr(
        LogitBatchNorm, "forward", lambda self, *arguments: called.append(1) or original(self, *arguments)
    )
    with torch.no_grad():
        result = module.gate(x)
        assert not called
        few = module.gate(x[:3])
        assert called
    torch.testing.assert_close(result, module.gate(x))
    torch.testing.assert_close(few, module.gate(x[:3]))
    # A hook on the norm sees the logits.
    called.clear()
    seen: list[Any] = []
    module.gate.norm.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        module.gate(x)
    assert called and seen


@pytest.mark.usefixtures("many_logits")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_of_short_dtypes_is_as_exact_as_with_gradients(dtype: Any) -> None:
    module, x = layer().to(dtype), inputs(40).to(dtype)
    expected = module.gate(x)
    with torch.no_grad():
        torch.testing.assert_close(module.gate(x), expected, rtol=0, atol=0)


def test_under_inference_mode_and_vmap() -> None:
    module, x = layer(), inputs()
    expected = module(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(
            torch.func.vmap(module)(x.reshape(2, 1000, 12)), expected.reshape(2, 1000, -1)
        )
        state = {name: torch.stack([p, 2 * p]) for name, p in module.named_parameters()}
        mapped = torch.func.vmap(lambda s: torch.func.functional_call(module, s, (x,)))(state)
        torch.testing.assert_close(mapped[0], expected)
        torch.testing.assert_close(module(x), expected)
