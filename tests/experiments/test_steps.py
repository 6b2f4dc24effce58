"""The command line of the experiments, and statistics over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import torch
from torch import nn

from paper_figures.experiments import command, embeddings, rates, tables


def test_differences_are_paired_by_seed() -> None:
    actual = tables.difference({0: 1.0, 1: 3.0, 2: 9.0}, {0: 0.5, 1: 1.5}, unit=2)
    assert actual["mean"] == pytest.approx(2.0) and actual["seeds"] == 2
    assert tables.difference({0: 1.0}, {1: 1.0}) == {"mean": None, "half": None, "seeds": 0}


@pytest.mark.parametrize("error", [ValueError("learning rates must be tried first"), OSError("no such file")])
def test_an_error_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(jobs: int) -> None:
        raise error

    monkeypatch.setattr(rates, "STEPS", {"test": fail})
    with pytest.raises(SystemExit) as stop:
        command.run("rates", ["test"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"python -m paper_figures.experiments.rates: {error}\n"


def test_rows_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(rates, "STEPS", {"claims": lambda: [{"seeds": 0, "mean": None}]})
    command.run("rates", ["claims"])
    assert capsys.readouterr().out.split()[-2:] == ["0", "-"]


def test_features_are_float32_with_the_labels_of_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "efficientnet-lite2").mkdir()
    (tmp_path / "efficientnet-lite2" / "a.pth").touch()
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        image.new("RGB", (8, 8), (80 * number, 0, 0)).save(path)

    def backbone(name: str, weights: Path, size: int) -> Any:
        assert (name, weights.name, size) == ("efficientnet-lite2", "a.pth", embeddings.SIZE)
        return nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setattr(embeddings, "DATA", tmp_path)
    monkeypatch.setattr(embeddings, "load_backbone", backbone)
    data = embeddings.embed(list(zip(paths, (2, 0, 1), strict=True)))
    assert data.x.dtype == torch.float32 and data.x.shape == (3, 2) and data.y.tolist() == [2, 0, 1]
    assert not torch.equal(data.x[0], data.x[1])
