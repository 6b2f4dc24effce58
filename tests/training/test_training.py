"""The readers read what is there and refuse the rest; the trainer trains, stops early and repeats itself."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoE  # noqa: E402
from mumoe_tensor.training import (  # noqa: E402
    Dataset,
    TrainConfig,
    digits,
    evaluate,
    read_idx,
    read_npz,
    read_text,
    split,
    train,
)

# ---- data ------------------------------------------------------------------------------------------------


def idx(array: Any, code: int = 0x08) -> bytes:
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_digits() -> None:
    pytest.importorskip("sklearn")
    data = digits()
    assert (len(data), data.x.shape, data.classes) == (1797, (1797, 64), 10)
    assert data.x.dtype == torch.float32 and data.y.dtype == torch.int64
    assert (float(data.x.min()), float(data.x.max())) == (0, 1)


def test_npz(tmp_path: Path) -> None:
    x, y = np.random.rand(5, 3), np.array([0, 2, 1, 0, 1])
    np.savez(tmp_path / "d.npz", x=x, y=y)
    data = read_npz(tmp_path / "d.npz")
    np.testing.assert_allclose(data.x, x, rtol=1e-6)
    assert data.y.tolist() == y.tolist() and data.classes == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((2, 3))}, "arrays x and y"),
        ({"x": np.ones((2, 3)), "y": np.array([0, 1, 1])}, "one label for each"),
        ({"x": np.ones((2, 3)), "y": np.array([0.0, 1.0])}, "must be integers"),
        ({"x": np.ones((2, 3)), "y": np.array([0, -1])}, "labels must be from 0"),
        ({"x": np.array([[1.0, np.nan]]), "y": np.array([0])}, "must be finite"),
        ({"x": np.ones((0, 3)), "y": np.array([], dtype=int)}, "data must have at least one input"),
    ],
)
def test_npz_that_is_refused(arrays: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_npz(tmp_path / "d.npz")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{}], dtype=object), y=np.array([0]))
    with pytest.raises(ValueError, match="real numbers, got an array of object"):
        read_npz(tmp_path / "d.npz")


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(zipped: bool, tmp_path: Path) -> None:
    images = np.random.randint(0, 256, (4, 3, 2), dtype=np.uint8)
    labels = np.array([1, 0, 3, 2], dtype=np.uint8)
    paths = []
    for name, array in (("images", images), ("labels", labels)):
        paths.append(tmp_path / (f"{name}.gz" if zipped else name))
        paths[-1].write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    data = read_idx(*paths)
    np.testing.assert_allclose(data.x, images / 255, rtol=1e-6)
    assert data.y.tolist() == [1, 0, 3, 2]


def test_idx_of_other_types(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(idx(np.array([[0.5, 1]]).astype(">f4"), 0x0D))
    (tmp_path / "y").write_bytes(idx(np.array([7]).astype(">i4"), 0x0C))
    data = read_idx(tmp_path / "x", tmp_path / "y")
    assert data.x.tolist() == [[0.5, 1]] and data.y.tolist() == [7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "two zero bytes"),
        (b"PK\x03\x04", "two zero bytes"),
        (b"\0\0\x08\x02\0\0", "header of 2 axes must have 12 bytes"),
        (idx(np.zeros(5, dtype=np.uint8))[:-1], "must have 13 bytes"),
        (idx(np.zeros(5, dtype=np.uint8)) + b"\0", "must have 13 bytes"),
    ],
)
def test_idx_that_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "x", tmp_path / "x")


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(idx(np.zeros(500, dtype=np.uint8)), mtime=0)[:-9]]
)
def test_idx_that_is_not_gzipped(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match="must be a complete gzip file"):
        read_idx(tmp_path / "x.gz", tmp_path / "x.gz")


def test_text(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("Wherefore – art", encoding="utf-8")
    assert read_text(tmp_path / "t") == "Wherefore – art"
    (tmp_path / "t").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        read_text(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        read_text(tmp_path / "t")


def test_split_parts_all_rows() -> None:
    data = Dataset(torch.arange(10.0)[:, None], torch.arange(10))
    first, second = split(data, 0.3, seed=1)
    assert (len(first), len(second)) == (7, 3)
    assert sorted(torch.cat([first.y, second.y]).tolist()) == list(range(10))
    assert torch.equal(first.x[:, 0].long(), first.y)
    assert torch.equal(split(data, 0.3, seed=1)[1].y, second.y)
    assert not torch.equal(split(data, 0.3, seed=2)[1].y, second.y)
    for share in (0.0, 1.0, 0.01):
        with pytest.raises(ValueError, match="both parts"):
            split(data, share)


# ---- training --------------------------------------------------------------------------------------------


def clouds(rows: int = 400, seed: int = 0) -> Dataset:
    """Three classes around three points."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    return Dataset(3 * torch.eye(3)[y] + torch.randn(rows, 3, generator=generator), y)


def model() -> Any:
    torch.manual_seed(0)
    return MuMoE(3, 3, 8, rank=4)


