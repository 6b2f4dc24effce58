"""A refused command changes nothing, a full disk loses nothing, and two processes are not in one folder."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from commands import LINES, contents, run

from mumoe_tensor import files
from mumoe_tensor.files import alone_in

#: What each command replaces.
RESULTS = {
    "study": ["results.csv", "study.json", "report.html", "pareto.png"],
    "bias": ["notes.csv"],
    "tokenize": ["training.bin", "validation.bin", "tokens.json"],
    "inspect": ["page.html"],
    "replace": ["notes.csv"],
    "train head": ["config.json", "metrics.csv", "head.safetensors"],
    "train mixer": ["config.json", "metrics.csv", "checkpoints/step-1", "model.safetensors"],
    "train gpt2": ["config.json", "metrics.csv", "tensorboard/events", "model.safetensors"],
}
FRESH = ("study", "train head", "train mixer", "train gpt2")
#: Options that are refused, some only once data are read or a model is made.
REFUSED = [
    ("study", "--data missing.npz"),
    ("study", "--data {data}/x.npz --in-features 7"),
    ("study", "--data {data}/x.npz --batch-size 1000"),
    ("study", "--seconds nan"),
    ("bias", "--target wealth"),
    ("bias", "--seeds 0"),
    ("tokenize", "{data}/texts/three.txt"),
    ("tokenize", "{data}/encoder.json --hold-out none*"),
    ("tokenize", "--vocabulary 3"),
    ("replace", "--jobs 0"),
    ("replace", "--grid {data}/mixer.toml"),
    ("replace", "--test {data}/missing.jsonl"),
    ("replace", "--test {data}/x.npz"),
    ("inspect", "--rows 0"),
    ("inspect", "--images {data}/images.npz"),
    ("train head", "--batch-size 1000"),
    ("train head", "--batch-size 1"),
    ("train head", "--rank 5 --parameters 100"),
    ("train head", "--features {data}/missing.npz"),
    ("train head", "--gate hard"),
    ("train mixer", "--set train.batch_size=1000"),
    ("train mixer", "--set model.channels=3"),
    ("train gpt2", "--set train.batch_size=100000"),
    ("train gpt2", "--set train.precision=fp16"),
    ("train gpt2", "--set model.vocabulary=4"),
    ("train gpt2", "--set data.training=missing.bin"),
    ("train gpt2", "--from-step 2"),
]


def fill(out: Path, command: str) -> dict[str, bytes]:
    """Write older results of a command, and a file of somebody else."""
    for name in [*RESULTS[command], "notes.txt"]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("old")
    return contents(out)


@pytest.mark.parametrize("has_results", [True, False])
@pytest.mark.parametrize(("command", "options"), REFUSED)
def test_a_refused_command_changes_nothing(
    command: str, options: str, has_results: bool, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results" / "out"
    before = fill(out, command) if has_results else {}
    fresh = " --fresh" if command in FRESH and has_results else ""
    result = run(f"{LINES[command]} {options}{fresh}", data, out)
    assert result.exit_code == 2, (result.exception, result.output)
    assert (
        result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("mumoe-tensor:")
    )
    assert contents(out) == before
    assert has_results or list(tmp_path.iterdir()) == [], "no folder is left either"


@pytest.mark.parametrize("command", RESULTS)
def test_the_second_process_in_a_folder_is_refused(command: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = fill(out, command)
    with alone_in(out):
        result = run(LINES[command] + " --fresh" * (command in FRESH), data, out)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        assert "another is writing into" in result.stderr
    assert contents(out) == before


class Disk:
    """A disk that is full from a write on, counted by files, or by records of curves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from tensorboardX.record_writer import RecordWriter

        self.writes, self.full_at = 0, 0
        opened, record = files.os.fdopen, RecordWriter.write

        def fdopen(*args: Any) -> Any:
            file = opened(*args)
            try:
                self.write()
            except OSError:
                file.close()
                raise
            return file

        def write(writer: Any, content: bytes) -> None:
            self.write()
            record(writer, content)

        monkeypatch.setattr(files.os, "fdopen", fdopen)
        monkeypatch.setattr(RecordWriter, "write", write)

    def write(self) -> None:
        self.writes += 1
        if self.full_at and self.writes >= self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    from mumoe_tensor.measure import timing
    from mumoe_tensor.study import report, sweep
    from mumoe_tensor.study.charts import over_batches

    # To save time:
    monkeypatch.setattr(report, "charts", lambda *study: [over_batches(*study)])
    monkeypatch.setattr(timing, "_no_collection", nullcontext)
    monkeypatch.setattr(sweep, "peaks", lambda *_: (1, 2))
    yield Disk(monkeypatch)
    gc.collect()


