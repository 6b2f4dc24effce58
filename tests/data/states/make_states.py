"""Record states of layers, files of models and folders of runs, with the outputs they give.

`tests/test_recorded_states.py` loads them. They were written once, at commit c5540ab. Written again by a
later version they would test nothing, so new kinds of states get files of their own: ``structured`` (formats
with split modes, and sums).

    python tests/data/states/make_states.py FOLDER [structured]
"""

from __future__ import annotations

import json
import os
import random
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from mumoe_tensor.analysis import edit_bias, mean_coefficients
from mumoe_tensor.configs.bias import RECIPES
from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.experiments import bias
from mumoe_tensor.formats import formats, get_format, shared, sliced, sum_of
from mumoe_tensor.models import GPT2, GPT2Config, Head, Mixer, MixerConfig, save_head, save_model
from mumoe_tensor.nn import MuMoE, MuMoEMLP
from mumoe_tensor.training.attributes import read_adult
from mumoe_tensor.training.head import HeadSetting
from mumoe_tensor.training.images import ImageData
from mumoe_tensor.training.run import run
from mumoe_tensor.training.settings import GPT2Run, MixerRun
from mumoe_tensor.training.tokens import TokenData

INPUTS, HIDDEN, OUTPUTS = 6, 7, 5


def layers() -> dict[str, Any]:
    """Layers of whole formats, with every block, gate norm and kind of edit among them."""
    made: dict[str, Any] = {}
    norms, gates = ("batch", "layer", "none"), ("entmax15", "sparsemax", "softmax")
    for k, name in enumerate(("cp", "tucker", "tr", "tt", "hadamard", "dense")):
        format = formats()[name]
        for j, experts in enumerate(((4,), (3, 2), ())):
            options: dict[str, Any] = dict(
                experts=experts, format=name, rank=(2,) * len(format.bonds(len(experts))) or None,
                gate_norm=norms[(k + j) % 3], gate=gates[(k + j) % 3], bias=j != 1, input_norm=j == 1,
                init=("linear", "published")[k % 2], recompute=j == 0,
            )  # fmt: skip
            title = f"{name}-{'x'.join(map(str, experts)) or 'none'}"
            made[f"{title}-linear"] = MuMoE(INPUTS, OUTPUTS, **options)
            activation = ("gelu", "relu", "silu")[k % 3]
            made[f"{title}-mlp"] = MuMoEMLP(
                INPUTS, HIDDEN, OUTPUTS, **options, activation=activation, dropout=0.1 * j
            )
    return made


def structured() -> dict[str, Any]:
    """Layers of formats that split modes and of sums: registered, padded, shared, and sliced."""
    new = ("kron", "btt", "monarch", "tt-matrix", "tucker-matrix", "cp-matrix", "lowrank", "shared-expert")
    cases = {name: get_format(name) for name in new}
    cases["padded"] = get_format({"name": "tt-matrix", "splits": {"i": [2, 2, 2], "o": [1, 5, 2]}})
    cases["split experts"] = get_format({"name": "cp", "splits": {"n1": 2}})
    cases["sum"] = sum_of(shared("lowrank"), "btt", sliced("cp", 1, 3))
    made: dict[str, Any] = {}
    for k, (name, format) in enumerate(cases.items()):
        for j, experts in enumerate(((4,), (4, 2), ())):
            if not experts and name in ("sum", "split experts"):
                continue
            options: dict[str, Any] = dict(
                experts=experts, format=format, rank=(2,) * len(format.bonds(len(experts))) or None,
                bias=j != 1,
            )  # fmt: skip
            title = f"{name}-{'x'.join(map(str, experts)) or 'none'}"
            made[f"{title}-linear"] = MuMoE(INPUTS, 8, **options)
            if j == k % 3 and name != "padded":
                made[f"{title}-mlp"] = MuMoEMLP(INPUTS, 9, 8, **options)
    return made


