"""States are loaded whole or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from written import Tempered, made  # noqa: E402

from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import Experts, MuMoEMLP  # noqa: E402
from mumoe_tensor.nn.experts import rename_factors  # noqa: E402


def layer_with_edit() -> Any:
    torch.manual_seed(0)
    layer = MuMoEMLP(5, 6, 4, (3, 2), rank=2, gate=Tempered(2.0), activation=nn.PReLU(6), input_norm=True)
    layer(torch.randn(9, 5))
    edit_bias(layer.up, "old", [torch.rand(3), torch.rand(2)], 1, 2.0)
    return layer.eval()


def other_state() -> dict[str, Any]:
    torch.manual_seed(1)
    layer = layer_with_edit()
    for value in layer.state_dict().values():
        value.add_(1)
    return dict(layer.state_dict())


NEW = {"mean_0": torch.ones(3), "mean_1": torch.ones(2), "outputs": torch.ones(4)}


def edit(name: str, **changes: Any) -> dict[str, Any]:
    entries = {key: value for key, value in {**NEW, **changes}.items() if value is not None}
    return {f"down.edits.{name}.{key}": value for key, value in entries.items()}


#: What a state has in the place of a good one; None takes an entry out. All of them name something.
DAMAGES: dict[str, dict[str, Any]] = {
    "key missing": {"gate.weight": None},
    "last key missing": {"activation.weight": None},
    "parameter of the gate missing": {"gate.gate.temperature": None},
    "edit missing": {"up.edits.old.mean_0": None, "up.edits.old.mean_1": None, "up.edits.old.outputs": None},
    "key too many": {"down.factor_9": torch.ones(2)},
    "key of no module": {"further": torch.ones(2)},
    "wrong shape": {"down.factor_2": torch.ones(7, 3)},
    "wrong shape of an old name": {"down.factor_2": None, "down.factors.2": torch.ones(7, 3)},
    "wrong shape of a parameter of the activation": {"activation.weight": torch.ones(5)},
    "no tensor": {"down.factor_2": [1.0]},
    "None": {"down.factor_2": np.ones((7, 2))},
    "complex": {"down.factor_0": torch.ones(3, 2, dtype=torch.complex64)},
    "integers": {"down.factor_0": torch.ones(3, 2, dtype=torch.int8)},
    "bools": {"gate.norm.running_mean": torch.ones(5, dtype=torch.bool)},
    "complex count": {"gate.norm.num_batches_tracked": torch.tensor(1j)},
    "sparse": {"down.factor_0": torch.ones(3, 2).to_sparse()},
    "edit of a wrong shape": edit("new", mean_1=torch.ones(3)),
    "edit of a wrong output": edit("new", outputs=torch.ones(6)),
    "edit of a level too few": edit("new", mean_1=None),
    "edit of a level too many": edit("new", mean_2=torch.ones(2)),
    "edit without outputs": edit("new", outputs=None),
    "edit with a bad name": edit("forward"),
    "edit with the name of a method": edit("keys"),
    "edit without a name": edit(""),
    "edit with a dot": edit("one.two"),
    "edit that is a tensor": {"down.edits.new": torch.ones(3)},
    "edit of no tensors": edit("new", outputs="text"),
}
#: Those of names, which torch reports itself once all modules of a model have been loaded.
NAMES = {
    "key missing", "last key missing", "parameter of the gate missing", "edit missing", "key too many",
    "key of no module",
}  # fmt: skip


def damaged(changes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    state = {**other_state(), **changes}
    return {prefix + name: value for name, value in state.items() if value is not None}


def snapshot(layer: Any) -> dict[str, Any]:
    held = {name: (id(value), value.clone()) for name, value in layer.state_dict(keep_vars=True).items()}
    return held | {f"module {name}": (id(module), None) for name, module in layer.named_modules()}


def assert_unchanged(layer: Any, before: dict[str, Any]) -> None:
    now = snapshot(layer)
    assert now.keys() == before.keys()
    for name, (identity, value) in now.items():
        assert identity == before[name][0], name
        assert value is None or value.is_meta or torch.equal(value, before[name][1]), name


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_without_values_changes_nothing(assign: bool) -> None:
    layer = layer_with_edit()
    before = snapshot(layer)
    with pytest.raises(
        ValueError, match=r"down\.factor_0 must be a strided tensor with values, and is on the meta device"
    ):
        layer.load_state_dict(damaged({"down.factor_0": torch.ones(3, 2, device="meta")}), assign=assign)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_changes_nothing(damage: str, assign: bool) -> None:
    for layer in (layer_with_edit(), layer_with_edit().to("meta")):
        before, x = snapshot(layer), torch.randn(6, 5, device=layer.gate.weight.device)
        y = layer(x)
        with pytest.raises(RuntimeError if damage in NAMES else ValueError):
            layer.load_state_dict(damaged(DAMAGES[damage]), assign=assign)
        assert_unchanged(layer, before)
        assert y.is_meta or torch.equal(layer(x), y)


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - NAMES))
def test_nor_without_strictness(damage: str) -> None:
    layer = layer_with_edit()
    before = snapshot(layer)
    with pytest.raises(ValueError):
        layer.load_state_dict(damaged(DAMAGES[damage]), strict=False)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_nor_in_a_model(damage: str) -> None:
    model = nn.Sequential(layer_with_edit(), nn.Linear(4, 4))
    state = {**damaged(DAMAGES[damage], "0."), "1.weight": torch.ones(4, 4), "1.bias": torch.ones(4)}
    before = snapshot(model[0])
    with pytest.raises(RuntimeError if damage in NAMES else ValueError):
        model.load_state_dict(state)
    if damage not in NAMES:
        assert_unchanged(model[0], before)
        assert not torch.equal(model[1].weight, torch.ones(4, 4))


@pytest.mark.parametrize("damage", ["wrong shape", "key missing", "edit with a bad name"])
def test_nor_of_experts_alone(damage: str) -> None:
    experts = Experts(6, 4, (3, 2), "cp", 2)
    state = {k: torch.ones_like(v) for k, v in experts.state_dict().items()}
    before = snapshot(experts)
    if damage == "key missing":
        del state["factor_3"]
    else:
        state |= {name.removeprefix("down."): value for name, value in DAMAGES[damage].items()}
    with pytest.raises(RuntimeError if damage == "key missing" else ValueError):
        experts.load_state_dict(state)
    assert_unchanged(experts, before)


def test_what_fits_is_loaded() -> None:
    state, x = {**other_state(), **edit("new")}, torch.randn(6, 5)
    for assign in (False, True):
        layer = layer_with_edit()
        assert str(layer.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
        assert [*layer.down.edits] == ["new"] and layer(x).shape == (6, 4)
    partly = {name: value for name, value in state.items() if not name.startswith("gate")} | {"more": x}
    result = layer_with_edit().load_state_dict(partly, strict=False)
    assert result.unexpected_keys == ["more"] and "gate.weight" in result.missing_keys


def test_parameters_of_other_kinds_are_loaded() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.counts = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)

        def forward(self, x: Any) -> Any:
            return x.relu() * self.phase.abs().prod()

    layer, state = made("activation", Strange()), made("activation", Strange()).state_dict()
    state["activation.phase"] = 2j * torch.ones(2)
    state["activation.counts"] = torch.tensor([1.0, 2, 3])
    layer.load_state_dict(state)
    assert torch.equal(layer.activation.phase, 2j * torch.ones(2))
    assert layer.activation.counts.tolist() == [1, 2, 3]
    lazy, formed = made("activation", nn.LazyLinear(6)), made("activation", nn.LazyLinear(6))
    formed(torch.randn(2, 5))
    lazy.load_state_dict(formed.state_dict())
    assert torch.equal(lazy.activation.weight, formed.activation.weight)


def test_old_names_of_factors_change_and_what_stands_after_them_stays() -> None:
    state = {"a.factors.1.exp_avg": 1, "a.factors.0": 2, "b.factors.0": 3}
    rename_factors(state, "a.")
    assert state == {"a.factor_1.exp_avg": 1, "a.factor_0": 2, "b.factors.0": 3}


def test_a_hook_may_change_the_names() -> None:
    def rename(module: Any, state: Any, *_: Any) -> None:
        for key in list(state):
            state[key.removeprefix("last.")] = state.pop(key)

    state, hooked = other_state(), layer_with_edit()
    hooked.register_load_state_dict_pre_hook(rename)
    hooked.load_state_dict({f"last.{name}": value for name, value in state.items()})
    assert torch.equal(hooked.gate.weight, state["gate.weight"])
