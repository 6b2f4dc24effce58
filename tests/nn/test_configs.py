"""Configs are JSON and make the same layer again."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from written import (  # noqa: E402
    Tempered,
    assert_comes_back,
    squared_relu,
    through_a_file,
    through_json,
)

import mumoe_tensor as mt  # noqa: E402
from mumoe_tensor.models import GPT2Config, Head, MixerConfig, load_head, save_head  # noqa: E402
from mumoe_tensor.nn import (  # noqa: E402
    MuMoE,
    MuMoEMLP,
    entmax15,
    register_activation,
    register_gate,
)

BASE: dict[type[Any], dict[str, Any]] = {
    MuMoE: {"in_features": 5, "out_features": 20, "experts": (3, 2), "rank": 2},
    MuMoEMLP: {"in_features": 5, "hidden_features": 6, "out_features": 4, "experts": (3, 2), "rank": 2},
}


# ---- every argument ----------------------------------------------------------------------------------------

INTEGERS = [(value, 2) for value in (2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2))]
TUPLES = [(value, (written,)) for value, written in INTEGERS]
TEXT = np.str_
ELU, TEMPERED = {"name": "ELU", "alpha": 0.5, "inplace": False}, {"name": "tempered", "start": 3.0}
MACHINE = {
    "flops": 3e12,
    "bandwidth": 1e12,
    "launch": 0.0,
    "dtype": "bfloat16",
    "element": 6,
    "gate_passes": 4,
}
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
    "gated": [(True, True)],
    "gate": [("softmax", "softmax"), (TEXT("sparsemax"), "sparsemax"), (mt.sparsemax, "sparsemax"),
             (entmax15, "entmax15"), (mt.entmax15, "entmax15"), (Tempered(3), TEMPERED), (TEMPERED, TEMPERED),
             ("tempered", {"name": "tempered", "start": 1.0}),
             (nn.Softmax(-1), {"name": "Softmax", "dim": -1})],
    "gate_norm": [("layer", "layer"), ("none", "none"), (TEXT("layer"), "layer")],
    "gate_features": [(value, 5) for value in (5, np.int64(5), torch.tensor(5))],
    "input_norm": [(True, True)],
    "init": [("published", "published"), (TEXT("published"), "published")],
    "batch_hint": INTEGERS,
    "machine": [("cuda", "cuda"), (TEXT("h200"), "h200"), (MACHINE, MACHINE),
                (mt.Machine(**MACHINE), MACHINE)],
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
       for name in ("bias", "gated", "input_norm", "recompute")},
    "gate": ["no_such", None, 3, nn.Softmax, {"name": "no_such"}, {}, {"name": "entmax15", "axis": 0}],
    "gate_norm": ["group", None, True, np.array(["batch"])],
    "gate_features": [0, -1, 1.5, True, "2", torch.tensor([2])],
    "machine": ["gpu", 3, ["cpu"], {"flops": 1.0}, {**MACHINE, "speed": 1.0}, {**MACHINE, "flops": 0.0}],
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
        # (Some are written only where they are used.)
        left_out = {"parameters", *{"gated", "gate_features", "machine"} - {name}}
        assert layer.config.keys() == set(arguments(kind)) - left_out
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


def test_a_format_that_is_not_registered_is_not_written() -> None:
    class Own(mt.get_format("cp").__class__):
        name = "cp"

    layer = MuMoE(5, 4, 6, Own(), 3)
    with pytest.raises(ValueError, match=r"^format must be registered to be stored in a config"):
        _ = layer.config


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
    with pytest.raises(ValueError, match=r"gate must be one of.*a name registered with"):
        kind(gate="no_such")
    with pytest.raises(TypeError, match="gate must be a name"):
        kind(gate=entmax15)


def test_settings_of_a_training_and_of_a_layer_to_study_are_plain() -> None:
    from dataclasses import asdict

    from mumoe_tensor.study import Layer
    from mumoe_tensor.study.settings import prepare
    from mumoe_tensor.training import TrainConfig

    plain = dict(epochs=3, batch_size=8, learning_rate=0.5, warmup=2, steps=7, betas=(0.5, 0.75), seed=1)
    strange = {name: np.asarray(value) for name, value in plain.items()}
    config = TrainConfig(**strange, clip=torch.tensor(0.5), compile=np.True_)
    assert through_a_file(asdict(config)) == asdict(TrainConfig(**plain, clip=0.5, compile=True))
    assert through_json(asdict(config))["betas"] == [0.5, 0.75]
    numbers = dict(batch=4, batches=[1, 2], experts=[4, 2], seconds=0.5, seed=3, head_hidden=6)
    study = prepare("clip-head", **{name: np.asarray(value) for name, value in numbers.items()}, data="none")
    assert study == prepare("clip-head", **numbers, data="none")
    assert json.loads(study.to_json())["batch"] == 4
    layer = Layer("Other", np.int64(5), torch.tensor(4), np.int64(6), experts=np.uint8(3))
    assert through_a_file(asdict(layer)) == asdict(Layer("Other", 5, 4, 6, experts=3))


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


@pytest.mark.parametrize(
    "format",
    [
        {"name": "kron", "splits": {"i": [2, 3], "o": 2}},
        {"name": "cp", "splits": {"n1": 2}},
        mt.sum_of(mt.shared({"name": "btt", "splits": {"i": (2, 3), "o": (3, 2)}}), mt.sliced("tr", 1, 3)),
        "shared-expert",
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [MuMoE, MuMoEMLP])
def test_formats_that_split_modes_and_sums_come_back(kind: Any, format: Any) -> None:
    rank = (2,) * len(mt.get_format(format).bonds(1))
    sizes = (5, 4) if kind is MuMoE else (5, 6, 4)
    layer = kind(*sizes, 4, format=format, rank=rank)
    assert_comes_back(layer)
    with pytest.raises(ValueError, match=r"\.factor_\d has shape"):
        kind(**layer.config | {"rank": tuple(r + 1 for r in rank)}).load_state_dict(layer.state_dict())
