"""The experiment with heads: its runs are those of the protocol, its tables those of its runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytest.importorskip("fairlearn")

import torch
from ledgers import ledger_of
from torch import nn

from mumoe_tensor.analysis import ablate
from mumoe_tensor.models import Backbone
from paper_figures.experiments import fine_tuning, heads, removal, tables
from paper_figures.experiments.heads import Run

MLP = 320 * 512 + 512 + 512 * 10 + 10


def test_runs_are_those_of_the_protocol() -> None:
    runs = heads.runs()
    assert len(runs) == len(set(runs)) == 5 * (2 + 16 + 4 + 8 + 5)
    for run in runs[: len(runs) // 5]:
        head = run.build(320, 10)
        count = sum(p.numel() for p in head.parameters())
        if run.kind == "matched":
            assert count == pytest.approx(MLP, rel=0.015), run
        elif run.format == "cp":
            assert count == 64 * (run.experts[0] + 321 + 10) + 320 * run.experts[0]


def test_seeds_draw_the_weights() -> None:
    one, same, other = (Run("single", "cp", (8,), seed=seed).build(320, 10) for seed in (0, 0, 1))
    assert torch.equal(one.body.experts.factors[0], same.body.experts.factors[0])
    assert not torch.equal(one.body.experts.factors[0], other.body.experts.factors[0])


def test_claims_are_differences_of_the_same_seed() -> None:
    table = tables.table("heads")
    actual = {row["difference"]: row for row in heads.claims()}
    by_seed: dict[Any, dict[int, float]] = {}
    for row in table:
        if row["kind"] == "matched" and str(row["experts"]) in ("none", "32"):
            by_seed.setdefault(row["format"], {})[row["seed"]] = row["accuracy"]
    mine = [100 * (by_seed["cp"][seed] - by_seed["linear"][seed]) for seed in range(5)]
    measured = actual["accuracy in %, cp of 32 experts - MLP"]
    assert measured["mean"] == pytest.approx(np.mean(mine)) and measured["seeds"] == 5
    assert measured["half"] == pytest.approx(2.776 * np.std(mine, ddof=1) / np.sqrt(5), rel=1e-3)
    losses: dict[Any, list[float]] = {}
    for row in sorted(tables.table("heads_repeated"), key=lambda row: row["seed"]):
        if row["kind"] == "matched" and str(row["experts"]) in ("none", "8"):
            losses.setdefault(row["format"], []).append(row["loss"])
    again = {row["difference"]: row for row in heads.claims("heads_repeated")}
    gaps = np.subtract(losses["tr"], losses["linear"])
    assert again["loss, tr of 8 experts - MLP"]["mean"] == pytest.approx(gaps.mean())


def test_means_are_over_seeds() -> None:
    rows = [{"cause": name, "seed": s, "size": 7, "loss": s} for name in "ba" for s in (0, 1)]
    assert tables.means(rows, "cause", ("size", "loss")) == [
        {"cause": name, "size": 7, "loss": 0.5, "seeds": 2} for name in "ba"
    ]


def test_a_training_of_the_experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    y = torch.arange(600) % 10
    x = torch.randn(600, 24, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(24)[y]
    data = heads.Dataset(x, y)
    threads = torch.get_num_threads()
    monkeypatch.setattr(heads, "parts", lambda: (data, data))
    monkeypatch.setattr(heads, "test_rows", lambda: data)
    try:
        row, loads, top = heads.test(Run("single", "cp", (32,)), 0.01)
    finally:
        torch.set_num_threads(threads)
    assert row["accuracy"] > 0.9 and 0 < row["active"] <= 1
    assert row["polysemanticity"] < row["polysemanticity_random"]
    assert len(loads) == 32 and sorted((r["load"] for r in loads), reverse=True) == [r["load"] for r in loads]
    assert top["indices_32"].shape == (heads.SHOWN, heads.IMAGES)
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables.table("some").add([row])
    assert tables.table("some").has(**Run("single", "cp", (32,)).key)
    assert not tables.table("some").has(**Run("single", "cp", (32,), seed=1).key)


def test_a_run_that_has_a_row_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    monkeypatch.setattr(tables, "go_through", lambda tasks, work, _: (work(*task) for task in tasks))
    done: list[int] = []

    def work(experts: int) -> dict[str, Any]:
        done.append(experts)
        return {**Run("single", "cp", (experts,)).key, "accuracy": 0.5}

    tasks = [(Run("single", "cp", (n,)).key, (n,)) for n in (8, 16)]
    for count in (1, 2, 2):
        tables.keep("some", tasks[:count], work, 1)
    assert done == [8, 16] == [row["experts"] for row in tables.table("some")]
    assert all("torch" in row["measured"] for row in tables.table("some"))


# ---- the network below, trained too -----------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Trainings of the experiment set one thread for their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("format", fine_tuning.FORMATS)
def test_fine_tuning_trains_the_network_where_it_says(
    format: str, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    y = torch.arange(400) % 10
    x = torch.rand(400, 8, 8, generator=torch.Generator().manual_seed(0))
    x[torch.arange(400), y % 8] += 1 + (y[:, None] > 7)
    data, made = heads.Dataset(x, y), []

    def network() -> Backbone:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12, momentum=0.1), nn.ReLU(), nn.Flatten())
        made.append(Backbone(layers, 8, 0.5, 1.0).eval())
        return made[-1]

    monkeypatch.setattr(fine_tuning, "parts", lambda: (data, data.rows(torch.arange(200))))
    monkeypatch.setattr(fine_tuning, "load_network", network)
    monkeypatch.setitem(fine_tuning.EPOCHS, "frozen", 10)
    first = network().network[0].weight
    for kind in fine_tuning.EPOCHS:
        row = fine_tuning.fit(kind, format, 0, 0.003)
        assert row["accuracy"] > 0.8 and row["training_accuracy"] > 0.8
        assert torch.equal(made[-1].network[0].weight, first) == (kind == "frozen")
        torch.manual_seed(0)
        head = heads.Head(
            432, 10, 512, format=format, **({"experts": 32, "parameters": "match"} if format == "cp" else {})
        )
        assert row["parameters"] == sum(p.numel() for p in head.parameters())


def test_differences_of_fine_tuning_are_those_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    kinds = [(network, format) for network in fine_tuning.EPOCHS for format in fine_tuning.FORMATS]
    rows = [
        {"network": network, "format": format, "seed": seed, "learning_rate": rate, "accuracy": draw.random()}
        for network, format in kinds
        for seed, rate in [
            *((100, rate) for rate in fine_tuning.RATES[network]),
            *((s, 0.1) for s in range(3)),
        ]
    ]
    monkeypatch.setattr(fine_tuning, "table", lambda name: ledger_of(rows[::-1]))
    for network, format in kinds:
        mine = [r for r in rows if (r["network"], r["format"]) == (network, format)]
        best = max((r for r in mine if r["seed"] == 100), key=lambda row: row["accuracy"])
        assert fine_tuning.rate(network, format) == best["learning_rate"]
    values = {
        kind: [100 * r["accuracy"] for r in rows if (r["network"], r["format"]) == kind][3:] for kind in kinds
    }
    mlp = np.subtract(values["trained", "linear"], values["frozen", "linear"])
    cp = np.subtract(values["trained", "cp"], values["frozen", "cp"])
    actual = {row["in %"]: row for row in fine_tuning.differences()}
    text = "2: (cp - MLP, trained) - (cp - MLP, frozen)"
    for name, expected in (("1: trained - frozen, MLP", mlp), (text, cp - mlp)):
        assert actual[name]["mean"] == pytest.approx(expected.mean())
        # Of three values Student's t has the quantile 4.303.
        assert actual[name]["half"] == pytest.approx(4.303 * expected.std(ddof=1) / np.sqrt(3), rel=1e-3)
    monkeypatch.setattr(fine_tuning, "table", lambda name: ledger_of(rows[1:]))
    with pytest.raises(ValueError, match=r"learning rates must be tried first, .* has 2"):
        fine_tuning.rate(*kinds[0])


# ---- experts removed --------------------------------------------------------------------------------------


def test_removal_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.arange(600) % 10
    x = torch.randn(600, 24, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(24)[y]
    data, made, build = heads.Dataset(x, y), [], Run.build
    for module in (heads, removal):
        monkeypatch.setattr(module, "parts", lambda: (data, data))
    monkeypatch.setattr(Run, "build", lambda *args: made.append(build(*args)) or made[-1])
    rows = removal.changes(Run("single", "cp", (8,)))
    assert [(r["experts"], r["expert"], r["label"]) for r in rows] == [
        (8, k, c) for k in range(8) for c in range(10)
    ]
    (head,) = made

    @torch.no_grad()
    def accuracies() -> Any:
        right = (head(x).argmax(-1) == y).float()
        return np.array([float(right[y == label].mean()) for label in range(10)])

    intact = accuracies()
    for expert in range(8):
        with ablate(head, [expert]):
            change = accuracies() - intact
        np.testing.assert_allclose([r["change"] for r in rows if r["expert"] == expert], change, atol=2e-6)
    assert any(r["change"] for r in rows)
