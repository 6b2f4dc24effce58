"""A run that was killed, shared out or stopped by bad figures: the trainer's promises beyond its steps."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")
pytest.importorskip("tensorboardX")

from forked import FORKED, leave, start  # noqa: E402
from torch import nn  # noqa: E402

from mumoe_tensor.nn import MuMoEMLP, parameter_groups  # noqa: E402
from mumoe_tensor.training import DamagedCheckpoint, Dataset, TrainConfig, train  # noqa: E402
from mumoe_tensor.training.checkpoint import Checkpoints  # noqa: E402
from mumoe_tensor.training.trainer import _accelerator  # noqa: E402

CONFIG = TrainConfig(
    epochs=3,
    batch_size=16,
    learning_rate=0.02,
    final_learning_rate=0.001,
    evaluate_every=3,
    checkpoint_every=2,
)

#: A checkpoint each step, so that many are cut off in the middle of one.
KILLED = replace(CONFIG, steps=15, checkpoint_every=1)
STOPS = replace(CONFIG, steps=10)


def clouds(rows: int = 160, seed: int = 0) -> Dataset:
    """Three classes around three points."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (rows,), generator=generator)
    return Dataset(3 * torch.eye(3)[y] + torch.randn(rows, 3, generator=generator), y)


def model(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    block = MuMoEMLP(3, 8, 3, (4, 2), "tr", (2, 2, 2, 3), dropout=dropout)
    nn.init.normal_(block.gate.weight)
    return nn.Sequential(block, nn.Linear(3, 3))


def state_of(net: Any) -> Any:
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# ---- killed and run again --------------------------------------------------------------------------------


def trained(folder: Path) -> None:
    """Train, in a process of its own."""
    torch.set_num_threads(1)
    net = model(dropout=0.2)
    train(net, clouds(), clouds(seed=1), KILLED, folder=folder)
    torch.save(net.state_dict(), folder / "ended.pt")


def in_a_child(target: Any, folder: Path, from_step: int | None = None, delay: float = 0) -> bool:
    """Call something in a process of its own; kill it so long after a step. Whether it was killed."""
    child = FORKED.Process(target=target, args=(folder,))
    child.start()
    written = Checkpoints(folder / "checkpoints")
    while from_step is not None and child.is_alive() and max(written.steps, default=0) < from_step:
        time.sleep(0.001)
    if from_step is not None:
        time.sleep(delay)
        child.kill()
    child.join(300)
    return child.exitcode == -signal.SIGKILL


def test_killed_at_random_and_run_again_it_ends_the_same(tmp_path: Path) -> None:
    in_a_child(trained, tmp_path / "whole")
    expected = torch.load(tmp_path / "whole" / "ended.pt", weights_only=True)
    draw = random.Random(0)
    killed = 0
    for k in range(6):
        folder = tmp_path / str(k)
        killed += in_a_child(trained, folder, draw.randrange(11), draw.uniform(0, 0.05))
        in_a_child(trained, folder)
        assert equal(torch.load(folder / "ended.pt", weights_only=True), expected)
        assert metrics_of(folder) == metrics_of(tmp_path / "whole")
        assert not list((folder / "checkpoints").glob(".*"))
    assert killed >= 3


def metrics_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def stop_after(step: int, data: Dataset) -> Any:
    """Data that give up before the batch of a step is made."""

    class Stops(Dataset):
        def batch(self, rows: Any) -> Any:
            seen.append(len(rows))
            if len(seen) > step:
                raise KeyboardInterrupt
            return super().batch(rows)

    seen: list[int] = []
    return Stops(data.x, data.y)


@pytest.mark.parametrize(("step", "structured"), [(1, False), (5, False), (10, True), (29, False)])
def test_interrupted_at_any_step_it_resumes_to_the_same(step: int, structured: bool, tmp_path: Path) -> None:
    config = replace(CONFIG, structured_rates=structured)
    expected = model(0.2)
    history = train(expected, clouds(), clouds(seed=1), config)
    with pytest.raises(KeyboardInterrupt):
        train(model(0.2), stop_after(step, clouds()), clouds(seed=1), config, folder=tmp_path)
    net = model(0.2)
    resumed = train(net, clouds(), clouds(seed=1), config, folder=tmp_path)
    assert equal(state_of(net), state_of(expected))
    assert [replace(e, seconds=0) for e in resumed] == [replace(e, seconds=0) for e in history]


def test_structured_rates_are_those_of_parameter_groups() -> None:
    config = replace(
        CONFIG, steps=1, warmup=0, weight_decay=0.0, clip=None, keep="last", structured_rates=True
    )
    net = model()
    groups = parameter_groups(net, config.learning_rate)
    before = [[parameter.detach().clone() for parameter in group["params"]] for group in groups]
    data = clouds(rows=16)
    train(net, data, data, config)
    # Adam's first step changes an entry by its learning rate.
    for group, old in zip(groups, before, strict=True):
        changes = [(new - each).abs().max() for new, each in zip(group["params"], old, strict=True)]
        assert max(changes).item() == pytest.approx(group["lr"], rel=1e-3)
    assert len({group["lr"] for group in groups}) > 2


def test_what_a_run_leaves(tmp_path: Path) -> None:
    history = train(model(), clouds(), clouds(seed=1), CONFIG, folder=tmp_path)
    assert [e.step for e in history] == list(range(3, 31, 3))
    assert history[3].epoch == 2 and history[-1].epoch == 3
    assert [int(row["step"]) for row in metrics_of(tmp_path)] == [e.step for e in history]
    assert Checkpoints(tmp_path / "checkpoints").steps == [28, 30]
    assert any((tmp_path / "tensorboard").iterdir())
    # What is done is not done again.
    net = model()
    again = train(net, clouds(), clouds(seed=1), CONFIG, folder=tmp_path)
    assert again == history
    earlier = train(net, clouds(), clouds(seed=1), CONFIG, folder=tmp_path, from_step=28)
    assert earlier[:-1] == history[:-1] and earlier[-1].loss == history[-1].loss


def test_another_config_does_not_resume(tmp_path: Path) -> None:
    short = replace(CONFIG, steps=4)
    train(model(), clouds(), clouds(seed=1), short, folder=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate, steps .* was 0.02, 4"):
        other = replace(short, steps=8, learning_rate=0.1)
        train(model(), clouds(), clouds(seed=1), other, folder=tmp_path)
    train(model(), clouds(), clouds(seed=1), replace(short, workers=1), folder=tmp_path)


def test_a_checkpoint_of_a_version_with_fewer_settings(tmp_path: Path) -> None:
    short = replace(CONFIG, steps=4)
    history = train(model(), clouds(), clouds(seed=1), short, folder=tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, best, progress = checkpoints.read(4)
    del progress["config"]["structured_rates"]
    checkpoints.write(4, state, best, progress)
    assert train(model(), clouds(), clouds(seed=1), short, folder=tmp_path) == history


# ---- what stops it ---------------------------------------------------------------------------------------


class Turns(nn.Module):
    """Gives NaN from some call in training on."""

    def __init__(self, calls: int):
        super().__init__()
        self.left = calls

    def forward(self, x: Any) -> Any:
        self.left -= self.training
        return x * (float("nan") if self.left < 0 else 1.0)


def test_a_loss_that_is_not_finite_names_step_layer_and_checkpoint(tmp_path: Path) -> None:
    net = nn.Sequential(model(), nn.Sequential(nn.Identity(), Turns(5)), nn.Identity())
    with pytest.raises(
        FloatingPointError, match=r"nan in step 6, .* layer 1\.1; .*step 4, .*00000004"
    ) as actual:
        train(net, clouds(), clouds(seed=1), CONFIG, folder=tmp_path)
    assert "\n" not in str(actual.value)
    assert Checkpoints(tmp_path / "checkpoints").steps == [2, 4]
    with torch.no_grad():
        net[0][1].bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"step 1, .* parameter 0\.1\.bias is not finite\.$"):
        train(net, clouds(), clouds(seed=1), CONFIG)
    bad = Dataset(clouds().x * float("inf"), clouds().y)
    with pytest.raises(FloatingPointError, match="the inputs are not finite"):
        train(model(), bad, clouds(seed=1), CONFIG)


def test_a_gradient_that_is_not_finite_names_the_parameter() -> None:
    net = model()

    def loss(logits: Any, y: Any) -> Any:
        return nn.functional.cross_entropy(logits, y) + (net[1].bias[0] - net[1].bias[0].detach()).sqrt()

    with pytest.raises(FloatingPointError, match=r"gradients .* those of 1\.bias are not, in step 1"):
        train(net, clouds(), clouds(seed=1), CONFIG, loss=loss)


def test_a_damaged_checkpoint_names_the_layer_and_the_last_good_one(tmp_path: Path) -> None:
    def resume(**options: Any) -> Any:
        return train(model(), clouds(), clouds(seed=1), CONFIG, folder=tmp_path, **options)

    train(model(), clouds(), clouds(seed=1), CONFIG, folder=tmp_path)
    kept = Checkpoints(tmp_path / "checkpoints")
    path = kept.path(30)
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    where = json.loads(content[8:begin])["model/1.weight"]["data_offsets"][0]
    content[begin + where] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"step 30, .*model/1\.weight .*good checkpoint .*step 28"):
        resume()
    path.write_bytes(content[:-5])
    with pytest.raises(DamagedCheckpoint, match=r"step 30, .*cannot be read.*good checkpoint .*step 28"):
        resume()
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint of step 3 .*step 28"):
        resume(from_step=3)
    assert resume(from_step=28)[-1].step == 30
    for step in kept.steps:
        kept.path(step).unlink()
    with pytest.raises(DamagedCheckpoint, match=r"must have a checkpoint to resume from"):
        resume()


def test_a_step_to_resume_from_needs_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint of step 3 .*there is no good checkpoint"):
        train(model(), clouds(), clouds(seed=1), CONFIG, folder=tmp_path, from_step=3)
    assert not list(tmp_path.rglob("*.*"))


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (".step-00000001.safetensors.a1b2", "note.txt", ".hidden"):
        (folder / name).write_text("half")
    train(model(), clouds(), clouds(seed=1), replace(CONFIG, steps=2), folder=tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [".hidden", "note.txt", "step-00000002.safetensors"]


@pytest.mark.parametrize("change", [None, {"step": "2"}, {"evaluations": [{}]}, {"config": 3}, {"bogus": 1}])
def test_how_far_a_run_is_must_be_said_in_the_checkpoint(change: Any, tmp_path: Path) -> None:
    train(model(), clouds(), clouds(seed=1), replace(CONFIG, steps=2), folder=tmp_path)
    kept = Checkpoints(tmp_path / "checkpoints")
    if change is None:  # a file of tensors without a description
        from safetensors.torch import save_file

        save_file({"model/1.weight": torch.ones(2)}, kept.path(2))
    else:
        state, best, progress = kept.read(2)
        kept.write(2, state, best, progress | change)
    with pytest.raises(DamagedCheckpoint, match=r"step 2, .*00000002\.safetensors, cannot be read: "):
        train(model(), clouds(), clouds(seed=1), replace(CONFIG, steps=2), folder=tmp_path)


class Fills(Dataset):
    """Data in the sixth batch of which the disk becomes full: files may not grow any more."""

    def batch(self, rows: Any) -> Any:
        resource = pytest.importorskip("resource")
        CALLS.append(len(rows))
        if len(CALLS) == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        return super().batch(rows)


CALLS: list[int] = []


def filling(folder: Path) -> None:
    """Train until the disk is full, in a process of its own."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Compiled modules would be cut off too, and be there for others.
    sys.dont_write_bytecode = True
    data = clouds()
    try:
        train(model(), Fills(data.x, data.y), clouds(seed=1), STOPS, folder=folder)
    except OSError as error:
        (folder / "said.txt").write_text(str(error))


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="this system has no limit on the size of files")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    in_a_child(filling, tmp_path)
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith("the checkpoint of step 6 could not be written") and "from step 4, " in said
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002.safetensors",
        "step-00000004.safetensors",
    ]
    expected = model()
    train(expected, clouds(), clouds(seed=1), STOPS)
    net = model()
    train(net, clouds(), clouds(seed=1), STOPS, folder=tmp_path)
    assert equal(state_of(net), state_of(expected))


# ---- shared out ------------------------------------------------------------------------------------------

SHARED = {
    "plain": CONFIG,
    "accumulated": replace(CONFIG, accumulation=2, steps=12),
    "mixed up": replace(CONFIG, mixup=0.5, accumulation=2, steps=12, keep="last"),
}


def doubled(*arguments: Any, **options: Any) -> Dataset:
    """In float64, so that training does not make anything of rounding."""
    data = clouds(*arguments, **options)
    return Dataset(data.x.double(), data.y)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    from mumoe_tensor.training.processes import processes

    assert processes().num_processes == 2
    for name, config in SHARED.items():
        net = model().double()
        # An odd number of rows: the last batch cannot be shared out evenly.
        history = train(net, doubled(), doubled(33, seed=1), config, folder=Path(folder, name))
        if rank == 0:
            torch.save(net.state_dict(), Path(folder, f"{name}.pt"))
            Path(folder, f"{name}.json").write_text(
                json.dumps([[e.loss, e.validation_loss, e.accuracy] for e in history])
            )
    # Two processes go on where one was stopped.
    net = model().double()
    train(net, doubled(), doubled(33, seed=1), CONFIG, folder=Path(folder, "alone"))
    if rank == 0:
        torch.save(net.state_dict(), Path(folder, "alone.pt"))
    leave()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(
            model().double(),
            stop_after(20, doubled()),
            doubled(33, seed=1),
            CONFIG,
            folder=tmp_path / "alone",
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(worker, port, str(tmp_path))
    for name, config in SHARED.items():
        net = model().double()
        history = train(net, doubled(), doubled(33, seed=1), config)
        for other in [name, "alone"] if name == "plain" else [name]:
            actual = torch.load(tmp_path / f"{other}.pt", weights_only=True)
            for key, value in net.state_dict().items():
                torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9)
        figures = json.loads((tmp_path / f"{name}.json").read_text())
        assert np.allclose(figures, [[e.loss, e.validation_loss, e.accuracy] for e in history], rtol=1e-9)


def test_each_run_of_a_process_has_its_own_precision() -> None:
    used = [_accelerator(replace(CONFIG, precision=name)).mixed_precision for name in ("bf16", "no", "bf16")]
    assert used == ["bf16", "no", "bf16"]