# (What cannot write its first record, tensorboardX leaves open, until it is collected.)
@pytest.mark.filterwarnings("ignore:.*tfevents:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("command", RESULTS)
def test_a_full_disk_is_one_line_and_loses_nothing(
    command: str, data: Path, tmp_path: Path, disk: Disk
) -> None:
    """At every write of the command; of many, at the first, the last and one between."""
    line = LINES[command] + " --fresh" * (command in FRESH)
    fill(tmp_path / "counted", command)
    result = run(line, data, tmp_path / "counted")
    assert result.exit_code == 0, result.stderr
    count = disk.writes
    for full_at in range(1, count + 1) if count < 8 else (1, count // 2, count):
        out = tmp_path / str(full_at)
        before = fill(out, command)
        disk.writes, disk.full_at = 0, full_at
        result = run(line, data, out)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, (full_at, result.exception)
        assert "No space left on device" in result.stderr and "Traceback" not in result.output
        after = contents(out)
        assert {name: after.get(name) for name in before} == before
        assert not any(name.endswith(".part") for name in after)
    # Once there is room the same command ends well, and the older results are gone.
    disk.writes, disk.full_at = 0, 0
    result = run(line, data, out)
    assert result.exit_code == 0, result.stderr
    after = contents(out)
    assert all(after[name] != b"old" for name in RESULTS[command] if name in after and name != "notes.csv")
    assert after["notes.txt"] == b"old" and not any(name.startswith(".") for name in after)


def test_an_interrupted_training_begun_afresh_resumes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mumoe_tensor.training import trainer

    out, line = tmp_path / "out", LINES["train gpt2"]
    assert run(line, data, out).exit_code == 0
    before = contents(out)
    evaluate, calls = trainer._Run._evaluate, []

    def interrupted(self: Any) -> None:
        calls.append(self.state.step)
        if self.state.step == 4:
            raise KeyboardInterrupt
        evaluate(self)

    other = f"{line} --set train.seed=1"
    with monkeypatch.context() as patched:
        patched.setattr(trainer._Run, "_evaluate", interrupted)
        result = run(f"{other} --fresh", data, out)
        assert result.exit_code == 130 and "the same command resumes" in result.stderr
    after = contents(out)
    assert {name: after[name] for name in before} == before, "the run before is as it was"
    assert "it was already trained" in run(line, data, out).stdout
    calls.clear()
    monkeypatch.setattr(
        trainer._Run, "_evaluate", lambda self: (calls.append(self.state.step), evaluate(self))
    )
    assert run(f"{other} --fresh", data, out).exit_code == 0 and calls == [4]
    assert "it was already trained" in run(other, data, out).stdout
    assert not (out / ".new").exists()
    # What was begun with other settings is not gone on with.
    with monkeypatch.context() as patched:
        patched.setattr(trainer._Run, "_evaluate", interrupted)
        assert run(f"{line} --fresh", data, out).exit_code == 130
    calls.clear()
    assert run(f"{other} --fresh", data, out).exit_code == 0 and calls == [2, 4]


@pytest.mark.parametrize("command", ["train mixer", "train gpt2"])
def test_a_run_that_came_to_nothing_is_in_nobodys_way(
    command: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = f"{LINES[command]} --set train.learning_rate=1e30 --set train.clip=none"
    result = run(wrong, data, tmp_path / "out")
    assert result.exit_code in (1, 2) and list(tmp_path.iterdir()) == []
    assert run(LINES[command], data, tmp_path / "out").exit_code == 0
