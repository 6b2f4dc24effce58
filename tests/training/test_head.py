"""Heads: their sizes and files, features of a network below, a run and its folder, the command."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from torch import nn

import mumoe_tensor as mt
from mumoe_tensor.models import Backbone, Head, load_head, save_head
from mumoe_tensor.spec import as_budget
from mumoe_tensor.training import Dataset, TrainConfig, evaluate, extract, read_npz, split, write_npz
from mumoe_tensor.training.head import HeadSetting, fine_tune, train_head
from mumoe_tensor.training.images import ImageFiles, Scaled, class_folders
from mumoe_tensor.training.run import read_run, run

CLASSES = 3
SHORT = TrainConfig(epochs=12, batch_size=64, learning_rate=0.02)


def clouds(rows: int = 512, features: int = 12, seed: int = 0) -> Dataset:
    """Classes that a linear layer tells apart, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % CLASSES
    x = 100 + 20 * (torch.randn(rows, features, generator=generator) + 4 * torch.eye(features)[y])
    return Dataset(x, y)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def features(tmp_path: Path) -> Path:
    write_npz(clouds(), tmp_path / "features.npz")
    return tmp_path / "features.npz"


# ---- heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [8, (8,), (4, 4), (2, 2, 2)])
# Formats whose rank moves in small steps.
@pytest.mark.parametrize("format", ["cp", "hadamard", "tr", "tt", "tucker"])
def test_a_head_has_the_parameters_of_the_one_without_experts(format: str, experts: Any) -> None:
    budget = count(Head(128, 10, 256, format="linear"))
    head = Head(128, 10, 256, format=format, experts=experts, parameters="match")
    assert count(head) == pytest.approx(budget, rel=0.05)
    assert head(torch.randn(5, 128)).shape == (5, 10)
    for less in (4 * budget // 5, "0.8x"):
        head = Head(128, 10, 256, format=format, experts=experts, parameters=less)
        assert count(head) == pytest.approx(0.8 * budget, rel=0.05)


@pytest.mark.parametrize("experts", [8, (4, 4)])
@pytest.mark.parametrize("format", [name for name, format in mt.formats().items() if format.bonds(1)])
def test_a_head_has_the_rank_nearest_to_its_parameters(format: str, experts: Any) -> None:
    sizes = {"in_features": 128, "hidden": 256, "out_features": 10}
    spec = mt.LayerSpec(format, experts=experts, **sizes, bias=True)
    text = "1.5x" if format == "shared-expert" else "0.5x"  # that has a dense matrix
    budget = as_budget(text, spec.dense_parameters)
    sides = [spec.fitted(budget, rounding=side).parameters for side in ("down", "up")]
    head = Head(128, 10, 256, format=format, experts=experts, parameters=text, gate_norm="none")
    assert count(head) == min(sides, key=lambda side: abs(side - budget))


@pytest.mark.parametrize("experts", [16, (4, 4)])
@pytest.mark.parametrize("sizes", [(64, 20, None), (20, 64, None), (12, 4, 40)])
@pytest.mark.parametrize("format", mt.formats())
def test_by_default_an_expert_can_learn_what_a_linear_layer_does(
    format: str, sizes: tuple[int, int, int | None], experts: Any
) -> None:
    features, classes, hidden = sizes
    head = Head(features, classes, hidden, format=format, experts=experts)
    widths = [n for n in (features, hidden, classes) if n is not None]
    full = [min(pair) for pair in pairwise(widths)]
    assert head.config["hidden"] == hidden

    def ranks(rank: tuple[int, ...]) -> list[int]:
        named = {"in_features": features, "hidden": hidden, "out_features": classes}
        spec = mt.LayerSpec(format, experts=experts, rank=rank, **named)
        return [layer.max_expert_rank for layer in spec.layers]

    rank = tuple(head.config["rank"])
    assert ranks(rank) == full
    # And it is no larger than that takes; of a split format several entries grow together.
    if rank and rank[-1] > 1 and not mt.get_format(format).is_split:
        assert ranks((*rank[:-1], rank[-1] - 1)) != full


def test_the_default_head_learns_as_much_as_a_linear_one() -> None:
    """20 clusters in 64 dimensions; a head of the parameters of the linear one is a third as good."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 20
    x = torch.randn(20, 64, generator=draw)[y] + 1.5 * torch.randn(2000, 64, generator=draw)
    training, validation = split(Dataset(x, y), 0.2)
    accuracy = {}
    for name, options in {
        "linear": {"format": "linear"},
        "default": {"experts": 16},
        "matched": {"experts": 16, "parameters": "match"},
    }.items():
        torch.manual_seed(0)
        epochs = train_head(Head(64, 20, **options), training, validation, TrainConfig(learning_rate=3e-3))
        accuracy[name] = max(epoch.accuracy for epoch in epochs)
    assert accuracy["default"] > accuracy["linear"] - 0.03 > 0.85
    assert accuracy["matched"] < accuracy["linear"] - 0.2


def test_an_open_rank_is_solved_and_a_whole_one_kept() -> None:
    budget = count(Head(64, 10, 96, format="linear"))
    head = Head(64, 10, 96, format="tucker", experts=8, rank=(3, None, 20))
    assert head.config["rank"][::2] == [3, 20] and count(head) == pytest.approx(budget, rel=0.02)
    assert Head(64, 10, format="cp", experts=8, rank=5).config["rank"] == [5]


def test_rules_of_a_head() -> None:
    with pytest.raises(ValueError, match="either rank or parameters must be given"):
        Head(8, 3, 16, experts=4, rank=5, parameters=100)
    with pytest.raises(ValueError, match="without experts"):
        Head(8, 3, format="linear", rank=5)
    with pytest.raises(ValueError, match="smallest rank"):
        Head(64, 10, experts=64, parameters="match")
    with pytest.raises(ValueError, match="a hidden size of 1"):
        Head(64, 10, 8, format="hadamard", experts=64, parameters="match")
    with pytest.raises(ValueError, match=r"modes that are not split.*'monarch' has neither"):
        Head(64, 10, 8, format="monarch", experts=64, parameters="match")
    with pytest.raises(ValueError, match=r"the size of mode 'o' must be a product of 2 factors .*, got 3"):
        Head(64, 3, format="btt", experts=4)
    with pytest.raises(ValueError, match=r"a multiple such as 0\.5x; got 'twice'"):
        Head(64, 10, parameters="twice")


@pytest.mark.parametrize("format", [*mt.formats(), "linear"])
@pytest.mark.parametrize("hidden", [None, 24])
def test_a_head_comes_back_from_its_file(format: str, hidden: int | None, tmp_path: Path) -> None:
    data = clouds()
    options = {} if format == "linear" else {"experts": (2, 2), "gate": "softmax", "gate_norm": "batch"}
    if format != "linear":
        is_solved = mt.formats()[format].bonds(2) or (format == "hadamard" and hidden)
        options |= {"parameters": 900} if is_solved else {"rank": ()}
    head = Head(12, CLASSES + 1, hidden, format=format, **options)  # three classes split into no parts
    train_head(head, data, data, TrainConfig(epochs=1, batch_size=64))
    save_head(head, tmp_path / "head.safetensors")
    read = load_head(tmp_path / "head.safetensors")
    assert torch.equal(read(data.x), head(data.x)) and read.config == head.config
    assert [p.name for p in tmp_path.iterdir()] == ["head.safetensors"]


def test_other_files_are_no_heads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in (("other", "with a head's config"), ("text", "a complete safetensors file")):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: .*{message}"):
            load_head(tmp_path / f"{name}.safetensors")


def test_features_are_centred_and_scaled_by_one_number() -> None:
    head, data = Head(12, CLASSES, format="linear"), clouds()
    head.centre_on(data.x)
    seen: list[Any] = []
    head.body.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    head(data.x)
    assert torch.allclose(seen[0].mean(0), torch.zeros(12), atol=1e-5)
    assert float(seen[0].square().mean()) == pytest.approx(1, rel=1e-5)
    # Order and ratio of the features' variances stay.
    assert torch.allclose(seen[0].var(0) / seen[0].var(), data.x.var(0) / (data.x - data.x.mean(0)).var())
    constant = Head(2, 2, format="linear")
    constant.centre_on(torch.ones(4, 2))
    assert torch.isfinite(constant(torch.ones(1, 2))).all()


# ---- the network below ------------------------------------------------------------------------------------


def tiny() -> Backbone:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    return Backbone(network, 10, (0.1, 0.2, 0.3), 0.5)


def images(rows: int = 192) -> Dataset:
    """Which third of the image is bright tells the class."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(rows) % CLASSES
    x = 0.1 * torch.rand(rows, 12, 12, generator=generator)
    for k in range(CLASSES):
        x[y == k, 4 * k : 4 * k + 4] += 0.3 * (k + 1)
    return Dataset(x, y)


def test_features_are_those_of_the_network_in_evaluation() -> None:
    backbone, data = tiny().train(), images(50)
    backbone.network[0].eval()
    modes = {name: module.training for name, module in backbone.named_modules()}
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    actual = extract(backbone, data, batch_size=16)
    assert modes == {name: module.training for name, module in backbone.named_modules()}
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())
    assert torch.equal(actual.y, data.y) and not actual.x.is_inference()
    colours = data.x[:, None].expand(-1, 3, -1, -1)
    scaled = nn.functional.interpolate(colours, size=(10, 10), mode="bilinear")
    scaled = (scaled - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    expected = backbone.eval().network(scaled).mean((2, 3))
    assert torch.allclose(actual.x, expected, atol=1e-6)
    assert torch.allclose(extract(backbone, Dataset(colours, data.y)).x, expected, atol=1e-6)


def test_shapes_that_are_no_images_or_features() -> None:
    with pytest.raises(ValueError, match="images must have shape"):
        tiny()(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="a backbone must return"):
        extract(nn.Identity(), images(4))


def test_a_frozen_network_stays_and_a_trained_one_does_not() -> None:
    data, backbone = images(), tiny()
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    torch.manual_seed(0)
    head = Head(6, CLASSES, experts=4, rank=4)
    actual = extract(backbone, data)
    train_head(head, actual, actual, SHORT)
    assert all(torch.equal(before[name], p) for name, p in backbone.named_parameters())
    fine_tune(backbone, head, data, data, TrainConfig(epochs=2, batch_size=64, learning_rate=0.01))
    assert not any(torch.equal(before[name], p) for name, p in backbone.named_parameters() if p.ndim > 1)
    # The head is centred on what the untrained network gave.
    assert torch.allclose(head.mean, actual.x.mean(0), atol=1e-5)


# ---- a run and its folder ---------------------------------------------------------------------------------


def test_a_run_is_kept_and_not_done_again(features: Path, tmp_path: Path) -> None:
    setting = HeadSetting(str(features), {"experts": (4, 4), "rank": (6,)}, SHORT)
    out = tmp_path / "out"
    actual = run(setting, out)
    assert actual["trained"] and actual["accuracy"] > 0.9
    head, data = load_head(out / "head.safetensors"), read_npz(features)
    assert evaluate(head, data)[1] > 0.9 and actual["parameters"] == count(head)
    lines = (out / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + SHORT.epochs and lines[0].startswith("epoch,loss")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(setting, out)
    assert again == {**actual, "trained": False}
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    # One that was cut off goes on, and gives the same.
    (out / "head.safetensors").unlink()
    assert run(setting, out) == actual
    assert torch.equal(load_head(out / "head.safetensors")(data.x), head(data.x))
    other = HeadSetting(str(features), {"experts": 4, "rank": (6,)}, SHORT)
    with pytest.raises(ValueError, match="other settings"):
        run(other, out)
    assert run(other, out, fresh=True)["trained"]


def test_a_folder_is_locked_while_data_are_read(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (HeadSetting(str(features), {"experts": 4, "rank": (r,)}, SHORT) for r in (5, 6))
    read, out = HeadSetting.read_data, tmp_path / "out"

    def read_slowly(setting: HeadSetting) -> Any:
        if setting is second:
            run(first, out)
        return read(setting)

    monkeypatch.setattr(HeadSetting, "read_data", read_slowly)
    with pytest.raises(OSError, match="only one process at a time"):
        run(second, out)
    assert run(first, out)["trained"]


@pytest.mark.parametrize(
    ("x", "message"),
    [(np.zeros((9, 4)), "at least two classes"), (np.zeros(9), r"x must have shape \(rows, ")],
)
def test_data_that_no_head_can_learn(x: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=x, y=np.zeros(9, int))
    with pytest.raises(ValueError, match=message):
        run(HeadSetting(str(tmp_path / "f.npz"), {}, SHORT), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_not_that_of_the_head(features: Path, tmp_path: Path) -> None:
    run(HeadSetting(str(features), {"experts": 4, "rank": (5,), "gate": "softmax"}, SHORT), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("softmax", "sparsemax"))
    with pytest.raises(ValueError, match="gate is 'softmax' in the head, 'sparsemax' in the config"):
        read_run(tmp_path)


def test_features_of_images_in_folders(tmp_path: Path) -> None:
    data = images(12)
    write_folders(data, tmp_path / "images")
    files, classes = class_folders(tmp_path / "images")
    assert classes == ["0", "1", "2"] and [label for _, label in files] == sorted(data.y.tolist())
    rows = ImageFiles(files, Scaled(12))
    x, y = rows.batch([0, 11])
    assert x.shape == (2, 3, 12, 12) and y.tolist() == [0, 2]
    torch.testing.assert_close(x[0], data.x[0].expand(3, -1, -1), atol=1 / 255, rtol=0)
    features = extract(tiny(), rows, batch_size=5)
    by_class = data.y.sort(stable=True).indices
    torch.testing.assert_close(features.x, extract(tiny(), data).x[by_class], atol=0.01, rtol=0)
    assert torch.equal(features.y, data.y[by_class])
    assert rows.batch([3])[0].shape == (1, 3, 12, 12) and Scaled(6)(picture_of(files)).shape == (3, 6, 6)


def picture_of(files: Any) -> Any:
    from PIL import Image

    return Image.open(files[0][0]).convert("RGB")


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(ValueError, match=r"a subfolder of images for each class; \[\] has no images"):
        class_folders(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"\['cat'\] has no images"):
        class_folders(tmp_path)
    setting = HeadSetting(str(tmp_path), {}, SHORT, labels="y.gz", backbone="tiny", weights="tiny.pth")
    with pytest.raises(ValueError, match="labels must be None"):
        setting.read_data()


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match="file of weights"):
        HeadSetting("x.npz", {}, SHORT, backbone="resnet18")
    with pytest.raises(ValueError, match="need a backbone"):
        HeadSetting("x.npz", {}, SHORT, train_backbone=True)
    with pytest.raises(ValueError, match="size of images"):
        HeadSetting("x.npz", {}, SHORT, size=0)


def write_folders(data: Dataset, folder: Path) -> None:
    """Images in a file each, in a folder for each class, every other one in a folder below."""
    picture = pytest.importorskip("PIL.Image")
    for number, (x, y) in enumerate(zip(data.x, data.y.tolist(), strict=True)):
        path = folder / str(y) / (f"{number:03}.png" if number % 2 else f"{number:03}/below.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.fromarray((255 * x).byte().numpy()).save(path)


@pytest.mark.parametrize("inputs", ["images.npz", "images"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_run_on_images(trained: bool, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mumoe_tensor.training.head.load_backbone", lambda name, weights, size: tiny())
    if inputs == "images":
        write_folders(images(), tmp_path / inputs)
    else:
        write_npz(images(), tmp_path / inputs)
    setting = HeadSetting(
        str(tmp_path / inputs), {"experts": 4, "rank": 4}, SHORT, backbone="tiny", weights="tiny.pth",
        size=12, train_backbone=trained,
    )  # fmt: skip
    run(setting, tmp_path / "out")
    assert (tmp_path / "out" / "backbone.safetensors").exists() == trained
    backbone, head = tiny(), load_head(tmp_path / "out" / "head.safetensors")
    if trained:
        from safetensors.torch import load_file

        backbone.load_state_dict(load_file(tmp_path / "out" / "backbone.safetensors"))
    assert evaluate(nn.Sequential(backbone, head), images())[1] > 0.5


def test_a_run_anew_leaves_no_network_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mumoe_tensor.training.head.load_backbone", lambda name, weights, size: tiny())
    write_npz(images(), tmp_path / "images.npz")
    setting = HeadSetting(
        str(tmp_path / "images.npz"), {"experts": 4, "rank": 4}, replace(SHORT, epochs=1), backbone="tiny",
        weights="tiny.pth", train_backbone=True,
    )  # fmt: skip
    run(setting, tmp_path / "out")
    assert (tmp_path / "out" / "backbone.safetensors").exists()
    run(replace(setting, train_backbone=False), tmp_path / "out", fresh=True)
    assert not (tmp_path / "out" / "backbone.safetensors").exists()


# ---- the command ------------------------------------------------------------------------------------------


def invoke(line: str) -> Any:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mumoe_tensor.cli import app

    return CliRunner().invoke(app, shlex.split(f"train head {line}"))


def test_command(features: Path, tmp_path: Path) -> None:
    line = f"--features {features} --format tr --experts 2x2 --hidden 16 --parameters 500 --epochs 2 --out"
    result = invoke(f"{line} {tmp_path / 'out'}")
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    assert "500" not in result.stderr and "accuracy" in result.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "checkpoints",
        "config.json",
        "head.safetensors",
        "metrics.csv",
        "tensorboard",
    ]
    figures = json.loads(invoke(f"{line} {tmp_path / 'out'} --json").stdout)
    head = load_head(tmp_path / "out" / "head.safetensors")
    assert figures["trained"] is False and figures["parameters"] == count(head)
    assert head.config["format"] == "tr" and head.config["experts"] == [2, 2]
    assert "was already trained" in invoke(f"{line} {tmp_path / 'out'}").stdout
    dense = invoke(f"--features {features} --format linear --epochs 1 --out {tmp_path / 'dense'}")
    assert dense.exit_code == 0 and f"{13 * CLASSES} parameters" in dense.stdout


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--features {f} --images {f}",
        "--features missing.npz",
        "--features {f} --format nothing",
        "--features {f} --rank 5 --parameters 500",
        "--features {f} --rank 5 --epochs 0",
        "--features {f} --rank 5 --experts many",
        "--features {f} --rank 5 --gate hard",
        "--features {f} --rank 5 --validation 1.5",
        "--features {f} --rank 5 --batch-size 100000",
        "--features {f} --rank 5 --labels {f}",
        "--images {f} --backbone nothing",
        "--features {d}",
    ],
)
def test_bad_input_is_one_line_and_leaves_no_head(options: str, features: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(features.read_bytes()[:200])
    result = invoke(f"{options.format(f=features, d=damaged)} --out {tmp_path / 'out'}")
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.output
    assert not (tmp_path / "out" / "head.safetensors").exists()


def test_labels_are_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.zeros((9, 4)), y=np.zeros(9))
    result = invoke(f"--features {tmp_path / 'f.npz'} --rank 2 --out {tmp_path / 'out'}")
    assert result.exit_code == 2 and "labels must be integers" in result.stderr
