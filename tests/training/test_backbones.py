"""Networks by their names, with weights from files: those of timm, and EfficientNet-Lite0."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mumoe_tensor.models import load_backbone
from mumoe_tensor.training import Dataset, write_npz

SIZE = 160


@pytest.fixture(scope="module")
def timm(torchvision_schemas: None) -> Any:
    return pytest.importorskip("timm")


def warmed(network: nn.Module) -> nn.Module:
    """The network with the statistics of some images in its norms: at first features are all but zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(torch.rand(4, 3, SIZE, SIZE))
    return network.eval()


@pytest.fixture
def saved(timm: Any, tmp_path: Path) -> Any:
    """A model from timm, and its file."""

    def make(name: str, suffix: str = ".safetensors") -> tuple[nn.Module, Path]:
        torch.manual_seed(0)
        network, path = warmed(timm.create_model(name)), tmp_path / f"{name}{suffix}"
        state = network.state_dict()
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save(state, path)
        return network, path

    return make


@pytest.mark.parametrize(("name", "suffix"), [("test_efficientnet", ".pth"), ("test_vit3", ".safetensors")])
def test_features_are_what_the_classifier_of_timm_sees(name: str, suffix: str, saved: Any) -> None:
    network, path = saved(name, suffix)
    backbone, x = load_backbone(name, path, SIZE), torch.rand(3, 3, SIZE, SIZE)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features((x - mean) / std), pre_logits=True)
        actual = backbone(x)
    assert not backbone.training and expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "width"), [("efficientnet-lite0", 320), ("efficientnet-lite2", 352)])
def test_features_are_those_of_the_last_block(name: str, width: int, tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    whole = warmed(package.EfficientNet.from_name(name))
    torch.save(whole.state_dict(), tmp_path / "lite.pth")
    seen: list[Tensor] = []
    whole._conv_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        whole.extract_features((x * 255 - 127) / 128)
        actual = load_backbone(name, tmp_path / "lite.pth")(x)
    assert actual.shape == (2, width) and actual.std() > 0.1
    torch.testing.assert_close(actual, seen[0].mean((2, 3)), rtol=1e-3, atol=1e-5)


# ---- what is refused --------------------------------------------------------------------------------------


def test_names_sizes_and_weights_that_do_not_fit(saved: Any, tmp_path: Path) -> None:
    _, path = saved("test_vit3")
    with pytest.raises(ValueError, match="or a model from timm, got 'nothing'"):
        load_backbone("nothing", path)
    with pytest.raises(ValueError, match=r"scaled to 64, it raises: .*\(160\)"):
        load_backbone("test_vit3", path, 64)
    with pytest.raises(ValueError, match=r"must have the weights of test_efficientnet; .* such as"):
        load_backbone("test_efficientnet", path, SIZE)
    state = load_file(path)
    state["head.bias"] = torch.zeros(7)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"; 1 of its tensors .* such as 'head.bias'"):
        load_backbone("test_vit3", tmp_path / "other.safetensors", SIZE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.safetensors", b"no tensors"),
        ("text.pth", b"no tensors"),
        ("empty.pth", b""),
        ("nested.pth", {"state_dict": {}, "epoch": 3}),
        ("tensor.pth", torch.zeros(3)),
        ("object.pth", {"weight": Path("a")}),
    ],
)
def test_files_that_are_no_weights(name: str, content: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="it must be a complete"):
        load_backbone("test_vit3", path)


# ---- the command ------------------------------------------------------------------------------------------


def invoke(line: str) -> Any:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from mumoe_tensor.cli import app

    return CliRunner().invoke(app, shlex.split(f"train head {line}"))


def test_command_trains_a_model_of_timm_by_its_name(saved: Any, tmp_path: Path) -> None:
    network, path = saved("test_efficientnet")
    y = torch.arange(60) % 2
    x = 0.3 * torch.rand(60, 12, 12)
    x[y == 1, :6] += 0.7
    write_npz(Dataset(x, y), tmp_path / "images.npz")
    line = f"--images {tmp_path / 'images.npz'} --backbone test_efficientnet --weights {path} --size 48 "
    line += "--experts 4 --rank 4 --epochs 6 --batch-size 16 --learning-rate 0.01 --json "
    for trained in ("", "--train-backbone"):
        out = tmp_path / f"out{trained}"
        result = invoke(f"{line} {trained} --out {out}")
        assert result.exit_code == 0 and result.stderr == "", result.stderr
        assert json.loads(result.stdout)["accuracy"] == 1
        assert (out / "backbone.safetensors").exists() == bool(trained)
    kept = load_file(out / "backbone.safetensors")
    weights = {f"network.{key}": value for key, value in network.state_dict().items() if value.ndim == 4}
    assert weights and not any(torch.equal(kept[key], value) for key, value in weights.items())
    assert json.loads(invoke(f"{line} --train-backbone --out {out}").stdout)["trained"] is False
    refused = invoke(f"{line} --out {out}")
    assert refused.exit_code == 2 and "a run with other settings" in refused.stderr
    assert load_file(out / "backbone.safetensors").keys() == kept.keys()
    wrong = invoke(f"{line.replace('--size 48', '--size 0')} --out {tmp_path / 'none'}")
    assert wrong.exit_code == 2 and wrong.stderr.count("\n") == 1 and not (tmp_path / "none").exists()
