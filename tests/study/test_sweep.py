"""Measurements are of what they say; a study goes on where it stopped, and its table is always whole."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import MEASURED, SHORT, SMALL

import mumoe_tensor as mt
from mumoe_tensor import LayerSpec
from mumoe_tensor import study as studies
from mumoe_tensor.measure.memory import METERS, Meter
from mumoe_tensor.measure.timing import Comparison
from mumoe_tensor.study import memory, quality
from mumoe_tensor.study import sweep as sweeps
from mumoe_tensor.study.layers import dense, features
from mumoe_tensor.study.results import joined
from mumoe_tensor.study.subjects import BASELINE, SPARSE, UNITS, Subject

Study = tuple[studies.Plan, studies.Results, Path]


def test_every_subject_has_every_figure(study: Study) -> None:
    planned, results, _ = study
    for subject in planned.subjects:
        known = {"sizes": "24x40x20", "subject": subject.name, "experts": joined(subject.spec.experts)}
        rank = joined(subject.spec.full_rank)
        for quantity, value in subject.figures(8).items():
            assert [row.value for row in results.of(quantity, rank=rank, **known)] == [value]
        (row,) = results.of("predicted forward", device="cpu", batch=8, **known)
        assert row.value == subject.predicted(8, "cpu") and row.unit == "s"
        for quantity in ("forward", "step"):
            (row,) = results.of(quantity, device="cpu", batch=8, **known)
            assert row.value and row.low <= row.value <= row.high and row.repetitions == 3
            assert row.ratio_low <= row.ratio <= row.ratio_high
        is_main = subject.spec.experts in ((), (4,))
        assert [row.value for row in results.of("step peak", **known)] == [2008]
        batches = {row.batch for row in results.of("forward", **known)}
        assert batches == ({1, 8} if is_main else {8})
    assert {row.unit for row in results} <= set(UNITS.values())
    assert {subject.name for subject in planned.subjects} == {BASELINE, SPARSE, *MEASURED["formats"]}


def test_heads_are_judged(study: Study) -> None:
    planned, results, _ = study
    assert {features(head.spec) for head in planned.heads} == {(64, 32, 10)}
    for head in planned.heads:
        known = {"sizes": "64x32x10", "subject": head.name, "experts": joined(head.spec.experts)}
        accuracies = results.of("accuracy", **known)
        assert [row.seed for row in accuracies] == [3, 4] and all(0 <= row.value <= 1 for row in accuracies)
        assert accuracies[0].value != accuracies[1].value or head.name != BASELINE
        if head.name != BASELINE:
            for quantity in ("active experts", "dead experts", "polysemanticity, random gate"):
                assert len(results.of(quantity, **known)) == 2


def test_ratios_are_over_the_dense_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def compare(calls: dict[str, Any], baseline: str, **_: Any) -> Any:
        seen.append([*calls, baseline])
        return Comparison(
            baseline, {name: (2.0, 4.0) if name == "dense" else (6.0, 4.0) for name in calls}, {}
        )

    monkeypatch.setattr(sweeps, "compare", compare)
    setting = studies.prepare(**SMALL)
    subject = Subject(LayerSpec("cp", experts=3, in_features=5, out_features=4, rank=2, bias=True), budget=40)
    forward, step = sweeps._timing(setting, subject, "cpu", 4, ("forward", "step")).run()
    assert forward.quantity == "forward" and step.quantity == "step"
    assert (forward.value, forward.ratio) == (5.0, 2.0) and seen[0] == ["dense", "this", "dense"]
    (alone,) = sweeps._timing(setting, Subject(dense(5, 4), BASELINE), "cpu", 4, ("forward",)).run()
    assert alone.ratio == 1.0 and seen[-1] == ["this", "this"]


# ---- going on ---------------------------------------------------------------------------------------------


class Stop(Exception):
    """Somebody interrupts."""


def test_an_interrupted_study_resumes_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "peaks", lambda *_: (1, 2))
    monkeypatch.setattr(studies, "write", lambda *_: None)
    options = SHORT | {"formats": ["cp"]}
    total = len(studies.plan(studies.prepare(**options)).tasks)
    ran: list[str] = []

    def stop_at_three(done: float, whole: float, text: str) -> None:
        if len(ran) == 3:
            raise Stop
        ran.append(text)

    with pytest.raises(Stop):
        studies.run(**options, out=tmp_path, progress=stop_at_three)
    table = (tmp_path / "results.csv").read_text()
    assert len({line.split(",")[0] for line in table.splitlines()[1:]}) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "study.json"]
    seen: list[tuple[float, float, str]] = []
    results = studies.run(**options, out=tmp_path, progress=lambda *call: seen.append(call))
    assert len(seen) == total - 3 + 1 and seen[-1][2] == "done" and len(results.tasks) == total
    assert (tmp_path / "results.csv").read_text().startswith(table)
    # Once more: nothing is left.
    seen.clear()
    studies.run(**options, out=tmp_path, progress=lambda *call: seen.append(call))
    assert [text for *_, text in seen] == ["done"]
    with pytest.raises(ValueError, match="contains a study with another setting"):
        studies.run(**(options | {"seed": 4}), out=tmp_path)
    assert len(studies.run(**(options | {"seed": 4}), out=tmp_path, fresh=True).tasks) == total
    assert "seed" in json.loads((tmp_path / "study.json").read_text())
    # A fresh study replaces results without a setting, too.
    (tmp_path / "study.json").unlink()
    seen.clear()
    studies.run(**options, out=tmp_path, fresh=True, progress=lambda *call: seen.append(call))
    assert len(seen) == total + 1


def test_a_killed_study_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from mumoe_tensor import study
from mumoe_tensor.study import sweep
sweep.peaks = lambda *_: (1, 2)
study.run(study.Layer("Tiny", 24, 20), experts=[4], formats=["cp", "tr"], parameters="2x",
          data="none", batch=4, seconds=0.01, quick=True, out=sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    table = tmp_path / "results.csv"

    def tasks() -> list[str]:
        with open(table, newline="", encoding="utf-8") as file:
            return [line["task"] for line in csv.DictReader(file)]

    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (table.exists() and len(set(tasks())) > 2):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = table.read_text()
    done = set(tasks())
    assert len(done) > 2 and not (tmp_path / "report.html").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert table.read_text().startswith(before)
    assert len(set(tasks())) > len(done) and (tmp_path / "report.html").exists()


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"results\.csv: a table must have each of its columns once; missing \['task'"
    ):
        studies.Results(tmp_path / "results.csv")


def test_rows_come_back_as_they_were(study: Study) -> None:
    _, results, out = study
    assert list(studies.Results(out / "results.csv")) == list(results)
    (about,) = results.environments
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        line = next(csv.DictReader(file))
    assert line["torch"] == torch.__version__ == about["torch"] and line["date"].endswith("+00:00")


# ---- memory and quality -----------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_peaks_grow_with_what_is_held() -> None:
    # Parameters of 16 MiB: the forward holds them, the step their gradients too.
    forward, step = memory.peaks(Subject(dense(2048, 2048), BASELINE), 4, "cpu")
    assert 15 * 2**20 < forward < 24 * 2**20
    assert 31 * 2**20 < step < 44 * 2**20


def test_a_small_layer_comes_before_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], Subject.build
    monkeypatch.setattr(Subject, "build", lambda *call: built.append(call) or build(*call))
    monkeypatch.setitem(METERS, "cpu", Meter(lambda: None, lambda: len(built), lambda: 5))
    assert memory.measure(Subject(studies.dense(24, 16)), 4, "cpu") == (4, 4)


def test_a_process_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(sweeps, "peaks", fails)
    rows = sweeps._peak(studies.prepare(**SMALL), Subject(dense(3, 2), BASELINE), "cpu").run()
    assert [(row.value, row.note) for row in rows] == [(None, "no memory")] * 2


def test_linear_heads_on_data_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    y = torch.arange(900) % 3
    x = 3 * torch.nn.functional.one_hot(y, 16) + torch.randn(900, 16)
    np.savez(tmp_path / "x.npz", x=x.numpy(), y=y.numpy())
    options = SMALL | {
        "layer": "clip-head",
        "data": tmp_path / "x.npz",
        "head_hidden": 0,
        "head_parameters": ["3x"],
        "epochs": 30,
    }
    setting = studies.prepare(**options)
    heads, _ = quality.heads(setting)
    assert {features(head.spec) for head in heads} == {(16, 3)}
    assert {head.budget for head in heads} == {0, 3 * 17 * 3}
    training, validation = quality.data_of(setting.data)
    assert len(training) == 720 and len(validation) == 180
    assert float(training.x.square().mean()) == pytest.approx(1, abs=1e-4)
    (cp,) = [head for head in heads if head.name == "cp" and head.spec.experts == (3,)]
    figures, rows = quality.train_and_evaluate(setting, cp, 0)
    assert figures["accuracy"] > 0.6 and rows == 180


def test_heads_have_the_classes_of_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(90, 16))
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(90) % 2)
    options = SMALL | {"layer": "clip-head", "data": tmp_path / "x.npz", "head_parameters": ["9x"]}
    setting = studies.prepare(**options, batch_size=8)
    training, validation = quality.data_of(setting.data)
    validation = quality.Dataset(validation.x, torch.arange(len(validation)) % 3)
    monkeypatch.setattr(quality, "data_of", lambda data: (training, validation))
    assert {head.spec.out_features for head in quality.heads(setting)[0]} == {3}


def test_training_learns_and_the_seed_decides() -> None:
    setting = studies.prepare(**(SMALL | {"epochs": 8}))
    heads, _ = quality.heads(setting)
    for head in [h for h in heads if h.name in (BASELINE, "cp", SPARSE)][:3]:
        torch.manual_seed(1)
        figures, _ = quality.train_and_evaluate(setting, head, 0)
        assert figures["accuracy"] > 0.8, head
        torch.manual_seed(2)
        again, _ = quality.train_and_evaluate(setting, head, 0)
        assert again["loss"] == figures["loss"] != quality.train_and_evaluate(setting, head, 1)[0]["loss"]


def test_specialisation_of_known_experts() -> None:
    class OneHot(torch.nn.Module):
        """An expert for each class, and one that nobody uses."""

        def __init__(self) -> None:
            super().__init__()
            from mumoe_tensor.nn import ExpertGate

            self.gate = ExpertGate(3, (4,), gate=lambda logits: (logits > 0.5).to(logits), gate_norm="none")
            self.gate.weight.data = torch.eye(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (a,) = self.gate(x)
            return a[:, :3] - 1e-3 * torch.arange(3)

    y = torch.arange(3).repeat(20)
    data = quality.Dataset(torch.eye(3)[y], y)
    figures = quality.specialisation(OneHot(), data, 0)
    assert figures["active experts"] == pytest.approx(1 / 4) and figures["dead experts"] == 1 / 4
    assert figures["largest share"] == pytest.approx(1 / 3)
    assert figures["polysemanticity"] == pytest.approx(0, abs=1e-6)
    assert figures["polysemanticity, random gate"] > 0.2


def test_progress_counts_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "peaks", lambda *_: (1, 2))
    seen: list[tuple[float, float]] = []
    options = SHORT | {"formats": ["cp"]}
    studies.run(**options, progress=lambda done, total, _: seen.append((done, total)))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("name", ["dense", SPARSE])
def test_a_mixture_of_dense_experts_that_is_too_large_is_estimated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "peaks", lambda *_: (10, 20))
    options = SHORT | {"formats": ["cp", "dense"], "experts": [16], "parameters": "9x"}
    (mixture,) = [s for s in studies.plan(studies.prepare(**options)).subjects if s.name == name]
    figures = mixture.figures(8)
    needed = (2 * 4 * figures["parameters"] + 8 * figures["saved"]) / 2**30
    planned = studies.plan(studies.prepare(**options, memory=0.8 * needed))
    whole = sweeps.smaller(mixture, studies.prepare(**options, memory=2 * needed), 8, "cpu")
    assert whole == (mixture, 8)
    run, batch = sweeps.smaller(mixture, planned.setting, 8, "cpu")
    assert run.spec.experts == (8,) and batch == 8
    rows = [row for task in planned.tasks for row in task.run() if f" {mixture.key} " in f"{task.key} "]
    figures = {row.quantity: row for row in rows}
    assert figures["parameters"].value == mixture.figures(8)["parameters"]
    missing = mixture.figures(8)["parameters"] - run.figures(8)["parameters"]
    assert figures["forward peak"].value == 10 + 4 * missing
    assert figures["forward"].value > 0
    for quantity in ("forward", "step", "step peak"):
        assert figures[quantity].note == "extrapolated from 8 experts"


def test_a_layer_that_is_too_slow_is_estimated_from_fewer_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = studies.prepare(**SHORT | {"formats": ["cp"], "batch": 64})
    subject = Subject(
        LayerSpec("cp", experts=4, in_features=24, hidden=40, out_features=20, rank=9, bias=True)
    )
    limit = subject.predicted(20, "cpu")
    monkeypatch.setattr(sweeps, "SLOW", limit)
    monkeypatch.setattr(Subject, "predicted", lambda self, batch, device: limit * batch / 20)
    assert sweeps.smaller(subject, setting, 64, "cpu") == (subject, 64)  # no slower than the dense layer
    monkeypatch.setattr(
        Subject, "predicted", lambda self, batch, device: limit * batch / (20 if self is subject else 1000)
    )
    assert sweeps.smaller(subject, setting, 64, "cpu") == (subject, 16)
    calls: list[int] = []

    def compare(calls_of: dict[str, Any], baseline: str, **_: Any) -> Comparison:
        return Comparison(baseline, {"dense": (1.0,), "this": (3.0,)}, {})

    def peaks(one: Subject, batch: int, device: str) -> tuple[int, int]:
        calls.append(batch)
        return 4 * parameters + 16, 8 * parameters + 160

    parameters = int(subject.figures(64)["parameters"])
    monkeypatch.setattr(sweeps, "compare", compare)
    monkeypatch.setattr(sweeps, "peaks", peaks)
    (forward,) = sweeps._timing(setting, subject, "cpu", 64, ("forward",)).run()
    assert (forward.value, forward.ratio) == (12.0, 12.0)
    forward_peak, step_peak = sweeps._peak(setting, subject, "cpu").run()
    assert calls == [16]
    assert (forward_peak.value, step_peak.value) == (4 * parameters + 64, 8 * parameters + 640)
    for row in (forward, step_peak):
        assert row.note == "extrapolated from 16 inputs"


def test_what_is_not_timed_runs_in_other_processes(tmp_path: Path) -> None:
    """With the same results, and a whole table."""
    options = SMALL | {"experts": [4], "batches": (8,), "formats": ["cp"], "data": "digits", "seeds": 1}
    planned = studies.plan(studies.prepare(**options))
    trainings = [task for task in planned.tasks if task.key.startswith("train")]
    planned = replace(planned, tasks=trainings[:3])
    losses = []
    for jobs in (1, 2):
        results = studies.Results(tmp_path / f"{jobs}.csv")
        studies.measure(planned, results, jobs=jobs)
        losses.append({row.task: row.value for row in results.of("loss")})
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_formats_are_added_to_a_finished_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "peaks", lambda *_: (1, 2))
    monkeypatch.setattr(studies, "write", lambda *_: None)
    studies.run(**SHORT | {"formats": ["cp"]}, out=tmp_path)
    table = (tmp_path / "results.csv").read_text()
    seen: list[str] = []
    results = studies.run(
        **SHORT | {"formats": ["tr"]}, out=tmp_path, progress=lambda done, total, text: seen.append(text)
    )
    assert (tmp_path / "results.csv").read_text().startswith(table)
    assert {row.subject for row in results} == {BASELINE, SPARSE, "cp", "tr"}
    assert not any("Dense MLP" in text or " CP" in text for text in seen)
    assert studies.Setting.from_json(tmp_path / "study.json").formats == ("cp", "tr")
    # A study of fewer formats than the folder has leaves nothing out.
    setting = studies.prepare(**SHORT | {"formats": ["tr"]})
    with studies.open_folder(setting, tmp_path) as (planned, _, _):
        assert planned.setting.formats == ("cp", "tr")
    with (
        pytest.raises(ValueError, match=r"contains a study with another setting.*these differ in seconds"),
        studies.open_folder(replace(setting, seconds=9.0), tmp_path),
    ):
        pass


# ---- a weight ---------------------------------------------------------------------------------------------


def test_fits_are_of_the_weight_and_of_its_outputs(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    weights, x = draw.normal(size=(3, 8, 6)).astype("float32"), draw.normal(size=(50, 8)) * np.arange(1, 9)
    np.save(tmp_path / "w.npy", weights)
    np.save(tmp_path / "x.npy", x)
    where = {"weight": tmp_path / "w.npy", "inputs": tmp_path / "x.npy", "transposed": True}
    setting = studies.prepare(**where, formats=["cp", "dense", "btt"], parameters="0.8x", seed=1)
    assert setting.experts == ((3,),) and setting.layer.spec == dense(8, 6, bias=False)
    assert setting.budgets == (round(0.8 * (3 * 8 * 6 + 3 * 8)),) and setting.data == "none"
    planned = studies.plan(setting)
    for subject in planned.subjects:
        for task in planned.tasks:
            if task.key == f"fit {subject.key}":
                errors = {row.quantity: row.value for row in task.run()}
                spec, effort = subject.spec, dict(n_restarts=1, n_iter=10, tolerance=1e-3, seed=1)
                fit, error = mt.decompose(weights, spec.format, spec.rank, **effort)
                assert errors["weight error"] == error
                outputs = [np.einsum("bi,nio->bno", x, w) for w in (weights, mt.to_dense(fit) - weights)]
                plain = np.linalg.norm(outputs[1]) / np.linalg.norm(outputs[0])
                assert errors["output error, plain fit"] == pytest.approx(plain, rel=1e-4, abs=1e-6)
                assert errors["output error"] <= plain + 1e-6
                assert (error < 1e-6) == (subject.name == "dense")


def test_a_rank_above_all_modes_is_not_fitted(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.ones((8, 8), "float32"))
    planned = studies.plan(studies.prepare(weight=tmp_path / "w.npy", formats=["cp-matrix"], parameters="5x"))
    results = studies.Results()
    studies.measure(replace(planned, tasks=[t for t in planned.tasks if t.key.startswith("fit")]), results)
    (row,) = results.of("weight error")
    assert row.value is None and row.note.startswith("not fitted")
    assert any("Not fitted" in note and "CP-matrix" in note for note in studies.notes(planned, results))
    assert not results.of_subject(planned.subjects[1], "weight error")


def test_the_levels_of_a_stack_make_up_its_experts(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.ones((6, 4, 5), "float32"))
    setting = studies.prepare(weight=tmp_path / "w.npy", experts=[6, (2, 3)], formats=["cp"])
    assert setting.layer.spec == dense(5, 4, bias=False)
    planned = studies.plan(setting)
    (fit, *_) = [t for t in planned.tasks if t.key.startswith("fit") and " 2x3 " in t.key]
    assert fit.run()[0].value < 0.1
    with pytest.raises(ValueError, match="must multiply to the 6 matrices of the weight"):
        studies.prepare(weight=tmp_path / "w.npy", experts=[4])
    with pytest.raises(ValueError, match="the layer must match the weight"):
        studies.prepare("clip-head", weight=tmp_path / "w.npy")
