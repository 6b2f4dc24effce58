"""The benchmarks measure what they say. Nothing here depends on how long anything takes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import opt_einsum
import pytest

import mumoe_tensor as mt
from benchmarks import common, harness, ratios

ROOT = Path(__file__).parents[1]
CELEBA = ratios.Case("tucker", (128,), 768, 40, (32, 64, 64))


class FakeTime:
    """A clock, and callables that take exactly so many seconds on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        """A callable of this name; the last duration is that of all further calls."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if left[1:] else left[0]

        return call


def test_callables_take_turns() -> None:
    clock = FakeTime()
    callables = {name: clock.taking(name, seconds) for name, seconds in (("a", 1), ("b", 2), ("c", 4))}
    found = harness.compare(callables, "a", rounds=4, turn=1, limit=1e9, clock=clock)
    # One call to warm up and one that is long enough for a turn, then the rounds.
    assert "".join(clock.calls) == "aabbcc" + 4 * "abc"
    assert found.rounds == 4
    assert found.loops == {"a": 1, "b": 1, "c": 1}


def test_known_durations_give_known_ratios() -> None:
    clock = FakeTime()
    callables = {name: clock.taking(name, seconds) for name, seconds in (("b", 6e-6), ("a", 2e-6))}
    found = harness.compare(callables, "a", rounds=5, turn=1e-3, clock=clock)
    assert found.loops == {"a": 512, "b": 256}
    assert found.spread("b") == pytest.approx((6e-6, 6e-6, 6e-6))
    assert found.ratio("b") == pytest.approx((3, 3, 3))
    assert found.excess("b") == pytest.approx((4e-6, 4e-6, 4e-6))
    assert found.ratio("a") == (1, 1, 1)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is ten times slower in two rounds of five: the ratio does not see it, the medians do.
    clock = FakeTime()
    slow = (1, 10, 1, 10, 1)
    callables = {
        "base": clock.taking("base", 1, 1, *slow),
        "other": clock.taking("other", 1, 1, *(2 * s for s in slow)),
    }
    found = harness.compare(callables, "base", rounds=5, turn=1, limit=1e9, clock=clock)
    assert found.seconds == {"base": slow, "other": tuple(2 * s for s in slow)}
    assert found.ratio("other") == (2, 2, 2)
    assert found.spread("other") == (2, 2, 20)
    assert found.excess("other") == (1, 1, 10)


@pytest.mark.parametrize(("limit", "rounds"), [(0, 3), (9, 5), (1e9, 20)])
def test_no_round_begins_after_the_limit(limit: float, rounds: int) -> None:
    clock = FakeTime()
    found = harness.compare({"a": clock.taking("a", 2)}, "a", rounds=20, turn=1, limit=limit, clock=clock)
    assert found.rounds == rounds


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline must be one of 'a', got 'b'"):
        harness.compare({"a": lambda: None}, "b")


def test_spread() -> None:
    assert harness.Spread.of([7]) == (7, 7, 7)
    assert harness.Spread.of([5, 1, 4, 2, 3]) == (3, 2, 4)


def test_threads_are_set_and_put_back() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with harness.threads(before + 1) as told:
        assert torch.get_num_threads() == before + 1
        assert f"torch {before + 1}" in told
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
        "--------------------",
        "name    count  ratio",
        "--------------------",
        "first   1,234   0.50",
        "second      7      -",
        "A note.",
    ]


def test_reports_come_back_from_json(report: harness.Report, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "ratios.json"
    harness.write_json(path, [report, report], {"machine": "here"})
    assert harness.read_json(path) == ([report, report], {"machine": "here"})


def test_csv_has_a_line_for_each_figure(report: harness.Report, tmp_path: Path) -> None:
    path = tmp_path / "ratios.csv"
    harness.write_csv(path, [report], {"machine": "here"})
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert lines[1] == {"report": "demo", "row": "0", "column": "count", "value": "1234", "machine": "here"}
    assert lines[5]["value"] == ""


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    harness.write_whole(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            harness.write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    harness.write_whole(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("case", ratios.CP_CASES[:3], ids=str)
@pytest.mark.parametrize("backend", ratios.backends())
def test_code_by_hand_computes_and_does_what_the_plan_does(case: ratios.Case, backend: str) -> None:
    weight, z, coefficients = case.arrays(backend, 3)
    expected = mt.multilinear_moe(weight, z, coefficients, bias=case.bias)
    by_hand = ratios.cp_by_hand(backend, weight, case.bias)(z, coefficients)
    np.testing.assert_allclose(by_hand, expected, rtol=1e-4, atol=1e-6)
    # A projection of every vector, a product for every level, the output: at batch 1 the plan has no more.
    kinds = sorted(step.kind for step in case.plan(1).steps)
    assert kinds == ["mm"] * (len(case.experts) + 2) + ["mul"] * len(case.experts)


@pytest.mark.parametrize("optimizer", ratios.OPTIMIZERS)
def test_no_path_of_opt_einsum_beats_the_plan(optimizer: str) -> None:
    for case in ratios.PLANNER_CASES[::3]:
        for batch in (1, 256, 65_536):
            rival = ratios.rival(case, batch, optimizer)
            assert rival.ratio >= 1 / 1.001, f"{case}, batch {batch}"


def test_auto_is_several_times_off_on_tucker() -> None:
    tucker = [case for case in ratios.PLANNER_CASES if case.format == "tucker"]
    worst = max(ratios.rival(case, batch, "auto").ratio for case in tucker for batch in (1, 65_536))
    assert worst > 5
    assert ratios.rival(CELEBA, 1, "dp").ratio < 1.02


def test_flops_are_counted_as_opt_einsum_counts_them() -> None:
    for case in (
        CELEBA,
        ratios.Case("tr", (4, 3), 9, 5, (2, 3, 2, 3)),
        ratios.Case("hadamard", (4,), 3, 5, None),
    ):
        equation, shapes, _ = ratios.einsum_of(case, 16)
        _, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="dp")
        assert ratios.rival(case, 16, "dp").flops == info.opt_cost


def test_no_path_serves_all_batches() -> None:
    assert ratios.batch_loss(CELEBA) == pytest.approx((1.38, 28.6), rel=2e-3)
    assert ratios.batch_loss(ratios.Case("cp", (256,), 768, 768, (556,))) == (1, 1)


@pytest.mark.parametrize("name", ratios.COMPARISONS)
def test_every_comparison_fills_its_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "CP_CASES", ratios.CP_CASES[:1])
    monkeypatch.setattr(ratios, "PLANNER_CASES", (ratios.Case("tucker", (4,), 9, 5, (2, 3, 4)),))
    monkeypatch.setattr(ratios, "PLANNER_BATCHES", (1, 3))
    monkeypatch.setattr(ratios, "SEARCH_EXPERTS", {"experts": ((), (4,), (4,), (4,), (4,))})
    report = ratios.COMPARISONS[name](True)
    assert report.name == name
    assert report.rows
    for row in report.rows:
        assert set(row) <= set(report.columns)
    # A line a row, the title, the column names between two rules, and the notes.
    assert len(str(report).splitlines()) == len(report.rows) + 4 + len(report.notes)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ratios.json"
    ratios.main(["batch", "--quick", "--json", str(path), "--csv", str(tmp_path / "ratios.csv")])
    (report,), about = harness.read_json(path)
    assert str(report) in capsys.readouterr().out
    assert report.name == "batch"
    assert about["quick"] == "True"
    assert (tmp_path / "ratios.csv").stat().st_size > 0
    ratios.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(ratios.COMPARISONS)
    with pytest.raises(SystemExit, match="2"):
        ratios.main(["no-such-comparison"])
    assert "unknown comparison 'no-such-comparison'" in capsys.readouterr().err


def test_asv_finds_the_suites_and_nothing_else() -> None:
    discovery = pytest.importorskip("asv_runner.discovery")
    found = {benchmark.name: benchmark for benchmark in discovery.disc_benchmarks(str(ROOT / "benchmarks"))}
    assert sorted(found) == [
        "costs.Cost.track_flops",
        "costs.Cost.track_largest_intermediate",
        "costs.Cost.track_parameters",
        "costs.Cost.track_saved",
        "forward.Forward.peakmem_forward",
        "forward.Forward.time_forward",
        "gates.Gate.time_gate",
        "imports.timeraw_import",
        "planning.FitRank.time_fit_rank",
        "planning.Planning.time_cold_search",
    ]
    for name, benchmark in found.items():
        if name != "imports.timeraw_import":
            benchmark.set_param_idx(0)
            assert not benchmark.do_setup(), name
            benchmark.func(*benchmark._current_params)


def test_tracked_figures_are_those_of_the_library() -> None:
    from benchmarks.costs import Cost

    suite = Cost()
    suite.setup("tr", 64, 1)
    layer = common.layer("tr", 64, 1)
    expected = mt.cost(**layer, batch=common.profile().batch, dtype="float32")
    assert layer["rank"] == mt.fit_rank(**{k: v for k, v in layer.items() if k != "rank"}, rounding="down")
    assert suite.track_flops() == expected.flops
    assert suite.track_parameters() == expected.parameters
    assert suite.track_largest_intermediate() == expected.size
    assert suite.track_saved() == expected.saved


def test_profile_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, profile in common.PROFILES.items():
        monkeypatch.setenv(common.VARIABLE, name)
        assert common.profile() is profile
    monkeypatch.setenv(common.VARIABLE, "huge")
    with pytest.raises(ValueError, match="must be one of quick, regular, large, got 'huge'"):
        common.profile()
    assert common.experts_of(256, 0) == ()
    assert common.experts_of(256, 2) == (16, 16)
