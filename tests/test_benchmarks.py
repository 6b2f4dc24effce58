"""The benchmarks measure what they say. Nothing here depends on how long anything takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest

import mumoe_tensor as mt
from benchmarks import common, guard, harness, memory, modules, ratios
from benchmarks.costs import Cost
from benchmarks.planning import Planning

ROOT = Path(__file__).parents[1]
CELEBA = ratios.layer("tucker", 128, 768, 40, (32, 64, 64))


def test_threads_are_set_and_put_back() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with harness.threads(before + 1) as used:
        assert torch.get_num_threads() == before + 1
        assert f"torch {before + 1}" in used
    assert torch.get_num_threads() == before


@pytest.fixture
def report() -> harness.Report:
    return harness.Report(
        "demo",
        "A title",
        {"name": "", "count": ",d", "ratio": ".2f"},
        [{"name": "first", "count": 1234, "ratio": 0.5}, {"name": "second", "count": 7, "ratio": None}],
        ["A note."],
    )


def test_a_report_prints_as_a_table(report: harness.Report) -> None:
    assert str(report).splitlines() == [
        "A title",
        "name    count  ratio",
        "--------------------",
        "first   1,234   0.50",
        "second      7      -",
        "A note.",
    ]


def test_reports_come_back_from_json(report: harness.Report, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "ratios.json"
    harness.write_json(path, [report, report], {"machine": "here"})
    content = json.loads(path.read_text())
    assert content == {"about": {"machine": "here"}, "reports": [asdict(report)] * 2}


@pytest.mark.parametrize("spec", ratios.CP_LAYERS[:3], ids=ratios.label)
@pytest.mark.parametrize("backend", ratios.backends("cpu"))
def test_code_by_hand_computes_and_does_what_the_plan_does(spec: mt.LayerSpec, backend: str) -> None:
    weight, z, coefficients = ratios.arrays(spec, backend, 3)
    expected = mt.multilinear_moe(weight, z, coefficients, bias=spec.bias)
    by_hand = ratios.cp_by_hand(backend, weight, spec.bias)(z, coefficients)
    np.testing.assert_allclose(by_hand, expected, rtol=1e-4, atol=1e-6)
    # A projection of every vector, a product for every level, the output: at batch 1 the plan has no more.
    kinds = sorted(step.kind for step in mt.plan(spec).steps)
    assert kinds == ["mm"] * (spec.num_levels + 2) + ["mul"] * spec.num_levels


@pytest.mark.parametrize("optimizer", ratios.OPTIMIZERS)
def test_no_path_of_opt_einsum_beats_the_plan(optimizer: str) -> None:
    for spec in ratios.PLANNER_LAYERS[::3]:
        for batch in (1, 256, 65_536):
            rival = ratios.rival(spec, batch, optimizer)
            assert rival.ratio >= 1 / 1.001, f"{spec}, batch {batch}"


def test_auto_is_several_times_off_on_tucker() -> None:
    tucker = [spec for spec in ratios.PLANNER_LAYERS if spec.format.name == "tucker"]
    worst = max(ratios.rival(spec, batch, "auto").ratio for spec in tucker for batch in (1, 65_536))
    assert worst > 5
    assert ratios.rival(CELEBA, 1, "dp").ratio < 1.02


def test_no_path_serves_all_batches() -> None:
    assert ratios.batch_loss(CELEBA) == pytest.approx((1.38, 28.6), rel=2e-3)
    assert ratios.batch_loss(ratios.layer("cp", 256, 768, 768, 556)) == (1, 1)


@pytest.mark.parametrize("name", ratios.COMPARISONS)
def test_every_comparison_fills_its_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "CP_LAYERS", ratios.CP_LAYERS[:1])
    monkeypatch.setattr(ratios, "PLANNER_LAYERS", (ratios.layer("tucker", 4, 9, 5, (2, 3, 4)),))
    monkeypatch.setattr(ratios, "PLANNER_BATCHES", (1, 3))
    monkeypatch.setattr(ratios, "SEARCH_EXPERTS", ((), (4,)))
    monkeypatch.setattr(memory, "in_fresh_process", lambda name, *arguments: resolve_name(name)(*arguments))
    report = ratios.COMPARISONS[name](True, "cpu")
    assert report.name == name
    assert report.rows
    for row in report.rows:
        assert set(row) <= set(report.columns)
    # A line a row, the title, the column names with a rule below, and the notes.
    assert len(str(report).splitlines()) == len(report.rows) + 3 + len(report.notes)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ratios.json"
    ratios.main(["batch", "--quick", "--json", str(path)])
    content = json.loads(path.read_text())
    (report,) = content["reports"]
    assert str(harness.Report(**report)) in capsys.readouterr().out
    assert report["name"] == "batch"
    assert content["about"]["quick"] == "True"
    ratios.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(ratios.COMPARISONS)
    with pytest.raises(SystemExit, match="2"):
        ratios.main(["no-such-comparison"])
    assert "unknown comparison 'no-such-comparison'" in capsys.readouterr().err


def test_comparisons_are_made_on_the_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices: list[str] = []

    def demo(quick: bool, device: str) -> harness.Report:
        devices.append(device)
        return harness.Report("demo", "A title", {"a": ""}, [], [])

    monkeypatch.setattr(ratios, "COMPARISONS", {"demo": demo})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        ratios.main(["--device", "cuda"])
    assert "--device: there is no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(ratios, "environment", dict)
    ratios.main(["--device", "cuda"])
    assert devices == ["cuda"]
    assert "device cuda" in capsys.readouterr().out


@pytest.fixture(scope="module")
def suites() -> dict[str, Any]:
    """What asv finds, by name."""
    discovery = pytest.importorskip("asv_runner.discovery")
    return {benchmark.name: benchmark for benchmark in discovery.disc_benchmarks(str(ROOT / "benchmarks"))}


def test_asv_finds_the_suites_and_nothing_else(suites: dict[str, Any]) -> None:
    assert sorted(suites) == [
        "costs.Cost.track_flops",
        "costs.Cost.track_largest_intermediate",
        "costs.Cost.track_parameters",
        "costs.Cost.track_saved_bytes",
        "forward.Forward.peakmem_forward",
        "forward.Forward.time_forward",
        "gates.Gate.time_gate",
        "imports.timeraw_import",
        "modules.Inference.time_forward",
        "modules.Step.peakmem_step",
        "modules.Step.time_step",
        "modules.Step.track_cuda_peak_bytes",
        "modules.Step.track_saved_bytes",
        "planning.FitRank.time_fit_rank",
        "planning.Planning.time_cold_search",
    ]
    for name, benchmark in suites.items():
        if name not in ("imports.timeraw_import", "modules.Step.track_cuda_peak_bytes"):
            benchmark.set_param_idx(0)
            assert not benchmark.do_setup(), name
            benchmark.func(*benchmark._current_params)


def test_without_cuda_its_benchmarks_are_skipped(
    suites: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    skipped = set()
    for name, benchmark in suites.items():
        for k, values in enumerate(product(*benchmark.params)):
            if "'cuda'" in values and "'numpy'" not in values:
                benchmark.set_param_idx(k)
                assert benchmark.do_setup(), (name, values)
                assert "there is no CUDA device" in capsys.readouterr().out
                skipped.add(name)
    assert skipped == {
        "forward.Forward.time_forward",
        "gates.Gate.time_gate",
        "modules.Step.track_cuda_peak_bytes",
        "modules.Inference.time_forward",
        "modules.Step.time_step",
    }


def test_what_an_old_commit_lacks_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mumoe_tensor.nn", None)
    monkeypatch.delattr("mumoe_tensor.nn", raising=False)
    with pytest.raises(NotImplementedError, match="import"):
        modules.Step().setup("cp", 64, 1, "MuMoE", "float32", "cpu")


@pytest.mark.parametrize("dtype", common.PROFILES["regular"].dtypes)
@pytest.mark.parametrize(("module", "levels"), [("MuMoE", 0), ("MuMoEMLP", 3)])
def test_modules_run_in_every_dtype(module: str, levels: int, dtype: str) -> None:
    values = ("cp", common.profile().experts[0], levels, module, dtype, "cpu")
    modules.Inference().setup(*values)
    step = modules.Step()
    step.setup(*values)
    assert str(step.x.grad.dtype) == f"torch.{dtype}"
    dense = mt.dense_parameters(128, 128, 512 if module == "MuMoEMLP" else None)
    gate = step.module.gate.weight.numel()
    assert 0.9 * dense < sum(p.numel() for p in step.module.parameters()) - gate <= dense


def test_the_peak_on_a_device_is_that_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: calls.append(name))
    monkeypatch.setattr(modules.Step, "step", lambda self: calls.append("step"))
    modules.Step().track_cuda_peak_bytes()
    assert calls == ["reset_peak_memory_stats", "step", "max_memory_allocated"]


def test_no_search_of_a_plan_is_timed_twice() -> None:
    # asv sets a suite up again before every call that it times.
    suite = Planning()
    sizes = set()
    for _ in range(3):
        suite.setup("cp", 64, 1, "time")
        sizes.add(suite.spec.out_features)
        suite.time_cold_search()
    assert len(sizes) == 3


def test_tracked_figures_are_those_of_the_library() -> None:
    suite = Cost()
    suite.setup("tr", 64, 1)
    expected = mt.cost(common.layer("tr", 64, 1, 768), batch=1024, dtype="float32")
    assert suite.track_flops() == expected.flops
    assert suite.track_parameters() == expected.parameters
    assert suite.track_largest_intermediate() == expected.size
    assert suite.track_saved_bytes() == expected.saved


def test_figures_that_are_counted_are_as_stored() -> None:
    # Not here: tests register formats of their own.
    command = [sys.executable, "-m", "benchmarks.guard"]
    environment = {k: v for k, v in os.environ.items() if k != common.VARIABLE} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_counted_figure_is_stored(suites: dict[str, Any]) -> None:
    counted = {name for name, benchmark in suites.items() if benchmark.type == "track"}
    stored = {name.split("(")[0] for name in json.loads(guard.STORED.read_text())}
    assert stored == counted - {"modules.Step.track_cuda_peak_bytes"}


@pytest.mark.parametrize(
    "start", ["costs.Cost.track_flops('tucker'", "modules.Step.track_saved_bytes('cp', 64, 1"]
)
def test_the_guard_sees_what_grows(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_results(program: Any, recompute: bool) -> frozenset[int]:
        count = len(program.network.operands)
        return frozenset(range(count, count + len(program.steps) - 1))

    # Plans that are not the best, and layers that keep all intermediates for their backward pass.
    monkeypatch.setattr(mt, "cost", partial(mt.cost, minimize="peak"))
    monkeypatch.setattr("mumoe_tensor.nn.experts.saved_results", all_results)
    stored = json.loads(guard.STORED.read_text())
    current = guard.figures(start)
    assert any(" grew from " in line for line in guard.changes({k: stored[k] for k in current}, current))


def test_changes_of_figures_name_the_case_and_both_values() -> None:
    stored = {"same": 1, "more": 2, "less": 3000, "gone": 4}
    assert guard.changes(stored, {"same": 1, "more": 3, "less": 2, "new": 5}) == [
        "gone: 4 is stored, but no benchmark computes it",
        "less: shrank from 3,000 to 2",
        "more: grew from 2 to 3",
        "new: 5 is not stored",
    ]


def test_the_guard_fails_until_figures_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "STORED", tmp_path / "stored.json")
    monkeypatch.setattr(guard, "figures", lambda: {"a case": 7})
    assert guard.main([]) == 1
    assert "a case: 7 is not stored" in capsys.readouterr().out
    assert guard.main(["--write"]) == 0
    assert guard.main([]) == 0
    guard.STORED.write_text('{"a case": 6}')
    capsys.readouterr()
    assert guard.main([]) == 1
    printed = capsys.readouterr().out
    assert "a case: grew from 6 to 7" in printed
    assert guard.RENEW in printed
    monkeypatch.setenv(common.VARIABLE, "regular")
    with pytest.raises(SystemExit, match="2"):
        guard.main([])
    assert "unset MUMOE_BENCHMARK_PROFILE" in capsys.readouterr().err


def test_asv_environments_have_what_is_needed() -> None:
    required = json.loads((ROOT / "asv.conf.json").read_text())["matrix"]["req"]
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    assert {re.split("[^A-Za-z_-]", name)[0] for name in needed} <= set(required)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert required["torch"] == [pinned["torch"]]


def test_profile_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, profile in common.PROFILES.items():
        monkeypatch.setenv(common.VARIABLE, name)
        assert common.profile() is profile
    assert common.PROFILES["cuda"].devices == ("cuda",)
    monkeypatch.setenv(common.VARIABLE, "huge")
    with pytest.raises(ValueError, match="must be one of quick, regular, large, cuda, got 'huge'"):
        common.profile()
    assert common.experts_of(256, 0) == ()
    assert common.experts_of(256, 2) == (16, 16)
