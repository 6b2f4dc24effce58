"""The study: its figures are the library's, its forwards are right, its files are whole."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import mumoe_tensor as mt
from mumoe_tensor.formats import Factor, Format
from mumoe_tensor.formats.base import _registry

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from matplotlib.text import Text

from mumoe_tensor import study as studies
from mumoe_tensor.study import plots, report
from mumoe_tensor.study import sweep as sweeps
from mumoe_tensor.study.sweep import BASELINE

TINY = studies.Layer("Tiny", 24, 20, hidden=40, experts=4)
SIZES = {"in_features": 24, "hidden": 40, "out_features": 20, "bias": True}
LEVELS = [(), (4,), (3, 2)]
BACKENDS = ["numpy", "torch"] if sweeps.find_spec("torch") else ["numpy"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[studies.Study, Path]:
    out = tmp_path_factory.mktemp("study") / "not" / "there" / "yet"
    return studies.run(TINY, batch=8, repetitions=5, seed=3, out=out), out


@pytest.fixture(scope="module")
def lines(study: tuple[studies.Study, Path]) -> list[dict[str, str]]:
    with open(study[1] / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def made_up(ratios: dict[str, float] | None = None, backends: int = 2, **settings: object) -> studies.Study:
    """A study whose times are set, not measured."""
    sweep = studies.prepare(**settings)
    rows = []
    for k, subject in enumerate(sweep.subjects):
        figures = sweeps._figures(subject)
        if subject.skip:
            rows.append(studies.Row(**figures, note=subject.skip))
            continue
        for backend in ("numpy", "torch")[:backends]:
            ratio = (ratios or {}).get(subject.name, 1 + k / 3)
            times = sweeps._spread([0.9 * ratio, ratio, 1.2 * ratio], [1.0])
            rows.append(studies.Row(**figures, backend=backend, **times))
    return studies.Study(sweep, tuple(rows), studies.environment(), {})


# ---- figures ----------------------------------------------------------------------------------------------


def test_the_csv_has_the_figures_of_cost(lines: list[dict[str, str]]) -> None:
    assert [(line["name"], line["backend"]) for line in lines] == [
        (name, backend) for name in (BASELINE, *mt.formats()) for backend in BACKENDS
    ]
    for line in lines:
        name, levels, gate = line["name"], 4, True
        if name == BASELINE:
            name, levels, gate = "dense", (), False
        rank = tuple(int(r) for r in line["rank"].split())
        told = mt.cost(name, experts=levels, rank=rank, gate=gate, batch=8, dtype="float32", **SIZES)
        expected = {
            "parameters": told.parameters,
            "gate_parameters": told.gate_parameters,
            "flops": told.flops,
            "peak_bytes": told.peak,
            "saved_bytes": told.saved,
            "max_expert_rank": told.max_expert_rank,
        }
        assert {key: int(line[key]) for key in expected} == expected
    baseline = lines[0]
    assert int(baseline["parameters"]) == mt.dense_parameters(24, 20, hidden=40, bias=True)
    assert int(baseline["flops"]) == 8 * 2 * (24 * 40 + 40 * 20)


def test_parameters_are_within_a_rank_step_of_the_budget(lines: list[dict[str, str]]) -> None:
    budget = mt.dense_parameters(24, 20, hidden=40, bias=True)
    fitted = [line for line in lines if line["fitted"] == "True"]
    assert {line["name"] for line in fitted} == {n for n, f in mt.formats().items() if f.bonds(1)}
    for line in fitted:
        assert int(line["budget"]) == budget
        sides = {}
        for rounding in ("down", "up"):
            layer = {"experts": 4, "gate": True, **SIZES}
            rank = mt.fit_rank(line["name"], rounding=rounding, **layer)
            sides[rounding] = mt.cost(line["name"], rank=rank, **layer).parameters
        parameters = int(line["parameters"])
        assert parameters in sides.values()
        assert abs(parameters - budget) == min(abs(p - budget) for p in sides.values())


def test_a_budget_of_ones_own() -> None:
    sweep = studies.prepare("gpt2-mlp", experts=16, formats=["cp"], parameters=2_000_000, batch=4)
    (_, cp) = sweep.subjects
    assert sweep.budget == 2_000_000
    assert abs(cp.cost.parameters - 2_000_000) <= (2 * 16 + 769 + 3072 + 3073 + 768) / 2


def test_ratios_and_quartiles_are_those_of_the_medians(lines: list[dict[str, str]]) -> None:
    reference = {line["backend"]: float(line["seconds"]) for line in lines if line["name"] == BASELINE}
    for line in lines:
        assert int(line["repetitions"]) == 5
        for ratio, seconds in (
            ("time_ratio", "seconds"),
            ("time_ratio_q1", "seconds_q1"),
            ("time_ratio_q3", "seconds_q3"),
        ):
            assert float(line[ratio]) == pytest.approx(float(line[seconds]) / reference[line["backend"]])
        assert 0 < float(line["seconds_q1"]) <= float(line["seconds"]) <= float(line["seconds_q3"])


def test_spread_of_known_times() -> None:
    spread = sweeps._spread([5.0, 1.0, 3.0, 2.0, 4.0], [2.0, 9.0, 1.0])
    assert spread == {
        "repetitions": 5,
        "seconds": 3.0,
        "seconds_q1": 2.0,
        "seconds_q3": 4.0,
        "time_ratio": 1.5,
        "time_ratio_q1": 1.0,
        "time_ratio_q3": 2.0,
    }


def test_the_csv_says_where_it_was_made(lines: list[dict[str, str]]) -> None:
    for line in lines:
        assert (line["layer"], line["experts"], line["batch"], line["seed"]) == ("Tiny", "4", "8", "3")
        assert line["numpy"] == np.__version__ and line["mumoe_tensor"] == mt.__version__
        assert line["python"] == sys.version.split()[0]
        assert line["machine"] and int(line["cores"]) >= 1 and line["date"].endswith("+00:00")


def test_what_does_not_fit_is_reported_but_not_run() -> None:
    found = studies.run(TINY, formats=["cp", "dense"], batch=8, repetitions=1, memory=3e-5)
    (dense,) = [row for row in found.rows if row.name == "dense"]
    assert dense.backend == "" and dense.seconds is None and dense.ratios is None
    assert dense.note.startswith("not run: needs") and "GiB" in dense.note
    told = mt.cost("dense", experts=4, gate=True, batch=8, dtype="float32", **SIZES)
    assert (dense.parameters, dense.flops) == (told.parameters, told.flops)
    assert [row.backend for row in found.rows if row.name == "cp"] == BACKENDS
    assert dense.note in " ".join(studies.notes(found))
    # The limit is on parameters and intermediates together, in bytes.
    needed = (4 * told.parameters + told.peak) / 2**30
    for memory, skipped in ((needed, False), (0.999 * needed, True)):
        (_, subject) = studies.prepare(TINY, formats=["dense"], batch=8, memory=memory).subjects
        assert bool(subject.skip) is skipped


def test_what_cannot_be_had_for_the_budget_is_told() -> None:
    sweep = studies.prepare("clip-head", experts=2048, batch=4)
    assert set(sweep.unfitted) == {n for n, f in mt.formats().items() if f.bonds(1)}
    assert "the gate alone has 1,572,864" in sweep.unfitted["cp"]
    assert [subject.name for subject in sweep.subjects] == [BASELINE, "dense", "hadamard"]


def test_published_layers() -> None:
    for name, layer in studies.LAYERS.items():
        sweep = studies.prepare(name, formats=["cp"])
        assert sweep.budget == mt.dense_parameters(layer.in_features, layer.out_features, layer.hidden)
        assert sweep.experts == (layer.experts,) and sweep.batch == 1024
    gpt2 = studies.prepare(quick=True)
    assert gpt2.layer.sizes == (768, 3072, 768) and gpt2.experts == (256,)
    assert gpt2.budget == 4_722_432 and (gpt2.batch, gpt2.repetitions) == (32, 3)
    assert studies.prepare("clip-head", formats=["cp"]).budget == 769_000


# ---- forwards ---------------------------------------------------------------------------------------------


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_what_is_timed_is_the_mixture(levels: tuple[int, ...]) -> None:
    sweep = studies.prepare(TINY, experts=levels, batch=5, seed=1)
    z, gates = sweeps._inputs(sweep)
    assert [gate.shape for gate in gates] == [(24, n) for n in levels]
    backends, _ = sweeps._backends()
    assert [backend.name for backend in backends] == BACKENDS
    for subject in sweep.subjects:
        weights = sweeps._weights(sweep, subject)
        assert [w.rank for w in weights] == [subject.rank] * 2
        mixing = [] if subject.name == BASELINE else [sweeps.entmax15(z @ gate) for gate in gates]
        y = z
        for k, weight in enumerate(weights):
            dense = mt.to_dense(weight).astype(np.float64)
            y = mixed(dense, gelu(y) if k else y, mixing)
        for backend in backends:
            found = sweeps.forward_pass(backend, subject, weights, gates, z)()
            assert type(found).__module__.split(".")[0] == backend.name
            np.testing.assert_allclose(np.asarray(found), y, rtol=2e-4, atol=2e-5)
            assert found.shape == (5, 20) and np.abs(y).max() > 1e-3


def mixed(dense: np.ndarray, z: np.ndarray, coefficients: list[np.ndarray]) -> np.ndarray:
    """Every expert's matrix mixed, one input after the other."""
    rows = []
    for b, row in enumerate(z):
        matrix = dense
        for a in coefficients:
            matrix = np.tensordot(a[b], matrix, axes=1)
        rows.append(np.append(row, 1.0) @ matrix)
    return np.stack(rows)


