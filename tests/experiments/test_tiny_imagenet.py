"""Heads on Tiny-ImageNet: runs are those of the protocol; images, labels and tables are read as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import torch
from ledgers import ledger_of

from mumoe_tensor.training.images import ImageFiles, Scaled
from paper_figures.experiments import faces, tiny_imagenet
from paper_figures.experiments.embeddings import SIZE
from paper_figures.experiments.heads import Dataset
from paper_figures.experiments.tiny_imagenet import LINEAR, Run


def test_runs_are_those_of_the_protocol() -> None:
    runs = tiny_imagenet.runs()
    # Dense heads; one and two levels of six kinds; large ones; gates and norms beyond the first; nulls.
    assert len(runs) == len(set(runs)) == 5 * (3 + 6 * 7 + 3 + 8 + 6)
    few = Dataset(torch.randn(300, 352), torch.arange(300) % 200)
    for run in runs[: len(runs) // 5]:
        count = sum(p.numel() for p in run.build(few).parameters())
        if run.format == "hadamard":
            assert 74_000 < count < 145_000
        elif run.gate in tiny_imagenet.NULLS:
            assert count < LINEAR
        else:
            assert count == pytest.approx(run.parameters, rel=0.04), run


def test_a_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    y = torch.arange(800) % 8
    x = torch.randn(800, 24, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(24)[y]
    data = Dataset(x, y)
    for name, value in {"parts": lambda: (data, data), "test_rows": lambda: data, "CLASSES": 8}.items():
        monkeypatch.setattr(tiny_imagenet, name, value)
    monkeypatch.setattr(tiny_imagenet, "TABLES", tmp_path)
    monkeypatch.setattr(tiny_imagenet, "class_names", lambda: [f"class {k}" for k in range(8)])
    monkeypatch.setattr(tiny_imagenet, "GATE_AT", (16,))
    monkeypatch.setitem(tiny_imagenet.FORMATS, "cp", ("cp", 2000))
    threads = torch.get_num_threads()
    try:
        row = tiny_imagenet.test(Run("cp", (16,)), 0.03)
        null = tiny_imagenet.test(Run("cp", (16,), "nearest_centres", "none"), 0.03)
        dense = tiny_imagenet.test(Run("dense"), 0.03)
    finally:
        torch.set_num_threads(threads)
    assert row["accuracy"] > 0.9 and null["accuracy"] > 0.9 and dense["accuracy"] > 0.5
    assert row["polysemanticity"] < row["polysemanticity_random"] and null["active"] == 0.5
    assert list(row) and {*row} == {*dense} and dense["polysemanticity"] is None
    with np.load(tmp_path / "tiny_imagenet_map.npz") as file:
        assert file["coefficients"].shape == (8, 16) and file["classes"][3] == "class 3"
        np.testing.assert_allclose(file["coefficients"].sum(1), 1, atol=1e-5)


def test_claims_are_differences_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    columns = ("accuracy", "polysemanticity", "polysemanticity_random", "entropy", "dead")
    rows = [{**run.key, **{name: draw.random() for name in columns}} for run in tiny_imagenet.runs()]
    monkeypatch.setattr(tiny_imagenet, "table", lambda name: ledger_of(rows[::-1]))
    differences = {row["difference"]: row for row in tiny_imagenet.claims()}

    def values(column: str, **key: Any) -> Any:
        return np.array([row[column] for row in rows if key.items() <= row.items()])

    plain = {"gate": "entmax15", "gate_norm": "batch"}
    one = values("accuracy", format="cp", experts="64x64", **plain)
    dense = values("accuracy", format="dense", budget=LINEAR)
    assert differences["accuracy in %, cp of 64x64 experts - dense"]["mean"] == pytest.approx(
        100 * (one - dense).mean()
    )
    trained = values("polysemanticity", format="cp", experts="128", **plain)
    null = values("polysemanticity", format="cp", experts="128", gate="nearest_centres", gate_norm="none")
    row = differences["polysemanticity of 128 experts, trained - nearest_centres gate"]
    assert row["mean"] == pytest.approx((trained - null).mean()) and row["seeds"] == 5


def test_images_and_their_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    monkeypatch.setattr(tiny_imagenet, "FOLDER", tmp_path)
    for name, grey in (("n02", 200), ("n01", 50)):
        (tmp_path / "train" / name / "images").mkdir(parents=True)
        Image.new("L", (8, 8), grey).save(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
    (tmp_path / "val" / "images").mkdir(parents=True)
    Image.new("L", (8, 8), 200).save(tmp_path / "val" / "images" / "val_0.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t8\t8\n")
    (tmp_path / "words.txt").write_text("n01\tcat, true cat\nn02\tdog\nn03\tfox\n")
    training, test = tiny_imagenet.images("training"), tiny_imagenet.images("test")
    assert [label for _, label in training] == [0, 1] and [label for _, label in test] == [1]
    assert tiny_imagenet.class_names() == ["cat", "dog"]
    x, _ = ImageFiles(test, Scaled(SIZE)).batch([0])
    assert x.shape == (1, 3, SIZE, SIZE) and x.mean() == pytest.approx(200 / 255, abs=0.01)


def test_labels_of_faces() -> None:
    names = ["49_0_2_1.jpg", "50_1_0_2.jpg", "7_1_1_3.jpg"]
    assert faces.labels([Path(name) for name in names]) == ([0, 1, 0], [1, 0, 0])
    with pytest.raises(ValueError, match="must be named AGE_GENDER_…, got x_0_1"):
        faces.labels([Path("x_0_1.jpg")])
