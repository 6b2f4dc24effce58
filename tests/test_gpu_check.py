"""The check of a GPU loses nothing: stages that are cut or fail, the budget, the tables of what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from benchmarks import devices, harness  # noqa: E402
from benchmarks.gpu import __main__ as check  # noqa: E402
from benchmarks.gpu import rows, stages, suites, table  # noqa: E402

ROOT = Path(__file__).parents[1]
ROW = 'print("{\\"stage\\": 1}", flush=True)'
#: Stages that end in every way there is, as Python code.
CODE = {
    "good": f"{ROW}; {ROW}",
    "slow": f"import time; {ROW}; time.sleep(60)",
    "crash": f"{ROW}; raise ValueError('no such kernel')",
    "killed": f"import os; {ROW}; os.abort()",
    "last": ROW,
}


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: stages.Stage(lambda *_: [], 5.0, f"Stage {name}", {"stage": "d"}) for name in CODE}
    made["slow"] = stages.Stage(lambda *_: [], 1.0, "Stage slow", {"stage": "d"})
    monkeypatch.setattr(check, "STAGES", made)
    monkeypatch.setattr(check, "command", lambda name, *_: [sys.executable, "-c", CODE[name]])


@pytest.mark.usefixtures("fake_stages")
def test_what_ends_early_loses_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--fake", "--out", str(tmp_path)]) == 1
    (outcomes, *reports), about = harness.read_json(tmp_path / "gpu.json")
    assert about["fake"] and about["torch"] == torch.__version__
    assert {row["stage"]: row["outcome"] for row in outcomes.rows} == {
        "good": "done",
        "slow": "cut after 1 s",
        "crash": "failed with exit status 1: ValueError: no such kernel",
        "killed": "failed with exit status -6: ValueError: no such kernel",
        "last": "done",
    }
    assert [len(report.rows) for report in reports] == [2, 1, 1, 1, 1]
    assert [row["rows"] for row in outcomes.rows] == [2, 1, 1, 1, 1]
    text = (tmp_path / "gpu.txt").read_text()
    assert "cut after 1 s" in text and text in capsys.readouterr().out
    assert "no such kernel" in (tmp_path / "gpu.log").read_text()


@pytest.mark.usefixtures("fake_stages")
def test_a_cut_stage_is_no_failure_and_the_budget_is_that_of_all(tmp_path: Path) -> None:
    assert check.main(["slow", "good", "--fake", "--budget", "0.5", "--out", str(tmp_path)]) == 0
    (outcomes, *_), _ = harness.read_json(tmp_path / "gpu.json")
    assert [row["outcome"] for row in outcomes.rows] == ["cut after 0 s", "not run: the 0 s are over"]


@pytest.mark.usefixtures("fake_stages")
def test_every_row_is_saved_when_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[list[int]] = []

    def write(path: Path, reports: Any, about: Any) -> None:
        harness.write_json(path, reports, about)
        saved.append([len(report.rows) for report in harness.read_json(path)[0][1:]])

    monkeypatch.setattr(check, "write_json", write)
    check.main(["good", "last", "--fake", "--out", str(tmp_path)])
    assert saved == [[0], [1], [2], [2], [2, 0], [2, 1], [2, 1]]


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
        patch.setitem(rows.BRIEF, "rounds", 3)
        patch.setitem(rows.BRIEF, "turn", 0)
        for name, stage in stages.STAGES.items():
            if name not in ("tests", "compiled", "suites"):
                found = json.loads(json.dumps(list(stage.rows("cpu", True))))
                made.append(harness.Report(name, stage.title, stage.columns, found, list(stage.notes)))
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
    report = harness.Report("layers", "Layers", stages.LAYERS, rows, [])
    assert "| toy block, cp, 4x4 experts | 32 | TF32 | –, – | –, – | –, – |" in table.markdown([report])


def test_the_asv_suites_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("asv_runner")
    monkeypatch.setenv("MUMOE_BENCHMARK_PROFILE", "quick")
    (row,) = suites.asv_suites("cpu", True)
    assert row["case"].startswith("forward.Forward.time_forward('cp'") and row["ms"] > 0


def test_outcomes_are_read_off_what_pytest_prints() -> None:
    lines = {
        "tests/test_cuda.py::test_a_model[tr] PASSED                  [ 50%]": ("test_a_model", "PASSED"),
        "tests/test_cuda.py::test_layers[two levels-cp] FAILED     [100%]": ("test_layers", "FAILED"),
        "tests/test_cuda.py::test_files SKIPPED (could not import 'x') [ 1%]": ("test_files", "SKIPPED"),
    }
    for line, expected in lines.items():
        found = suites.RESULT.match(line)
        assert found and found.groups() == expected
    assert (
        suites.RESULT.match("FAILED tests/test_cuda.py::test_layers[two levels-cp] - AssertionError") is None
    )


def test_figures_are_stored_and_toys_are_not(
    reports: list[harness.Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(table, "MEASURED", tmp_path / "measured")
    harness.write_json(tmp_path / "gpu.json", reports, {"gpu": "none", "fake": True})
    with pytest.raises(SystemExit, match="2"):
        table.main([str(tmp_path)])
    assert not (tmp_path / "measured").exists()
    harness.write_json(tmp_path / "gpu.json", reports, {"gpu": "a GPU", "fake": False})
    capsys.readouterr()
    table.main([str(tmp_path)])
    assert harness.read_json(tmp_path / "measured" / "gpu.json")[0] == reports
    assert (tmp_path / "measured" / "gpu.txt").read_text().startswith("gpu a GPU, fake False\n\nGates\n")
    first, rule, *lines = capsys.readouterr().out.splitlines()
    assert first.count("|") == rule.count("|") == 7
    layers = next(report for report in reports if report.name == "layers")
    forward, step = (f"{row['to dense']:.2f}" for row in layers.rows[:2])
    assert lines[0].startswith(f"| toy block, cp, 4x4 experts | 32 | bfloat16 | {forward}, {step} | ")
    assert [line.split(" | ")[0] for line in lines[-4:]] == ["| mlp", "| cp-256", "| mlp", "| tr-256"]


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
import benchmarks.gpu.__main__, benchmarks.gpu.table, benchmarks.ratios, benchmarks.guard
import pytest
sys.exit(pytest.main(["--collect-only", "-m", "cuda", "tests/test_cuda.py"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::test_fsdp2_on_one_process" in done.stdout
