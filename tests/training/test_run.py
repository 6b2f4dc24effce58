"""A run: the folder it leaves, that it is done once, goes on after an interruption, and is never mixed up."""

from __future__ import annotations

import csv
import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
for package in ("accelerate", "safetensors", "tensorboardX"):
    pytest.importorskip(package)

from forked import start  # noqa: E402

from mumoe_tensor.models import GPT2, GPT2Config, Mixer, MixerConfig, load_model  # noqa: E402
from mumoe_tensor.training import DamagedCheckpoint, TrainConfig, evaluate  # noqa: E402
from mumoe_tensor.training import run as module  # noqa: E402
from mumoe_tensor.training.images import ImageData  # noqa: E402
from mumoe_tensor.training.processes import processes  # noqa: E402
from mumoe_tensor.training.run import run  # noqa: E402
from mumoe_tensor.training.settings import GPT2Run, MixerRun  # noqa: E402
from mumoe_tensor.training.tokens import TokenData, Tokens  # noqa: E402

SHORT = TrainConfig(epochs=3, batch_size=16, learning_rate=0.03)
FILES = ["checkpoints", "config.json", "metrics.csv", "model.safetensors", "tensorboard"]


@pytest.fixture
def mixer(tmp_path: Path) -> MixerRun:
    """Images that are bright in one of three rows of patches."""
    y = np.arange(80) % 3
    x = np.random.default_rng(0).random((80, 6, 6))
    x[np.arange(80)[:, None], 2 * y[:, None] + np.arange(2)] += 3
    np.savez(tmp_path / "images.npz", x=x / 4, y=y)
    model = MixerConfig(
        image_size=6, patch=2, width=8, depth=2, token_hidden=8, channel_hidden=16, classes=3, format="cp",
        experts=(2,), token_rank=(3,),
    )  # fmt: skip
    return MixerRun(ImageData(str(tmp_path / "images.npz"), validation=0.2), model, SHORT)


@pytest.fixture
def gpt2(tmp_path: Path) -> GPT2Run:
    """A text that repeats itself every five tokens."""
    for part in ("training", "validation"):
        (np.arange(700) % 5).astype("<u2").tofile(tmp_path / f"{part}.bin")
    model = GPT2Config(vocabulary=6, context=8, width=16, depth=1, heads=2, hidden=32, dropout=0.1)
    data = TokenData(str(tmp_path / "training.bin"), str(tmp_path / "validation.bin"))
    return GPT2Run(data, model, SHORT)


def weights(folder: Path) -> dict[str, Any]:
    return load_model(folder / "model.safetensors").state_dict()


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in {*first, *second})


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without those that are not yet in their place."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {name.as_posix(): path.read_bytes() for name, path in files.items() if ".new" not in name.parts}


