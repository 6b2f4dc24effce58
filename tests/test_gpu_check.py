"""The check of a GPU loses nothing: stages that are cut or fail, the budget, the tables of what it wrote."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks import devices, gpu, harness  # noqa: E402
from benchmarks.gpu import __main__ as check  # noqa: E402
from benchmarks.gpu import stages, tests  # noqa: E402

ROOT = Path(__file__).parents[1]
ROW = 'rows.write("{\\"stage\\": 1}\\n"); rows.flush()'
#: Stages that end in every way there is, as Python code.
CODE = {
    "good": f"{ROW}; {ROW}",
    "slow": f"import time; {ROW}; rows.write('{{'); rows.flush(); time.sleep(60)",
    "crash": f"{ROW}; raise ValueError('no such kernel')",
    "killed": f"import os; {ROW}; os.abort()",
    "last": ROW,
}


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: stages.Stage(lambda *_: [], 5.0, f"Stage {name}", {"stage": "d"}) for name in CODE}
    made["slow"] = stages.Stage(lambda *_: [], 1.0, "Stage slow", {"stage": "d"})

    def command(name: str, device: str, sizes: str, rows: Path) -> list[str]:
        return [sys.executable, "-c", f"rows = open({str(rows)!r}, 'w'); {CODE[name]}"]

    monkeypatch.setattr(check, "STAGES", made)
    monkeypatch.setattr(check, "command", command)


def outcomes(folder: Path) -> list[str]:
    """The outcomes of the stages, in the text of the check."""
    lines = (folder / "gpu.txt").read_text().splitlines()
    begin = lines.index("Stages") + 3
    return lines[begin : lines.index("", begin)] if "" in lines[begin:] else lines[begin:]


@pytest.mark.usefixtures("fake_stages")
def test_what_ends_early_loses_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--fake", "--out", str(tmp_path)]) == 1
    assert [re.sub(r" +\d+ +(\d+)$", r" \1", line) for line in outcomes(tmp_path)] == [
        "good    done 2",
        "slow    cut after 1 s 1",
        "crash   failed with exit status 1: ValueError: no such kernel 1",
        "killed  failed with exit status -6: ValueError: no such kernel 1",
        "last    done 1",
    ]
    text = (tmp_path / "gpu.txt").read_text()
    assert text in capsys.readouterr().out and f"torch {torch.__version__}" in text and "sizes toy" in text
    assert "no such kernel" in (tmp_path / "gpu.log").read_text()
    assert (tmp_path / "good.jsonl").read_text() == 2 * '{"stage": 1}\n'


@pytest.mark.usefixtures("fake_stages")
def test_a_cut_stage_is_no_failure_and_the_budget_is_that_of_all(tmp_path: Path) -> None:
    assert check.check(tmp_path, ["slow", "good"], "cpu", "full", budget=0.5)
    slow, good = outcomes(tmp_path)
    assert "cut after 0 s" in slow and "not run: the 0 s are over" in good
    # Toy sizes must finish: otherwise a run without a GPU would show nothing.
    assert check.main(["slow", "--fake", "--budget", "0.5", "--out", str(tmp_path)]) == 1
    assert check.main(["good", "--fake", "--budget", "0", "--out", str(tmp_path)]) == 1


def test_every_row_is_written_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"

    def rows(device: str, toy: bool) -> Iterator[dict[str, int]]:
        for number in range(3):
            assert path.read_text().count("\n") == number
            yield {"number": number}

    monkeypatch.setitem(stages.STAGES, "counted", stages.Stage(rows, 1.0, "Counted", {"number": "d"}))
    stages.main("counted", "cpu", "toy", str(path))
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_bad_arguments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, message in (([], "there is no CUDA device"), (["nope"], "unknown stage 'nope'")):
        with pytest.raises(SystemExit, match="2"):
            check.main([*arguments, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err


def test_the_limits_of_the_stages_are_within_the_budget() -> None:
    assert sum(stage.seconds for stage in stages.STAGES.values()) <= check.BUDGET == 8 * 60


@pytest.fixture(scope="module")
def reports() -> list[harness.Report]:
    """What stages give at toy sizes, but for those that start processes or compile."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.BRIEF, "rounds", 3)
        patch.setitem(gpu.BRIEF, "turn", 0)
        for name, stage in stages.STAGES.items():
            if name not in ("tests", "compiled"):
                actual = json.loads(json.dumps(list(stage.rows("cpu", True))))
                made.append(harness.Report(name, stage.title, stage.columns, actual, list(stage.notes)))
    return made


