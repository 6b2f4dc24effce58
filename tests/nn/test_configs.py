"""Configs are JSON and make the same layer again; states are loaded whole or not at all."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.analysis import edit_bias  # noqa: E402
from mumoe_tensor.models import GPT2Config, Head, MixerConfig, load_head, save_head  # noqa: E402
from mumoe_tensor.nn import (  # noqa: E402
    Experts,
    MuMoE,
    MuMoEMLP,
    entmax15,
    register_activation,
    register_gate,
    registry,
    replace_mlp,
)
from mumoe_tensor.nn.contraction import contract  # noqa: E402
from mumoe_tensor.nn.experts import rename_factors  # noqa: E402

BASE: dict[type[Any], dict[str, Any]] = {
    MuMoE: {"in_features": 5, "out_features": 20, "experts": (3, 2), "rank": 2},
    MuMoEMLP: {"in_features": 5, "hidden_features": 6, "out_features": 4, "experts": (3, 2), "rank": 2},
}


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for each in (registry.GATES, registry.ACTIVATIONS):
        monkeypatch.setattr(each, "_entries", dict(each._entries))


class Tempered(nn.Module):
    """A gate with a parameter."""

    def __init__(self, start: float = 1.0):
        super().__init__()
        self.start = start
        self.temperature = nn.Parameter(torch.tensor(float(start)))

    def forward(self, logits: Any) -> Any:
        return entmax15(logits / self.temperature)


def squared_relu(x: Any) -> Any:
    return x.relu() ** 2


def through_json(config: dict[str, Any]) -> Any:
    return json.loads(json.dumps(config, allow_nan=False))


def through_a_file(config: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(config, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_comes_back(layer: Any) -> None:
    """A layer made from the written config, with the state, has the same config and outputs."""
    for name, parameter in layer.named_parameters():
        if name.startswith("gate"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(7, 5)
    layer.train()(x)
    for config in (through_json(layer.config), through_a_file(layer.config)):
        again = type(layer).from_config(config)
        assert again.config == layer.config
        again.load_state_dict(layer.state_dict())
        assert again.state_dict().keys() == layer.state_dict().keys()
        assert torch.equal(again.eval()(x), layer.eval()(x))
        assert str(again) == str(layer)


# ---- every argument ----------------------------------------------------------------------------------------

INTEGERS = [(value, 2) for value in (2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2))]
TUPLES = [(value, (written,)) for value, written in INTEGERS]
TEXT = np.str_
ELU, TEMPERED = {"name": "ELU", "alpha": 0.5, "inplace": False}, {"name": "tempered", "start": 3.0}
#: Values of every argument, each with what its config holds; an argument that is missing here fails a test.
VALUES: dict[str, list[tuple[Any, Any]]] = {
    "in_features": [(value, 5) for value in (np.prod((5, 1)), torch.tensor(5), np.array(5, dtype=">i2"))],
    "out_features": INTEGERS,
    "hidden_features": INTEGERS,
    "experts": [*TUPLES, ([3], (3,)), (np.array([2, 3]), (2, 3)), (torch.tensor([4, 2]), (4, 2)),
                (range(2, 4), (2, 3)), ((), ())],
    "format": [("tr", "tr"), (mt.get_format("tucker"), "tucker"), (TEXT("tt"), "tt")],
    "rank": [*TUPLES, ([3], (3,)), (np.array([3]), (3,)), (torch.tensor([3]), (3,))],
    "parameters": [(value, None) for value in ("match", 400, np.int32(400), torch.tensor(400))],
    "bias": [(False, False)],
    "gate": [("softmax", "softmax"), (TEXT("sparsemax"), "sparsemax"), (mt.sparsemax, "sparsemax"),
             (entmax15, "entmax15"), (mt.entmax15, "entmax15"), (Tempered(3), TEMPERED), (TEMPERED, TEMPERED),
             ("tempered", {"name": "tempered", "start": 1.0}),
             (nn.Softmax(-1), {"name": "Softmax", "dim": -1})],
    "gate_norm": [("layer", "layer"), ("none", "none"), (TEXT("layer"), "layer")],
    "input_norm": [(True, True)],
    "init": [("published", "published"), (TEXT("published"), "published")],
    "batch_hint": INTEGERS,
    "recompute": [(True, True)],
    "activation": [
        ("relu", "relu"), (TEXT("tanh"), "tanh"), (torch.tanh, "tanh"), (nn.functional.silu, "silu"),
        (squared_relu, "squared_relu"), ("squared_relu", "squared_relu"),
        (nn.Identity(), {"name": "Identity"}),
        (nn.GELU(approximate="tanh"), {"name": "GELU", "approximate": "tanh"}),
        (nn.LeakyReLU(np.float32(0.25)), {"name": "LeakyReLU", "negative_slope": 0.25, "inplace": False}),
        (nn.PReLU(np.int64(6)), {"name": "PReLU", "num_parameters": 6, "init": 0.25}),
        (nn.Hardtanh(-2, 2.5), {"name": "Hardtanh", "min_val": -2, "max_val": 2.5, "inplace": False}),
        (nn.Softplus(2), {"name": "Softplus", "beta": 2, "threshold": 20.0}),
        ("Mish", {"name": "Mish", "inplace": False}), ({"name": "ELU", "alpha": np.float64(0.5)}, ELU),
    ],
    **{name: [*((value, 0.25) for value in (0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25))),
              (0, 0.0), (np.int64(0), 0.0)]
       for name in ("dropout", "hidden_dropout")},
}  # fmt: skip
#: Values that no argument may have, with what the error names.
BAD: dict[str, list[Any]] = {
    **{name: [0, -1, 1.5, True, np.True_, "2", None, torch.tensor(True), torch.tensor([2]), np.array(2.0)]
       for name in ("in_features", "out_features", "hidden_features", "batch_hint")},
    "experts": [0, 1.5, True, np.True_, "2", None, {2, 3}, {2: 3}, (2, True), (2, 0.5), [[2]],
                torch.tensor(True)],
    "format": ["cpp", None, 3, mt.get_format("cp").__class__],
    "rank": [0, 1.5, True, "2", (2, 2), {2}, (0,), [True]],
    "parameters": [0, 1.5, True, "some", 3],
    **{name: [1, 0, None, "yes", np.True_, torch.tensor(True)]
       for name in ("bias", "input_norm", "recompute")},
    "gate": ["no_such", None, 3, nn.Softmax, {"name": "no_such"}, {}, {"name": "entmax15", "axis": 0}],
    "gate_norm": ["group", None, True, np.array(["batch"])],
    "init": ["zero", None, np.array("linear")],
    "activation": ["no_such", "linear", "dropout", "has_torch_function", "__name__", "Linear", None, 3,
                   nn.GELU, {"name": "GELU", "slope": 1}, {"name": "PReLU", "num_parameters": "many"},
                   {"slope": 1}, ["gelu"]],
    **{name: [1, 1.0, -0.1, float("nan"), float("inf"), "0.1", None, True, np.True_, torch.tensor([0.1, 0.2])]
       for name in ("dropout", "hidden_dropout")},
}  # fmt: skip


def arguments(kind: type[Any]) -> list[str]:
    placed = ("device", "dtype")  # where a layer is, not what it is
    return [name for name in inspect.signature(kind).parameters if name not in placed]


EVERY = [(kind, name) for kind in BASE for name in arguments(kind)]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=lambda x: getattr(x, "__name__", x))
def test_every_argument_comes_back(kind: type[Any], name: str) -> None:
    register_gate("tempered")(Tempered)
    register_activation("squared_relu")(squared_relu)
    for value, written in copy.deepcopy(VALUES[name]):
        given = {**BASE[kind], name: value}
        if name == "parameters":
            del given["rank"]
        if name == "format":
            given["rank"] = (2,) * len(mt.get_format(value).bonds(2))
        layer = kind(**given)
        assert layer.config.keys() == set(arguments(kind)) - {"parameters"}
        assert layer.config.get(name) == written
        assert_comes_back(layer)


def test_sequences_are_read_once() -> None:
    layer = MuMoE(5, 4, iter([3, 2]), "tucker", iter([2, 2, 3, 2]))
    assert layer.config["experts"] == (3, 2) and layer.config["rank"] == (2, 2, 3, 2)
    open_rank = MuMoE(50, 40, 3, "tr", iter([2, None, 2]))
    assert open_rank.config["rank"] == MuMoE(50, 40, 3, "tr", (2, None, 2)).config["rank"]


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=lambda x: getattr(x, "__name__", x))
def test_every_argument_is_checked_where_it_comes_in(kind: type[Any], name: str) -> None:
    for value in BAD[name]:
        given = {**BASE[kind], name: value}
        if name == "parameters":
            del given["rank"]
        with pytest.raises((ValueError, TypeError)) as caught:
            kind(**given)
        assert name in str(caught.value), (value, str(caught.value))


def test_no_argument_is_forgotten() -> None:
    assert VALUES.keys() == BAD.keys() == {name for _, name in EVERY}
    for kind, name in EVERY:
        default = BASE[kind].get(name, inspect.signature(kind).parameters[name].default)
        assert name in ("in_features", "parameters") or any(written != default for _, written in VALUES[name])


# ---- gates and activations ---------------------------------------------------------------------------------


def made(kind: str, function: Any) -> Any:
    return MuMoEMLP(5, 6, 4, 3, rank=2, gate_norm="layer", **{kind: function})


@pytest.mark.parametrize("kind", ["gate", "activation"])
@pytest.mark.parametrize(
    "function",
    [lambda x: x.softmax(-1), partial(torch.softmax, dim=-1), torch.sin, nn.Softmax(-1).forward],
    ids=["lambda", "partial", "torch", "method"],
)
def test_a_function_that_is_not_registered_works_but_is_not_written(kind: str, function: Any) -> None:
    layer = made(kind, function)
    with pytest.raises(ValueError, match=f"^{kind} must be registered to be written.*register_{kind}"):
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
    with pytest.raises(ValueError, match="register it first, by register_activation; got 'squared'"):
        MuMoEMLP.from_config(config)
    for name in ("os.system", "torch.tanh", "squared_relu", "Module", "softmax"):
        with pytest.raises(ValueError, match="register it first"):
            MuMoEMLP.from_config({**config, "activation": name})
        with pytest.raises(ValueError, match="register it first"):
            MuMoEMLP.from_config({**config, "activation": {"name": name}})


def test_names_of_registered_functions() -> None:
    for register in (register_gate, register_activation):
        register("own")(squared_relu)
        register("own")(squared_relu)  # as when a module is imported again
        for name in ("own", "PReLU", "softmax" if register is register_gate else "gelu"):
            with pytest.raises(ValueError, match="must have its own name"):
                register(name)(torch.tanh)
        first, second = (eval("lambda x: x") for _ in range(2))
        register("lambda")(first)
        with pytest.raises(ValueError, match="must have its own name"):
            register("lambda")(second)
        with pytest.raises(TypeError, match="must be a function or a class"):
            register("module")(nn.GELU())
        with pytest.raises(TypeError, match="must be a function or a class"):
            register("text")("gelu")
        for name in ("", 3, None):
            with pytest.raises(TypeError, match="must be a string"):
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
        with pytest.raises(ValueError, match=f"^{kind} must have every argument"):
            _ = made(kind, lost).config
    for slope in (torch.ones(1), float("nan"), object(), Fraction(1, 2), {1, 2}, {1: 2}):
        with pytest.raises(ValueError, match=f"^{kind} must have arguments of types that JSON has"):
            _ = made(kind, Held(slope)).config


def test_subclasses_of_torch_modules_are_not_written_as_them() -> None:
    class Shifted(nn.GELU):
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 1

    with pytest.raises(ValueError, match="activation must be registered"):
        _ = made("activation", Shifted()).config


def test_a_format_that_is_not_registered_is_not_written() -> None:
    class Own(mt.get_format("cp").__class__):
        name = "cp"

    layer = MuMoE(5, 4, 6, Own(), 3)
    with pytest.raises(ValueError, match=r"^format must be registered to be written in a config"):
        _ = layer.config


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


def test_a_gate_with_parameters_of_any_shape_keeps_them_for_fewer_experts() -> None:
    class Scaled(Tempered):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.tensor([0.5, 2.0]))

        def forward(self, logits: Any) -> Any:
            return super().forward(logits * self.scales.prod())

    layer = MuMoEMLP(5, 6, 4, (3, 2), rank=2, gate=Scaled())
    smaller = layer.keep_experts(0, [2])
    assert torch.equal(smaller.gate.gate.scales, layer.gate.gate.scales)


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
        lambda recipe, operands, activation=None, folded=None: (
            forms.append(activation),
            contract(recipe, operands, activation, folded),
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


# ---- configs of models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MixerConfig, GPT2Config], ids=lambda kind: kind.__name__)
def test_configs_of_models_are_plain(kind: Any) -> None:
    from dataclasses import asdict, fields

    ranks = {"token_rank", "channel_rank", "rank"}
    for each in (kind(), kind(format="cp", **{f.name: (2,) for f in fields(kind) if f.name in ranks})):
        plain = asdict(each)
        strange = {
            name: TEXT(value) if isinstance(value, str)
            else np.int64(value) if isinstance(value, int)
            else np.float32(value) if isinstance(value, float)
            else value if value is None
            else tuple(map(np.int32, value))
            for name, value in plain.items()
        }  # fmt: skip
        assert through_json(asdict(kind(**strange))) == through_json(plain)
        assert through_a_file(asdict(kind(**strange))) == plain


@pytest.mark.parametrize("kind", [MixerConfig, GPT2Config], ids=lambda kind: kind.__name__)
def test_the_gate_of_a_model_is_a_registered_name(kind: Any) -> None:
    register_gate("tempered")(Tempered)
    assert kind(gate="tempered").gate == "tempered"
    with pytest.raises(ValueError, match=r"gate must be one of.*register it first"):
        kind(gate="no_such")
    with pytest.raises(TypeError, match="gate must be a name"):
        kind(gate=entmax15)


def test_settings_of_a_training_and_of_a_layer_to_study_are_plain() -> None:
    from dataclasses import asdict

    from mumoe_tensor.study import Layer, dense
    from mumoe_tensor.study.settings import prepare
    from mumoe_tensor.training import TrainConfig

    plain = dict(epochs=3, batch_size=8, learning_rate=0.5, warmup=2, steps=7, betas=(0.5, 0.75), seed=1)
    strange = {name: np.asarray(value) for name, value in plain.items()}
    config = TrainConfig(**strange, clip=torch.tensor(0.5), compile=np.True_)
    assert through_a_file(asdict(config)) == asdict(TrainConfig(**plain, clip=0.5, compile=True))
    assert through_json(asdict(config))["betas"] == [0.5, 0.75]
    numbers = dict(batch=4, batches=[1, 2], squares=[8], experts=[4, 2], seconds=0.5, seed=3, head_hidden=6)
    study = prepare("clip-head", **{name: np.asarray(value) for name, value in numbers.items()}, data="none")
    assert study == prepare("clip-head", **numbers, data="none")
    assert json.loads(study.to_json())["batch"] == 4
    layer = Layer("Other", dense(np.int64(5), torch.tensor(4), np.int64(6)), np.uint8(3))
    assert through_a_file(layer.entry()) == Layer("Other", dense(5, 4, 6), 3).entry()


@pytest.mark.parametrize("hidden", [None, np.int64(6)])
def test_configs_of_heads_are_plain(hidden: Any, tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    register_gate("tempered")(Tempered)
    for options in (
        {"format": TEXT("linear")},
        {"experts": np.int64(3), "rank": np.int64(2)},
        {
            "experts": np.array([3, 2]),
            "rank": torch.tensor([2]),
            "gate": "tempered",
            "gate_norm": TEXT("layer"),
        },
        {"experts": torch.tensor(3), "parameters": np.int64(200), "gate_norm": TEXT("layer")},
    ):
        head = Head(np.int64(5), torch.tensor(4), hidden, **options).eval()
        assert through_json(head.config) == through_a_file(head.config) == head.config
        save_head(head, tmp_path / "head.safetensors")
        read, x = load_head(tmp_path / "head.safetensors"), torch.randn(3, 5)
        assert read.config == head.config and torch.equal(read(x), head(x))
    with pytest.raises(ValueError, match="gate must be registered"):
        Head(5, 4, hidden, experts=3, rank=2, gate=lambda logits: logits)


# ---- states ------------------------------------------------------------------------------------------------


def layer_with_edit() -> Any:
    torch.manual_seed(0)
    layer = MuMoEMLP(5, 6, 4, (3, 2), rank=2, gate=Tempered(2.0), activation=nn.PReLU(6), input_norm=True)
    layer(torch.randn(9, 5))
    edit_bias(layer.up, "old", [torch.rand(3), torch.rand(2)], 1, 2.0)
    return layer.eval()


def test_an_instance_that_changes_its_arguments_is_not_written() -> None:
    @register_gate("twice")
    class Twice:
        def __init__(self, factor: float):
            self.factor = 2 * factor

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return (self.factor * logits).softmax(-1)

    with pytest.raises(ValueError, match=r"made with {'factor': 4.0}, 'twice' has {'factor': 8.0}"):
        _ = MuMoE(5, 4, 3, rank=2, gate=Twice(2.0)).config


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
        ValueError, match=r"down\.factor_0 must be a tensor with values .* on the meta device"
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
    lazy, known = made("activation", nn.LazyLinear(6)), made("activation", nn.LazyLinear(6))
    known(torch.randn(2, 5))
    lazy.load_state_dict(known.state_dict())
    assert torch.equal(lazy.activation.weight, known.activation.weight)


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