def test_the_seed_decides_weights_and_inputs() -> None:
    def drawn(seed: int) -> list[np.ndarray]:
        sweep = studies.prepare(TINY, formats=["cp"], batch=3, seed=seed)
        z, gates = sweeps._inputs(sweep)
        return [z, *gates, *(f for w in sweeps._weights(sweep, sweep.subjects[1]) for f in w.arrays)]

    for one, same, other in zip(drawn(0), drawn(0), drawn(1), strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


def test_rounds_interleave_and_rotate() -> None:
    calls: list[str] = []
    ticks: list[tuple[int, str]] = []
    forwards = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = sweeps._interleaved(forwards, 3, 60.0, lambda done, name: ticks.append((done, name)))
    assert "".join(calls) == "abcbcacababc"
    assert {name: len(measured) for name, measured in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert ticks == list(enumerate(calls, start=1))


def test_rounds_stop_when_their_time_has_passed_but_three_are_timed() -> None:
    calls: list[int] = []
    times = sweeps._interleaved({"a": lambda: calls.append(1)}, 100, 1e-9, lambda done, name: None)
    assert len(times["a"]) == 3 and len(calls) == 4


def test_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 100.0, 200.0, 207.0])
    monkeypatch.setattr(sweeps, "perf_counter", lambda: next(clock))
    assert sweeps._interleaved({"a": lambda: None}, 1, 60.0, lambda done, name: None) == {"a": [7.0]}