@contextmanager
def interrupted(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run on tokens is interrupted at a step."""
    calls = 0
    batch = Tokens.batch

    def counted(self: Any, rows: Any) -> Any:
        nonlocal calls
        calls += len(rows) == SHORT.batch_size
        if calls == step:
            raise KeyboardInterrupt
        return batch(self, rows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Tokens, "batch", counted)
        yield


# ---- what a run leaves ------------------------------------------------------------------------------------


def test_a_run_of_a_mixer(mixer: MixerRun, tmp_path: Path) -> None:
    out, state = tmp_path / "out", torch.random.get_rng_state()
    actual = run(mixer, out)
    assert torch.equal(state, torch.random.get_rng_state())
    model = load_model(out / "model.safetensors")
    assert isinstance(model, Mixer) and model.config.token_rank == (3,)
    assert actual["parameters"] == sum(p.numel() for p in model.parameters())
    assert actual["ranks"] == {"token_rank": [3], "channel_rank": list(model.config.channel_rank or ())}
    assert (actual["steps"], actual["trained"]) == (12, True) and actual["seconds"] > 0
    # The figures are those of the model that was left, and it has learnt something.
    loss, accuracy = evaluate(model, mixer.read_data()[1])
    assert (loss, accuracy) == pytest.approx((actual["validation_loss"], actual["accuracy"]), rel=1e-5)
    assert accuracy > 0.6
    assert sorted(path.name for path in out.iterdir()) == FILES
    written = json.loads((out / "config.json").read_text())
    settings = written["settings"]
    assert settings["kind"] == "mixer" and settings["model"]["token_rank"] == [3]
    assert settings["train"]["learning_rate"] == 0.03 and settings["data"]["validation"] == 0.2
    assert written["model"]["parameters"] == actual["parameters"]
    with (out / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["step"] for line in lines] == ["4", "8", "12"]
    assert any((out / "tensorboard").iterdir())


def test_a_run_of_a_gpt2(gpt2: GPT2Run, tmp_path: Path) -> None:
    actual = run(gpt2, tmp_path / "out")
    model = load_model(tmp_path / "out" / "model.safetensors")
    assert isinstance(model, GPT2) and actual["ranks"] == {"rank": None}
    # 87 windows of 8 tokens and the next are 5 batches of 16, thrice.
    assert actual["steps"] == 15 and actual["accuracy"] > 0.9
    assert evaluate(model, gpt2.read_data()[1])[0] == pytest.approx(actual["validation_loss"], rel=1e-5)


def test_the_first_weights_are_those_of_the_seed(mixer: MixerRun, tmp_path: Path) -> None:
    def trained(seed: int, name: str) -> dict[str, Any]:
        run(replace(mixer, train=replace(SHORT, epochs=1, seed=seed)), tmp_path / name)
        return weights(tmp_path / name)

    torch.manual_seed(5)
    first = trained(1, "a")
    torch.manual_seed(6)
    assert same(first, trained(1, "b")) and not same(first, trained(2, "c"))


def test_figures_and_weights_are_of_the_best_evaluation_or_of_the_last(gpt2: GPT2Run, tmp_path: Path) -> None:
    # Backwards: what is learnt makes it worse from the first step on.
    (np.arange(700)[::-1] % 5).astype("<u2").tofile(tmp_path / "validation.bin")
    actual = {}
    for keep in ("best", "last"):
        settings = replace(gpt2, train=replace(SHORT, keep=keep, evaluate_every=5))
        actual[keep] = run(settings, tmp_path / keep)
        model = load_model(tmp_path / keep / "model.safetensors")
        loss, _ = evaluate(model, gpt2.read_data()[1])
        assert loss == pytest.approx(actual[keep]["validation_loss"], rel=1e-4)
    assert actual["best"]["validation_loss"] < actual["last"]["validation_loss"]
    assert actual["best"]["steps"] == actual["last"]["steps"] == 15


# ---- once, and again --------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(
    mixer: MixerRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(mixer, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(module, "train", None)
    (tmp_path / "images.npz").unlink()
    again = run(mixer, tmp_path / "out")
    assert again == first | {"trained": False}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    # How rows are loaded makes no other run.
    run(replace(mixer, train=replace(SHORT, workers=2, evaluation_batch_size=7)), tmp_path / "out")


def test_an_older_run_on_idx_is_finished(mixer: MixerRun, tmp_path: Path) -> None:
    pixels, labels = np.zeros((80, 6, 6), np.uint8), np.arange(80, dtype=np.uint8) % 3
    (tmp_path / "x.idx").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *pixels.shape) + pixels.tobytes())
    (tmp_path / "y.idx").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.tobytes())
    data = ImageData(str(tmp_path / "x.idx"), labels=str(tmp_path / "y.idx"), validation=0.2)
    settings, out = replace(mixer, data=data, train=replace(SHORT, epochs=1)), tmp_path / "out"
    run(settings, out)
    config = json.loads((out / "config.json").read_text())
    del config["settings"]["data"]["scale"]
    (out / "config.json").write_text(json.dumps(config))
    assert not run(settings, out)["trained"]


def test_a_folder_is_of_one_run(mixer: MixerRun, gpt2: GPT2Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(mixer, out)
    before = (out / "config.json").read_bytes()
    others = [
        (replace(mixer, train=replace(SHORT, seed=1)), "train.seed is 0 there, 1 here"),
        (replace(mixer, model=replace(mixer.model, depth=1)), "model.depth is 2 there, 1 here"),
        (replace(mixer, data=replace(mixer.data, seed=3)), "data.seed is 0 there, 3 here"),
        (gpt2, "kind is 'mixer' there, 'gpt2' here"),
    ]
    for settings, message in others:
        with pytest.raises(ValueError, match=f"run with other settings \\({message}\\); .*--fresh"):
            run(settings, out)
    assert (out / "config.json").read_bytes() == before
    (out / "note.txt").write_text("mine")
    actual = run(gpt2, out, fresh=True)
    assert actual["trained"] and (out / "note.txt").read_text() == "mine"
    assert isinstance(load_model(out / "model.safetensors"), GPT2)
    with (out / "metrics.csv").open() as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["5", "10", "15"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it must be JSON"),
        ("[]", "it must be a JSON object"),
        ('{"settings": {}}', "has the keys settings and model"),
    ],
)
def test_a_folder_of_something_else(content: str, message: str, mixer: MixerRun, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        run(mixer, tmp_path)
    assert (tmp_path / "config.json").read_text() == content


def test_a_folder_of_a_head_is_left_alone(mixer: MixerRun, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"setting": {}, "head": {}}')  # as earlier versions wrote it
    (tmp_path / "head.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="kind is 'head' there, 'mixer' here"):
        run(mixer, tmp_path)


def test_results_of_no_run_are_left_alone(gpt2: GPT2Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.csv").write_text("mine")
    with pytest.raises(DamagedCheckpoint):
        run(gpt2, out)
    assert (out / "metrics.csv").read_text() == "mine"


def test_bad_data_leave_no_folder(mixer: MixerRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model takes images"):
        run(replace(mixer, model=replace(mixer.model, channels=3)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- interrupted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 7, 12])
def test_an_interrupted_run_resumes_to_the_same_weights(
    step: int, gpt2: GPT2Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(gpt2, tmp_path / "whole")
    with interrupted(step, monkeypatch):
        run(gpt2, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    actual = run(gpt2, tmp_path / "out")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert actual["trained"] and actual["validation_loss"] == whole["validation_loss"]
    assert actual["steps"] == whole["steps"]


def test_what_was_begun_stays_until_another_run_has_something(
    gpt2: GPT2Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", replace(gpt2, train=replace(SHORT, seed=1))
    with interrupted(12, monkeypatch):
        run(gpt2, out)
    before = contents(out)
    assert any(name.startswith("checkpoints/") for name in before)
    with pytest.raises(ValueError, match=r"run with other settings \(train.seed is 0 there, 1 here\)"):
        run(other, out)
    with interrupted(1, monkeypatch):
        run(other, out, fresh=True)
    assert contents(out) == before
    assert run(gpt2, out)["trained"]


def test_from_the_checkpoint_of_a_step(gpt2: GPT2Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(gpt2, out)
    first = weights(out)
    (out / "model.safetensors").unlink()
    last = sorted((out / "checkpoints").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.raises(DamagedCheckpoint, match=r"step 15.* last good checkpoint is from step 10"):
        run(gpt2, out)
    run(gpt2, out, from_step=10)
    assert same(first, weights(out))
    with pytest.raises(ValueError, match="is finished and cannot resume from a step"):
        run(gpt2, out, from_step=10)
    assert same(first, weights(out))


# ---- on two processes -------------------------------------------------------------------------------------


def worker(rank: int, port: int, settings: GPT2Run, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    actual = [run(settings, folder / "two"), run(settings, folder / "two")]
    own = processes()
    (folder / f"{rank}.json").write_text(json.dumps([own.process_index, own.num_processes, actual]))
    own.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes would share one accelerator")
def test_two_processes_leave_one_folder(gpt2: GPT2Run, tmp_path: Path) -> None:
    settings = replace(gpt2, model=replace(gpt2.model, dropout=0.0), train=replace(SHORT, epochs=1))
    actual = run(settings, tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(worker, port, settings, tmp_path)
    for rank in range(2):
        index, count, (first, again) = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (index, count) == (rank, 2)
        assert (first["trained"], again["trained"]) == (True, False)
        assert first["validation_loss"] == pytest.approx(actual["validation_loss"], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == FILES
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    alone, shared = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-5)
