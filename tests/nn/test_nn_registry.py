"""Gates and activations have names, by which configs write them and read them again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from written import Tempered, assert_comes_back, made, squared_relu, through_json  # noqa: E402

from mumoe_tensor.nn import (  # noqa: E402
    MuMoE,
    MuMoEMLP,
    register_activation,
    register_gate,
    registry,
    replace_mlp,
)
from mumoe_tensor.nn.contraction import contract  # noqa: E402


@pytest.mark.parametrize("kind", ["gate", "activation"])
@pytest.mark.parametrize(
    "function",
    [lambda x: x.softmax(-1), partial(torch.softmax, dim=-1), torch.sin, nn.Softmax(-1).forward],
    ids=["lambda", "partial", "torch", "method"],
)
def test_a_function_that_is_not_registered_works_but_is_not_written(kind: str, function: Any) -> None:
    layer = made(kind, function)
    with pytest.raises(ValueError, match=f"^the {kind} must be registered to be stored.*register_{kind}"):
        _ = layer.config
    x = torch.randn(6, 5)
    layer(x).sum().backward()
    assert str(layer) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    smaller = layer.keep_experts(0, [2, 0])
    assert smaller(x).shape == (6, 4)


def test_a_registered_name_is_written_and_read() -> None:
    register_activation("squared")(squared_relu)
    double = register_gate("double")(lambda logits: 2 * logits.softmax(-1))
    layer = MuMoEMLP(5, 6, 4, 3, rank=2, activation=squared_relu, gate=double)
    assert layer.config["activation"] == "squared" and layer.config["gate"] == "double"
    assert_comes_back(layer)


def test_a_name_that_is_not_registered_is_not_looked_up_elsewhere() -> None:
    register_activation("squared")(squared_relu)
    config = made("activation", squared_relu).config
    del registry.ACTIVATIONS._entries["squared"]
    with pytest.raises(ValueError, match="a name registered with register_activation; got 'squared'"):
        MuMoEMLP.from_config(config)
    for name in ("os.system", "torch.tanh", "squared_relu", "Module", "softmax"):
        with pytest.raises(ValueError, match="a name registered with"):
            MuMoEMLP.from_config({**config, "activation": name})
        with pytest.raises(ValueError, match="a name registered with"):
            MuMoEMLP.from_config({**config, "activation": {"name": name}})


def test_names_of_registered_functions() -> None:
    for register in (register_gate, register_activation):
        register("own")(squared_relu)
        register("own")(squared_relu)  # as when a module is imported again
        for name in ("own", "PReLU", "softmax" if register is register_gate else "gelu"):
            with pytest.raises(ValueError, match="must have a unique name"):
                register(name)(torch.tanh)
        first, second = (eval("lambda x: x") for _ in range(2))
        register("lambda")(first)
        with pytest.raises(ValueError, match="must have a unique name"):
            register("lambda")(second)
        with pytest.raises(TypeError, match="must be a function or a class"):
            register("module")(nn.GELU())
        with pytest.raises(TypeError, match="must be a function or a class"):
            register("text")("gelu")
        for name in ("", 3, None):
            with pytest.raises(TypeError, match="must be a nonempty string"):
                register(name)(torch.tanh)


def test_a_definition_that_runs_again_takes_the_name() -> None:
    def define() -> Any:
        space: dict[str, Any] = {"__name__": "notebook"}
        exec("def own(x):\n    return x", space)
        return space["own"]

    first, second = define(), define()
    register_activation("own")(first)
    register_activation("own")(second)
    assert made("activation", "own").activation is second


@pytest.mark.parametrize("kind", ["gate", "activation"])
def test_arguments_that_cannot_be_written(kind: str) -> None:
    class Lost(nn.Module):
        def __init__(self, slope: Any):
            super().__init__()

        def forward(self, x: Any) -> Any:
            return x

    class Held(Lost):
        def __init__(self, slope: Any):
            super().__init__(slope)
            self.slope = slope

    class Many(Lost):
        def __init__(self, *slopes: Any):
            super().__init__(slopes)
            self.slopes = slopes

    register: Callable[..., Any] = {"gate": register_gate, "activation": register_activation}[kind]
    for each in (Lost, Held, Many):
        register(each.__name__)(each)
    assert made(kind, Held([1, np.float32(0.5)])).config[kind] == {"name": "Held", "slope": [1, 0.5]}
    for lost in (Lost(1), Many(1)):
        with pytest.raises(ValueError, match=f"^{kind} must have every constructor argument"):
            _ = made(kind, lost).config
    for slope in (torch.ones(1), float("nan"), object(), Fraction(1, 2), {1, 2}, {1: 2}):
        with pytest.raises(ValueError, match=f"^{kind} must have arguments of JSON types"):
            _ = made(kind, Held(slope)).config


def test_subclasses_of_torch_modules_are_not_written_as_them() -> None:
    class Shifted(nn.GELU):
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 1

    with pytest.raises(ValueError, match="activation must be registered"):
        _ = made("activation", Shifted()).config


def test_parameters_of_gate_and_activation_belong_to_the_layer() -> None:
    layer = MuMoEMLP(5, 6, 4, 3, rank=2, gate=Tempered(2.0), activation=nn.PReLU(6)).double()
    names = {"gate.gate.temperature", "activation.weight"}
    assert names <= layer.state_dict().keys() and names <= dict(layer.named_parameters()).keys()
    layer(torch.randn(6, 5, dtype=torch.float64)).sum().backward()
    assert all(dict(layer.named_parameters())[name].grad is not None for name in names)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.keep_experts(0, [0, 2])):
        assert names <= other.state_dict().keys()
        for name in names:
            one, two = (dict(each.named_parameters())[name] for each in (layer, other))
            assert one is not two and torch.equal(one, two) and one.data_ptr() != two.data_ptr()
    assert {p.dtype for p in layer.half().parameters()} == {torch.float16}
    assert {p.device.type for p in layer.to("meta").parameters()} == {"meta"}


def test_modules_that_a_config_names_are_made_where_the_layer_is() -> None:
    layer = made("activation", nn.PReLU(6))
    for place in ({"device": "meta"}, {"dtype": torch.float64}, {"device": "meta", "dtype": torch.bfloat16}):
        again = MuMoEMLP.from_config(layer.config, **place)
        expected = (place.get("device", "cpu"), place.get("dtype", torch.float32))
        assert {(p.device.type, p.dtype) for p in again.parameters()} == {expected}


@pytest.mark.parametrize("name", registry.ELEMENTWISE)
def test_elementwise_activations_are_formed_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms: list[Any] = []
    monkeypatch.setattr(
        "mumoe_tensor.nn.experts.contract",
        lambda policy, operands, activation, *others: (
            forms.append(activation),
            contract(policy, operands, activation, *others),
        )[1],
    )
    function, module = getattr(nn.functional, name), registry.ELEMENTWISE[name]()
    block = MuMoEMLP(5, 6, 4, 3, rank=2, gate_norm="layer", activation=function)
    x = torch.randn(8, 5)
    block(x).sum().backward()
    expected = {name: p.grad for name, p in block.named_parameters()}
    assert forms == [None, function]
    for activation in (getattr(torch, name, function), module):
        forms.clear()
        again = MuMoEMLP.from_config({**block.config, "activation": "gelu"} | {"activation": activation})
        again.load_state_dict(block.state_dict())
        again(x).sum().backward()
        assert forms[1] == getattr(again.activation, "forward", again.activation)
        for key, p in again.named_parameters():
            assert torch.equal(p.grad, expected[key])
    # With hooks, or in place, a module is called as it is.
    seen: list[Any] = []
    hooked = registry.ELEMENTWISE[name]()
    hooked.register_forward_hook(lambda *_: seen.append(1))
    forms.clear()
    again.activation = hooked
    again(x).sum().backward()
    assert forms == [None, None] and seen == [1]


def test_torch_counts_the_flops_of_a_layer_with_a_module_as_activation() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for activation in ("gelu", nn.GELU()):
        block, counter = made("activation", activation), FlopCounterMode(display=False)
        with counter:
            block(torch.randn(8, 5)).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_an_activation_in_place_is_not_formed_again() -> None:
    x = torch.randn(8, 5)
    block = made("activation", nn.ReLU())
    block(x).sum().backward()
    inplace = made("activation", nn.ReLU(inplace=True))
    inplace.load_state_dict(block.state_dict())
    inplace(x).sum().backward()
    for one, two in zip(block.parameters(), inplace.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert inplace.config["activation"] == {"name": "ReLU", "inplace": True}


def test_activations_of_transformers() -> None:
    activations = pytest.importorskip("transformers.activations")
    tanh, exact = {"name": "GELU", "approximate": "tanh"}, {"name": "GELU", "approximate": "none"}
    written = {
        "gelu": exact, "gelu_python": exact, "gelu_new": tanh, "gelu_fast": tanh, "gelu_pytorch_tanh": tanh,
        "gelu_python_tanh": tanh, "gelu_accurate": tanh, "linear": {"name": "Identity"},
        "mish": {"name": "Mish", "inplace": False}, "silu": {"name": "SiLU", "inplace": False},
        "quick_gelu": "quick_gelu", "relu2": "relu2",
    }  # fmt: skip
    x = torch.linspace(-12, 12, 501, dtype=torch.float64)
    for name in activations.ACT2FN:
        try:
            module = activations.ACT2FN[name].double()
        except ImportError:
            continue
        layer = made("activation", module)
        torch.testing.assert_close(layer.activation(x), module(x), rtol=1e-9, atol=1e-9)
        if type(module).__module__ != "transformers.activations" or name in written:
            assert layer.config["activation"] == written.get(name, layer.config["activation"])
            again = MuMoEMLP.from_config(through_json(layer.config), dtype=x.dtype)
            torch.testing.assert_close(again.activation(x), module(x), rtol=1e-9, atol=1e-9)
            continue
        with pytest.raises(ValueError, match="register_activation"):
            _ = layer.config


def test_activations_of_timm(torchvision_schemas: None) -> None:
    activations = pytest.importorskip("timm.layers.activations")
    written = {"GELU": "GELU", "GELUTanh": "GELU", "Swish": "SiLU", "HardSwish": "Hardswish", "Mish": "Mish"}
    x = torch.linspace(-12, 12, 501, dtype=torch.float64)
    for name, known in {**written, "QuickGELU": None, "HardSigmoid": "Hardsigmoid"}.items():
        module = getattr(activations, name)()
        entry: Any = made("activation", module).config["activation"]
        assert entry == "quick_gelu" if known is None else entry["name"] == known
        again = MuMoEMLP.from_config({**made("activation", "gelu").config, "activation": entry})
        torch.testing.assert_close(again.activation(x), module(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="register_activation"):
        _ = made("activation", activations.HardMish()).config


def test_a_block_of_a_model_is_made_again_from_its_config(transformers: Any) -> None:
    sizes = dict(n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=12)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    ).eval()
    tokens = torch.randint(50, (2, 12))
    replace_mlp(gpt2, "transformer.h.*.mlp", experts=4, rank=16, gate_norm="layer")
    before, block = gpt2(tokens).logits, gpt2.transformer.h[0].mlp
    again = MuMoEMLP.from_config(through_json(block.config)).eval()
    again.load_state_dict(block.state_dict())
    gpt2.transformer.h[0].mlp = again
    assert torch.equal(gpt2(tokens).logits, before)
    assert block.config["activation"] == {"name": "GELU", "approximate": "tanh"}


def test_an_activation_of_transformers_that_computes_something_else_stays() -> None:
    activations = pytest.importorskip("transformers.activations")
    module = activations.GELUActivation()
    module.act = torch.sin
    assert made("activation", module).activation is module


def test_an_activation_of_transformers_with_a_hook_stays() -> None:
    module = pytest.importorskip("transformers.activations").GELUActivation()
    module.register_forward_hook(lambda *_: None)
    assert made("activation", module).activation is module


def test_an_instance_that_changes_its_arguments_is_not_written() -> None:
    @register_gate("twice")
    class Twice:
        def __init__(self, factor: float):
            self.factor = 2 * factor

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return (self.factor * logits).softmax(-1)

    with pytest.raises(ValueError, match=r"made with {'factor': 4.0}, 'twice' has {'factor': 8.0}"):
        _ = MuMoE(5, 4, 3, rank=2, gate=Twice(2.0)).config