def test_stages_fill_their_tables(reports: list[harness.Report]) -> None:
    for report in reports:
        assert report.rows, report.name
        assert {name for row in report.rows for name in row} | {"note"} == {*report.columns, "note"}
        assert len(str(report).splitlines()) == len(report.rows) + 3 + len(report.notes)


def test_a_layer_without_room_is_noted_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def compare(*_: Any, **__: Any) -> Any:
        calls.append("compare")
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("benchmarks.gpu.layers.compare", compare)
    rows = list(stages.STAGES["layers"].rows("cpu", True))
    assert len(rows) == len(calls) == 2 * len(devices.PRECISIONS)
    assert {row["note"] for row in rows} == {"out of memory"}


def test_outcomes_are_read_off_what_pytest_prints() -> None:
    lines = {
        "tests/test_cuda.py::test_a_model[tr] PASSED                  [ 50%]": ("test_a_model", "PASSED"),
        "tests/test_cuda.py::test_layers[two levels-cp] FAILED     [100%]": ("test_layers", "FAILED"),
        "tests/test_cuda.py::test_files SKIPPED (could not import 'x') [ 1%]": ("test_files", "SKIPPED"),
    }
    for line, expected in lines.items():
        actual = tests.RESULT.match(line)
        assert actual and actual.groups() == expected
    assert (
        tests.RESULT.match("FAILED tests/test_cuda.py::test_layers[two levels-cp] - AssertionError") is None
    )


def test_a_graph_is_captured_once_the_call_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Recorder:
        """Stands for a stream, a graph, and a context."""

        def __init__(self, *name: Any):
            self.name = name[0] if name and isinstance(name[0], str) else "stream"

        def wait_stream(self, other: Any) -> None:
            events.append("wait")

        def replay(self) -> None:
            events.append("replay")

        def __enter__(self) -> None:
            events.append(f"enter {self.name}")

        def __exit__(self, *_: Any) -> None:
            events.append(f"leave {self.name}")

    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Recorder)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Recorder("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Recorder("graph"))
    replay = devices.graphed(lambda: events.append("call"), "cuda")
    replay()
    warm = ["wait", "enter stream", "call", "call", "call", "leave stream", "wait"]
    assert events == [*warm, "enter graph", "call", "leave graph", "replay"]


def test_kernels_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Profile:
        """Saw two kernels, and the processor launching them."""

        def __enter__(self) -> Profile:
            events.append("profile")
            return self

        def __exit__(self, *_: Any) -> None:
            events.append("end")

        def events(self) -> list[Any]:
            kinds = (torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA)
            return [SimpleNamespace(device_type=kind) for kind in 2 * kinds]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    assert devices.launches(lambda: events.append("call"), "cuda") == 2
    assert events == ["call", "synchronize", "profile", "call", "synchronize", "end"]


def test_nothing_is_needed_that_a_bare_machine_lacks() -> None:
    # torch, NumPy, SciPy, pytest, Hypothesis and what docs/how-to/benchmark.md says to carry: nothing else.
    code = """
import sys
from importlib.abc import MetaPathFinder

LACKING = {"PIL", "accelerate", "entmax", "jax", "matplotlib", "pandas", "plotly", "pydantic", "rich",
           "safetensors", "sklearn", "tensorboardX", "threadpoolctl", "timm", "tokenizers", "torchvision",
           "transformers", "typer"}

class Bare(MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bare())
import benchmarks.gpu.__main__, benchmarks.ratios
import pytest
sys.exit(pytest.main(["--collect-only", "-m", "cuda", "tests/test_cuda.py"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::test_fsdp2_on_one_process" in done.stdout