def test_progress_reaches_its_end() -> None:
    seen: list[tuple[int, int]] = []
    studies.run(TINY, formats=["cp"], batch=2, repetitions=3, progress=lambda *x: seen.append(x[:2]))
    total = len(BACKENDS) * 2 * 4
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_without_torch_it_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "find_spec", lambda name: None)
    found = studies.run(TINY, formats=["cp"], batch=2, repetitions=1)
    assert found.backends == ("numpy",)
    assert "torch is left out: not installed; pip install 'mumoe_tensor[torch]'." in studies.notes(found)


# ---- files and screen -------------------------------------------------------------------------------------


def test_table_and_pictures_are_written(study: tuple[studies.Study, Path]) -> None:
    _, out = study
    assert sorted(path.name for path in out.iterdir()) == ["results.csv", "study.png", "study.svg"]
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG") and (
        out / "study.png"
    ).stat().st_size > 20_000
    assert ElementTree.parse(out / "study.svg").getroot().tag.endswith("svg")


def test_the_same_study_gives_the_same_picture(tmp_path: Path) -> None:
    found = made_up(layer=TINY, batch=8)
    studies.write(found, tmp_path / "a")
    studies.write(found, tmp_path / "b")
    for name in ("study.svg", "study.png", "results.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file.csv"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(RuntimeError, match="half way"), report.whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists() if before is None else path.read_bytes() == before
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file.csv"])
    assert before is None or path.read_bytes() == before
    with report.whole_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, file: object, **settings: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        plots.write_plot(made_up(layer=TINY, batch=8), tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_when_the_folder_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(studies, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(OSError, match="file"):
        studies.run(TINY, out=tmp_path / "file")


def test_json_has_what_the_csv_has(study: tuple[studies.Study, Path], lines: list[dict[str, str]]) -> None:
    told = json.loads(json.dumps(studies.to_json(study[0])))
    assert len(told["rows"]) == len(lines)
    for row, line in zip(told["rows"], lines, strict=True):
        for key, value in (told["setting"] | row | told["environment"]).items():
            assert line[key] == ("" if value is None else str(value))


def test_tables_show_every_figure() -> None:
    from rich.console import Console

    found = made_up({"cp": 1.25}, batch=1024)
    console = Console(width=80, record=True, file=StringIO())
    for table in studies.tables(found):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    for row in found.rows:
        assert row.title in text and f"{row.parameters:,}" in text and f"{row.max_expert_rank:,}" in text
        assert f"{row.saved_bytes / 2**20:,.1f}" in text and f"{row.peak_bytes / 2**20:,.1f}" in text
        assert f"{row.flops / 1024 / 1e6:,.2f}" in text
    assert "1.25 (1.19–1.38)" in text and "1,250.00" in text and "not run" in text
    noted = " ".join(studies.notes(found))
    assert "fitted to 4,722,432 parameters" in noted
    assert "Without a rank, at their own cost: Dense mixture, Hadamard." in noted


def test_a_busy_machine_is_told_of() -> None:
    found = made_up(layer=TINY, batch=8)
    for load, told in ((1.5, True), (0.5, False), (None, False)):
        busy = replace(found, environment=found.environment | {"load": load, "cores": 2})
        assert any("Other work" in note for note in studies.notes(busy)) is told


# ---- the picture ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "backends"),
    [
        ({}, 2),
        ({"quick": True}, 1),
        ({"layer": "mixer-s16-token"}, 2),
        ({"layer": "clip-head", "experts": (4, 4, 4), "formats": ["cp"]}, 1),
        ({"layer": "clip-head", "experts": 4096, "parameters": 9_000_000, "memory": 1e-6}, 2),
    ],
)
@pytest.mark.parametrize("slow", [1.0, 300.0])
def test_no_text_is_clipped_small_or_on_another(
    settings: dict, backends: int, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made_up({"cp": slow, "tr": 1 / slow}, backends, **settings)
    figure = plots.draw(found)
    figure.canvas.draw()
    drawn: list[Text] = []
    draw = Text.draw
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", lambda self, *args: drawn.append(self) or draw(self, *args))
        figure.canvas.draw()
    page, boxes = figure.bbox, []
    for text in drawn:
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            assert text.get_fontsize() >= 8, text.get_text()
            assert page.x0 <= box.x0 and box.x1 <= page.x1, text.get_text()
            assert page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
            boxes.append((text.get_text(), box.padded(-1)))
            if text.axes is not None and text in text.axes.texts:
                assert box.x1 <= text.axes.bbox.x1, text.get_text()
    for k, (one, box) in enumerate(boxes):
        for other, further in boxes[:k]:
            assert not box.overlaps(further), (one, other)
    told = {text for text, _ in boxes}
    assert {"Parameters", "FLOPs", "Peak memory", "Measured forward time", "NumPy"} <= told
    assert {row.title for row in found.rows} <= told


def test_the_picture_shows_the_figures() -> None:
    found = made_up({"cp": 1.5}, formats=["cp", "dense"])
    axes = plots.draw(found).axes
    rows = {row.name: row for row in found.rows}
    for ax, value in zip(
        axes, ("parameters", "flops", "peak_bytes", "saved_bytes", "max_expert_rank"), strict=False
    ):
        dots = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
        extra = 1024 * 768 * 4 if value == "saved_bytes" else 0
        reference = getattr(rows[BASELINE], value) + extra
        assert dots == [
            (getattr(rows[name], value) + extra) / reference for name in (BASELINE, "cp", "dense")
        ]
    times = [line.get_xdata()[0] for line in axes[5].lines if line.get_marker() in ("o", "s")]
    assert times == [1, 1, 1.5, 1.5]
    assert [text.get_text().strip() for text in axes[5].texts] == ["not run"]


def test_a_format_has_one_colour_of_its_own() -> None:
    class Another(Format):
        name = "another"
        title = "Another"

        def factors(self, modes: tuple[str, ...]) -> list[Factor]:
            return [Factor(" ".join(modes))]

    names = [BASELINE, *mt.formats()]
    before = {name: plots.colour(name) for name in names}
    mt.register(Another)
    try:
        assert {name: plots.colour(name) for name in names} == before
        assert len({*before.values(), plots.colour("another")}) == len(names) + 1
    finally:
        del _registry["another"]


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"layer": "gpt5"}, ValueError, "unknown layer 'gpt5'; the layers are 'gpt2-mlp'"),
        ({"layer": 768}, TypeError, "a name or a Layer instance, got 768"),
        ({"formats": []}, ValueError, "at least one format"),
        ({"formats": ["nope"]}, ValueError, "unknown format 'nope'"),
        ({"experts": 0}, ValueError, "must be positive, got 0"),
        ({"experts": 2.5}, TypeError, "must be an integer, got 2.5"),
        ({"batch": 0}, ValueError, "batch must be positive, got 0"),
        ({"repetitions": 1.5}, TypeError, "repetitions must be an integer, got 1.5"),
        ({"parameters": -1}, ValueError, "parameters must be positive, got -1"),
        ({"formats": ["cp"], "parameters": 10}, ValueError, "some format must fit the budget"),
        ({"seconds": 0}, ValueError, "seconds must be positive, got 0"),
        ({"memory": float("nan")}, ValueError, "memory must be positive, got nan"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
    ],
)
def test_bad_settings(settings: dict, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        studies.run(**{"layer": TINY, "out": None, **settings})
