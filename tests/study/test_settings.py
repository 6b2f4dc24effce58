"""What a study is asked for is checked, kept, and read again."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor import study as studies
from mumoe_tensor.study.quality import train_and_evaluate


def test_defaults() -> None:
    chosen = studies.prepare()
    assert chosen.layer.spec == studies.dense(768, 768, hidden=3072)
    assert chosen.experts == ((256,),) and chosen.formats[:-1] == tuple(mt.formats())
    assert len(mt.get_format(json.loads(chosen.formats[-1])).summands(1)) == 2
    assert chosen.parameters == ("match", "0.5x")
    assert chosen.batch == 512 and chosen.data == "digits" and chosen.head_hidden == 128
    quick = studies.prepare(quick=True)
    assert quick.experts == ((256,),) and quick.batch == 32 and quick.head_experts == ((8,),)
    assert studies.prepare(quick=True, batch=64).batch == 64


def test_published_layers() -> None:
    for name, layer in studies.LAYERS.items():
        planned = studies.plan(studies.prepare(name, formats=["cp"], data="none"))
        dense = layer.spec.dense_parameters
        assert {subject.budget for subject in planned.subjects} == {0, dense, round(dense / 2)}
    assert str(studies.LAYERS["clip-head"]) == "CLIP ViT-B/32 head, 768 → 1000"


def test_heads_on_other_data_are_those_on_the_digits(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.touch()
    chosen = studies.prepare("clip-head", experts=[16, (4, 4)], data=path)
    assert chosen.head_hidden == 128 and chosen.head_experts == ((8,), (32,))
    assert studies.prepare("clip-head", data=path, head_hidden=0).head_hidden == 0


def write(path: Path, rows: int, features: int, classes: int, *, constant: bool = False) -> Path:
    """Clusters of Gaussians, or inputs that are all the same."""
    draw = np.random.default_rng(0)
    y = np.arange(rows) % classes
    x = draw.normal(size=(classes, features))[y] + draw.normal(size=(rows, features))
    np.savez(path, x=np.ones_like(x) if constant else x, y=y)
    return path


@pytest.mark.parametrize(
    ("rows", "features", "classes", "constant"),
    [
        (2000, 64, 20, False),
        (3000, 512, 100, False),
        (60, 16, 2, False),
        (60, 2, 2, False),
        (300, 16, 2, True),
    ],
)
def test_heads_have_ordinary_data_without_further_options(
    rows: int, features: int, classes: int, constant: bool, tmp_path: Path
) -> None:
    data = write(tmp_path / "x.npz", rows, features, classes, constant=constant)
    setting = studies.prepare("clip-head", data=data, epochs=2)
    planned = studies.plan(setting)
    assert "cp" in {subject.name for subject in planned.heads}
    figures, _ = train_and_evaluate(
        setting, next(subject for subject in planned.heads if subject.name == "cp"), 0
    )
    assert all(isfinite(figures[name]) for name in ("accuracy", "loss", "training time"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": studies.Layer("Own", 8, 4)}, "in_features is 8, .*x.npz has 16 features"),
        ({"head_hidden": 0, "head_experts": 64}, "some head of experts must fit its budget; a larger budget"),
        ({"batch_size": 49}, "at most the 48 rows for training; got 49"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"data": "nothing.npz"}, "there is no file 'nothing.npz'"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_measured(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "x.npz", 60, 16, 2)
    with pytest.raises(ValueError, match=message):
        studies.plan(studies.prepare(**{"layer": "clip-head", "data": data} | options))


def test_a_setting_comes_back_from_its_file(tmp_path: Path) -> None:
    chosen = studies.prepare(
        "clip-head", experts=[16, (4, 4)], parameters="0.5x", formats=["tr", "cp"], seed=4
    )
    path = tmp_path / "study.json"
    path.write_text(chosen.to_json())
    assert studies.Setting.from_json(path) == chosen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": None}, r"study\.json: layer: Field required"),
        ({"bogus": 3}, "bogus: Unexpected keyword argument"),
        ({"batch": "32"}, "batch: .*integer, got '32'"),
        ({"batch": 0}, "batch must be positive, got 0"),
    ],
)
def test_a_file_that_is_no_setting_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    entries = json.loads(studies.prepare().to_json()) | change
    path = tmp_path / "study.json"
    path.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        studies.Setting.from_json(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "gpt5"}, "layer must be one of 'gpt2-mlp'.*got 'gpt5'"),
        ({"formats": ["nope"]}, "unknown format 'nope'"),
        ({"experts": [0]}, "must be positive"),
        ({"parameters": "some"}, "got 'some'"),
        ({"head_parameters": ["1.x.x"]}, "got '1.x.x'"),
        ({"batch": 1}, "at least 2, for batch norm in training"),
        ({"batches": [0]}, "every entry of batches must be positive, got 0"),
        ({"seconds": 0}, "seconds must be positive and finite, got 0"),
        ({"memory": -1}, "memory must be positive and finite, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"seeds": 0}, "seeds must be positive, got 0"),
        ({"head_hidden": -1}, "head_hidden must not be negative, got -1"),
        ({"head_experts": []}, "at least one entry of head_experts"),
        ({"experts": []}, "at least one entry of experts"),
        ({"experts": 0}, "must be positive"),
        ({"formats": []}, "at least one entry of formats"),
        ({"parameters": []}, "at least one entry of parameters"),
        ({"inputs": "x.npy"}, "inputs and transposed can only be used with a weight"),
        ({"transposed": True}, "inputs and transposed can only be used with a weight"),
        ({"machines": ["tpu"]}, "machine must be .*'h200'.*got 'tpu'"),
        ({"sweeps": 0}, "sweeps must be positive, got 0"),
        ({"devices": ["tpu"]}, "one of 'cpu', 'cuda', got 'tpu'"),
        ({"layer": ""}, "layer must be one of 'gpt2-mlp', .*, got ''"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        studies.prepare(**options)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="a study has no setting 'colour'"):
        studies.prepare(colour="red")


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="there is none"):
        studies.plan(studies.prepare(devices=["cuda"]))
    assert studies.prepare().devices == studies.prepare(devices=["cpu", "cpu"]).devices == ("cpu",)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert studies.prepare().devices == ("cpu", "cuda")


def test_a_budget_no_format_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="some format must fit the budget"):
        studies.plan(studies.prepare(parameters=10, formats=["cp", "tr"], data="none"))


def test_sizes_of_a_layer_are_positive() -> None:
    with pytest.raises(ValueError, match="hidden must be positive, got 0"):
        studies.dense(3, 2, hidden=0)
    with pytest.raises(ValueError, match="in_features must be positive, got 0"):
        studies.Layer("Other", 0, 2)