def test_training_learns() -> None:
    net = model()
    before = evaluate(net.train(), clouds(seed=1))
    history = train(net, clouds(), clouds(seed=1), TrainConfig(epochs=15, learning_rate=0.02, batch_size=32))
    after = evaluate(net, clouds(seed=1))
    assert before[1] < 0.7 and after[1] > 0.9 and after[0] < before[0]
    assert [e.epoch for e in history] == list(range(1, 16))
    assert not net.training


def test_the_best_epoch_is_kept() -> None:
    net = model()
    history = train(net, clouds(40), clouds(seed=1), TrainConfig(epochs=40, learning_rate=0.1, batch_size=20))
    best = [e for e in history if e.is_best][-1]
    assert best is min(history, key=lambda e: e.validation_loss)
    assert best is not history[-1]
    assert evaluate(net, clouds(seed=1)) == pytest.approx((best.validation_loss, best.accuracy))


def test_early_stopping() -> None:
    config = TrainConfig(epochs=60, learning_rate=0.1, batch_size=20, patience=3)
    history = train(model(), clouds(40), clouds(seed=1), config)
    assert len(history) < 60
    assert [e.is_best for e in history[-4:]] == [True, False, False, False]


def test_a_seed_repeats_and_leaves_the_global_one_alone() -> None:
    states = []
    torch.manual_seed(7)
    expected = torch.rand(3)
    for seed in (0, 0, 1):
        net = nn.Sequential(model(), nn.Dropout(0.3))
        torch.manual_seed(7)
        train(net, clouds(), clouds(seed=1), TrainConfig(epochs=2, batch_size=32, seed=seed))
        assert torch.equal(torch.rand(3), expected)
        states.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_schedule() -> None:
    config = TrainConfig(warmup=0.1)
    factors = [config.factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5) and 0 < factors[-1] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert TrainConfig(warmup=0).factor(0, 10) == 1


def test_the_schedule_and_the_decay_reach_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any) -> Any:
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = TrainConfig(epochs=2, batch_size=40, learning_rate=0.3, weight_decay=0.07, warmup=0.25)
    train(model(), clouds(), clouds(seed=1), config)
    assert [lr for lr, _ in seen] == pytest.approx([0.3 * config.factor(k, 20) for k in range(20)])
    assert {decay for _, decay in seen} == {0.07}


def test_losses_by_their_definition() -> None:
    net, data = model().eval(), clouds(1500)
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(net(data.x), data.y))
        right = float((net(data.x).argmax(-1) == data.y).float().mean())
    assert evaluate(net, data) == pytest.approx((expected, right))
    still = TrainConfig(epochs=2, batch_size=500, learning_rate=1e-12, weight_decay=0)
    linear = nn.Linear(3, 3)
    history = train(linear, data, data, still)
    assert history[0].loss == pytest.approx(evaluate(linear, data)[0], rel=1e-4)


def test_dropout_is_seeded() -> None:
    states = []
    for state in (1, 2):
        net = nn.Sequential(model(), nn.Dropout(0.5))
        torch.manual_seed(state)
        train(net, clouds(), clouds(seed=1), TrainConfig(epochs=1, batch_size=50))
        states.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*states)


def test_an_equal_loss_is_no_better() -> None:
    net = nn.Linear(3, 3)
    history = train(net.requires_grad_(True), clouds(), clouds(seed=1), TrainConfig(epochs=3), loss=constant)
    assert [e.is_best for e in history] == [True, False, False]


def constant(logits: Any, labels: Any) -> Any:
    return 0 * logits.sum() + 1


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    original = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    data = Dataset(100 * clouds().x, clouds().y)
    for clip in (0.5, None):
        norms.clear()
        train(model(), data, data, TrainConfig(epochs=1, batch_size=32, clip=clip))
        assert (max(norms) <= 0.5 + 1e-4) == (clip is not None)


def test_bad_figures_stop_it() -> None:
    data = clouds()
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(model(), Dataset(data.x * float("inf"), data.y), data, TrainConfig(batch_size=32))
    with pytest.raises(FloatingPointError, match="validation rows"):
        train(model(), data, Dataset(data.x * float("nan"), data.y), TrainConfig(batch_size=32))
    with pytest.raises(ValueError, match="needs at least as many rows"):
        train(model(), clouds(10), data, TrainConfig(batch_size=32))
    for bad in ({"epochs": 0}, {"clip": -1.0}, {"patience": 0}, {"warmup": 1.5}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TrainConfig(**bad)  # type: ignore[arg-type]


def test_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("mumoe_tensor.progress.LINE_SECONDS", 0.0)
    config = TrainConfig(epochs=2, batch_size=100)
    shown = train(model(), clouds(), clouds(seed=1), config, progress=True)
    lines = capsys.readouterr().err.splitlines()
    steps = 2 * (len(clouds()) // 100)
    assert len(lines) == steps and lines[-1] == f"100 % epoch 2, step {steps}"
    hidden = train(model(), clouds(), clouds(seed=1), config)
    assert capsys.readouterr().err == ""
    assert [e.loss for e in shown] == [e.loss for e in hidden]