def settle(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Draw all parameters and statistics, so that none has the value it starts with."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        for _ in range(3):
            model.train()(inputs)
    return model.eval()


def record_layers(file: Path, recorded: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, str] = {}
    for name, layer in recorded.items():
        x = torch.randn(9, INPUTS)
        settle(layer, x)
        edits = []
        if layer.gate.num_experts:
            means = mean_coefficients(layer, layer, [x])
            if isinstance(layer, MuMoE):
                edits = [("first", layer, 1), ("second", layer, [0, 3])]
            elif layer.config["bias"]:
                edits = [("up", layer.up, 2), ("down", layer.down, [4])]
            for strength, (edit, part, outputs) in enumerate(edits, start=1):
                edit_bias(part, edit, means, outputs, -0.7 * strength)
        with torch.no_grad():
            y = layer(x)
        about[name] = json.dumps({"class": type(layer).__name__, "config": layer.config})
        tensors |= {f"{name}/x": x, f"{name}/y": y}
        tensors |= {f"{name}/state/{key}": value.clone() for key, value in layer.state_dict().items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, about)


def record_pickled(folder: Path) -> None:
    """The same once more as a pickled state, as users keep theirs."""
    layer, x = layers()["tr-3x2-mlp"], torch.randn(9, INPUTS)
    settle(layer, x)
    pickled = {"state": layer.state_dict(), "config": layer.config, "x": x, "y": layer(x).detach()}
    torch.save(pickled, folder / "tr-3x2-mlp.pt")


def models() -> dict[str, Any]:
    """Models that have files, each with inputs."""
    made: dict[str, Any] = {
        "head-linear": Head(INPUTS, 4, format="linear"),
        "head-linear-hidden": Head(INPUTS, 4, 8, format="linear"),
        "head-cp": Head(INPUTS, 4, experts=4, rank=3),
        "head-tr-hidden": Head(
            INPUTS, 4, 8, format="tr", experts=(2, 2), rank=(2, 2, 2, 3), gate_norm="layer"
        ),
        "head-dense-hidden": Head(INPUTS, 4, 8, format="dense", experts=3, rank=()),
    }
    small: Any = dict(image_size=8, patch=4, width=8, depth=2, token_hidden=4, channel_hidden=12, classes=3)
    ranks = {"cp": (2,), "tr": (2, 2, 2, 2), "tucker": (2, 2, 2)}
    for format, experts in (("mlp", (4,)), ("cp", (4,)), ("tr", (2, 3))):
        rank = ranks.get(format)
        config = MixerConfig(**small, format=format, experts=experts, token_rank=rank, channel_rank=rank)
        made[f"mixer-{format}"] = Mixer(config)
    words: Any = dict(vocabulary=40, context=8, width=8, depth=2, heads=2, hidden=16)
    for format, experts in (("mlp", (4,)), ("cp", (4,)), ("tucker", (4,))):
        made[f"gpt2-{format}"] = GPT2(
            GPT2Config(**words, format=format, experts=experts, rank=ranks.get(format))
        )
    return made


def record_models(folder: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, model in models().items():
        kind = name.partition("-")[0]
        x = {
            "head": lambda: torch.randn(9, INPUTS),
            "mixer": lambda: torch.randn(5, 1, 8, 8),
            "gpt2": lambda: torch.randint(40, (3, 8)),
        }[kind]()
        settle(model, x)
        if kind == "head":
            model.centre_on(x + 0.3)
            save_head(model, folder / f"{name}.safetensors")
        else:
            save_model(model, folder / f"{name}.safetensors")
        with torch.no_grad():
            y = model(x)
        tensors |= {f"{name}/x": x, f"{name}/y": y[0] if isinstance(y, tuple) else y}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "models.safetensors")


def record_runs() -> None:
    """Folders of runs, written in the working folder: paths in them are relative to it."""
    r = np.random.default_rng(0)
    np.savez_compressed("features.npz", x=r.normal(size=(60, 8)).astype("float32"), y=r.integers(0, 3, 60))
    pixels = r.integers(0, 256, size=(60, 8, 8), dtype="uint8")
    np.savez_compressed("images.npz", x=pixels, y=r.integers(0, 3, 60))
    for part, count in (("training", 400), ("validation", 120)):
        r.integers(0, 40, count).astype("<u2").tofile(f"{part}.bin")
    train = TrainConfig(epochs=2, batch_size=20, checkpoint_every=2, keep="last")
    head = dict(experts=4, rank=3, format="cp")
    run(HeadSetting("features.npz", head, TrainConfig(epochs=2, batch_size=20)), Path("head"))
    small: Any = dict(image_size=8, patch=4, width=8, depth=1, token_hidden=4, channel_hidden=12, classes=3)
    mixer = MixerConfig(**small, format="cp", experts=(4,), token_rank=(2,), channel_rank=(2,))
    run(MixerRun(ImageData("images.npz"), mixer, train), Path("mixer"))
    words: Any = dict(vocabulary=40, context=8, width=8, depth=1, heads=2, hidden=16)
    gpt2 = GPT2Config(**words, format="tr", experts=(2,), rank=(2, 2, 2))
    run(GPT2Run(TokenData("training.bin", "validation.bin"), gpt2, train), Path("gpt2"))
    for path in Path().glob("*/tensorboard/*"):
        path.unlink()
    random.seed(0)

    def person() -> str:
        age, weight, years, gain, loss, hours = (str(random.randint(1, 60)) for _ in range(6))
        sex, income = random.choice(("Male", "Female")), random.choice(("<=50K", ">50K"))
        of = (age, "Private", weight, "HS-grad", years, "Divorced", "Sales", "Unmarried", "White")
        return ", ".join((*of, sex, gain, loss, hours, "Cuba", income))

    Path("adult").mkdir()
    for name, rows in (("adult.data", 700), ("adult.test", 60)):
        Path("adult", name).write_text("\n".join(person() for _ in range(rows)))
    task = read_adult(Path("adult"), ("income", 1), ("Male", 0))
    bias.Experiment(task, RECIPES["adult"].quick(), Path("bias")).validate()


def main(folder: Path, only: str | None = None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    if only == "structured":
        record_layers(folder / "structured.safetensors", structured())
        return
    record_layers(folder / "layers.safetensors", layers())
    record_pickled(folder)
    record_models(folder)
    target = folder.resolve() / "runs.tar.xz"
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        record_runs()
        with tarfile.open(target, "w:xz") as archive:
            archive.add(".", ".")
        os.chdir(target.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
