"""Layers in a model are described in JSON and made again from that."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402
from written import Tempered, through_json  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.nn import Experts, MuMoE, MuMoEMLP, register_gate, register_layer  # noqa: E402
from mumoe_tensor.nn.described import describe, rebuild  # noqa: E402
from mumoe_tensor.testing.strategies import specs  # noqa: E402


@pytest.fixture
def layers() -> dict[str, nn.Module]:
    register_gate("tempered")(Tempered)
    block = MuMoEMLP(5, 6, 5, 3, "tr", (2, 2, 3), gate_norm="none", gate=Tempered(2.0), hidden_dropout=0.2)
    edit_bias(block.down, "more", torch.ones(3) / 3, outputs=[1, 2], strength=0.5)
    return {
        "linear": MuMoE(5, 4, (3, 2), mt.sum_of(mt.shared("dense"), "cp"), rank=2, input_norm=True),
        "block": block,
        "experts": Experts(6, 4, 3, mt.get_format({"name": "kron", "splits": {"i": [2, 3]}}), 2, bias=False),
        "without": MuMoE(5, 4, (), "cp", rank=2),
    }


def test_layers_come_back(layers: dict[str, nn.Module]) -> None:
    model = nn.ModuleDict({"rest": nn.Linear(3, 3), "inner": nn.ModuleDict(layers)})
    described = describe(model)
    assert [*described] == [f"inner.{name}" for name in layers]
    assert described["inner.block"]["edits"] == {"down": ["more"]}
    assert through_json(described) == described
    for name, layer in layers.items():
        again = rebuild(described[f"inner.{name}"], device="meta", dtype=torch.float64)
        assert type(again) is type(layer) and next(again.parameters()).is_meta
        assert next(again.parameters()).dtype == torch.float64
        again = rebuild(described[f"inner.{name}"])
        again.load_state_dict(layer.state_dict())
        assert describe(again) == {"": described[f"inner.{name}"]}
        assert again.state_dict().keys() == layer.state_dict().keys()


@settings(max_examples=settings().max_examples // 2)
@given(st.data())
def test_a_layer_of_any_format_comes_back(data: st.DataObject) -> None:
    spec = data.draw(specs())
    layer = data.draw(st.sampled_from([MuMoE, Experts])).from_spec(spec)
    entry = describe(layer)[""]
    assert through_json(entry) == entry
    again = rebuild(entry, device="meta")
    again.load_state_dict(layer.state_dict(), assign=True)
    assert again.config == layer.config
    x, coefficients = torch.randn(3, spec.in_features), [torch.rand(3, n) for n in spec.experts]
    arguments = (x, coefficients) if isinstance(layer, Experts) else (x,)
    assert torch.equal(again(*arguments), layer(*arguments))


def test_a_layer_of_another_class_registers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from mumoe_tensor.nn import described as module

    monkeypatch.setattr(module, "_classes", dict(module._classes))

    class Two(nn.Module):
        """A layer that has another in it."""

        def __init__(self, n: int, device: Any = None, dtype: Any = None):
            super().__init__()
            self.config = {"n": n}
            self.part = MuMoE(n, n, 2, rank=1, device=device, dtype=dtype)

        @classmethod
        def from_config(cls, config: dict[str, Any], **place: Any) -> Two:
            return cls(**config, **place)

    model = nn.Sequential(Two(3))
    assert describe(model)["0.part"]["class"] == "MuMoE"
    assert register_layer(Two) is Two
    assert describe(model) == {"0": {"class": "Two", "config": {"n": 3}}}
    assert type(rebuild(describe(model)["0"])) is Two
    # Defined once more, as in a notebook, the class takes the place of the first.
    later = register_layer(type("Two", (Two,), {"__qualname__": Two.__qualname__}))
    assert type(rebuild({"class": "Two", "config": {"n": 3}})) is later
    with pytest.raises(TypeError, match="with a method from_config, got <class 'torch"):
        register_layer(nn.Linear)
    with pytest.raises(ValueError, match=r"unique names; 'MuMoE' is <class 'mumoe_tensor.nn.layers.MuMoE'>"):
        register_layer(type("MuMoE", (MuMoE,), {}))


def test_what_cannot_be_made_again_is_refused() -> None:
    class Own(MuMoE):
        pass

    def refused(layer: nn.Module, match: str) -> None:
        with pytest.raises(ValueError, match=f"the layer 'place' cannot be saved: .*{match}"):
            describe(nn.ModuleDict({"place": layer}))

    refused(Own(3, 3, 2, rank=1), "its class must be registered by register_layer, got Own")
    refused(MuMoE(3, 3, 2, rank=1, gate=lambda x: x), "name it with register_gate")
    buffered = MuMoE(3, 3, 2, rank=1)
    buffered.register_buffer("scale", torch.ones(2), persistent=False)
    refused(buffered, r"buffers must be persistent, got \['scale'\]")
    pruned = MuMoE(3, 3, 2, rank=1)
    prune.random_unstructured(pruned.experts, "factor_0", 0.5)
    refused(pruned, "without pruning, .*; 'experts.factor_0' differs")
    wider = MuMoE(3, 3, 2, rank=1)
    wider.experts.factor_0 = nn.Parameter(torch.ones(2, 5))
    refused(wider, "'experts.factor_0' differs")
    rounded = MuMoE(3, 3, 2, rank=1)
    rounded.gate.norm.running_mean = torch.zeros(2, dtype=torch.int8)
    refused(rounded, "'gate.norm.running_mean' differs")


def test_a_wrong_description_is_refused() -> None:
    config = MuMoE(3, 3, 2, rank=1).config
    for entry in ({"class": "MuMoE"}, {"class": "MuMoE", "config": config, "more": 1}, ["MuMoE"], None):
        with pytest.raises(ValueError, match="described by class, config and optional edits"):
            rebuild(entry)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"registered .Experts, MuMoE.*, got 'Linear': first import"):
        rebuild({"class": "Linear", "config": config})
